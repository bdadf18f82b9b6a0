"""pgbench against a guest's database, forever; a server that dies is started again."""

import subprocess
import sys

from replication.errors import StorageError, UnavailableError
from vsphere_emu.config import PgbenchWorkload
from vsphere_emu.tool import run_tool
from vsphere_emu.workload.database import USER, Database
from vsphere_emu.workload.pace import Pace

PASS_SECONDS = 60
HISTORY_ROWS_MAX = 3_000_000
FAILURES_MAX = 50
CLIENT_STOP_SECONDS_MAX = 5.0

_RESET = """BEGIN; TRUNCATE pgbench_history;
UPDATE pgbench_accounts SET abalance = 0 WHERE abalance <> 0;
UPDATE pgbench_tellers SET tbalance = 0; UPDATE pgbench_branches SET bbalance = 0; COMMIT;"""


class Pgbench:
    """The workload on a database that ``make`` has made."""

    def __init__(self, database: Database, config: PgbenchWorkload) -> None:
        self._database = database
        self._config = config

    def run(self, pace: Pace) -> None:
        """Run passes of pgbench until ``pace`` ends, looking at it every ``pace`` interval.

        Raises what fails more than FAILURES_MAX times in a row.
        """
        failed = 0
        client: subprocess.Popen[bytes] | None = None
        try:
            while pace.next():
                if client is not None and (code := client.poll()) is not None:
                    failed = failed + 1 if code else 0
                    client = None
                try:
                    if not self._database.alive:
                        sys.stderr.write("PostgreSQL is gone; starting it again\n")
                        self._database.start()
                    if client is None:
                        self._bound_history()
                        client = self._start_client()
                except (UnavailableError, StorageError):  # as while its last backends still end
                    failed += 1
                    if failed > FAILURES_MAX:
                        raise
        finally:
            if client is not None:
                client.terminate()
                try:
                    client.wait(CLIENT_STOP_SECONDS_MAX)
                except subprocess.TimeoutExpired:
                    client.kill()
                    client.wait()
            self._database.stop()

    def _start_client(self) -> subprocess.Popen[bytes]:
        options = ["-n", "-c", str(self._config.clients), "-j", "2", "-T", str(PASS_SECONDS)]
        if self._config.transactions_per_second is not None:
            options += ["-R", str(self._config.transactions_per_second)]
        # -n: without it pgbench empties its history first, and the sums would not agree
        client = self._database.client("pgbench", *options, USER)
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *client], stdin=subprocess.DEVNULL, stdout=2
        )

    def _bound_history(self) -> None:
        """Begin anew when the history would fill the disk: in one transaction, so sums agree."""
        psql = self._database.client("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c")
        rows = int(run_tool(*psql, "SELECT count(*) FROM pgbench_history"))
        if rows > HISTORY_ROWS_MAX:
            run_tool(*psql, _RESET)
