"""A workload's process: ``python -m vsphere_emu.workload``; started by the guest it belongs to."""

import argparse
import os
import sys

from pydantic import TypeAdapter

from replication.errors import ConfigError, ReplicationError
from vsphere_emu.config import FilesWorkload, PgbenchWorkload, SystemWorkload, WebWorkload, Workload
from vsphere_emu.workload.database import Database
from vsphere_emu.workload.files import Files
from vsphere_emu.workload.life import held, tell_ready
from vsphere_emu.workload.pace import Pace
from vsphere_emu.workload.pgbench import Pgbench
from vsphere_emu.workload.system import System
from vsphere_emu.workload.web import Web

PASSES_WATCHED_PER_SECOND = 10.0


def main() -> int:
    """Run until SIGTERM; the exit code is 0 then."""
    parser = argparse.ArgumentParser(prog="vsphere_emu.workload", description=__doc__)
    parser.add_argument("--lock", required=True, help="the file that tells others of our life")
    parser.add_argument("--workload", required=True, help="its configuration, as JSON")
    parser.add_argument("--mount", action="append", default=[], help="DISK=FOLDER, for each")
    arguments = parser.parse_args()
    workload = TypeAdapter[Workload](Workload).validate_json(arguments.workload)
    mounts = dict(pair.split("=", 1) for pair in arguments.mount)
    try:
        with held(arguments.lock) as lock:
            _run(workload, mounts, lock)
    except ReplicationError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _run(workload: Workload, mounts: dict[str, str], lock: int) -> None:
    for folder in mounts.values():
        if not os.path.ismount(folder):
            raise ConfigError(f"nothing is mounted at {folder}", hint="power the guest on first")
    match workload:
        case WebWorkload():
            web, pace = Web(mounts[workload.disk]), Pace(workload.writes_per_second)
            tell_ready(lock)
            web.run(pace)
        case FilesWorkload():
            files = Files(mounts[workload.disk], workload.trim_interval_seconds)
            pace = Pace(workload.changes_per_second)
            tell_ready(lock)
            files.run(pace)
        case SystemWorkload():
            system, pace = System(mounts[workload.disk]), Pace(workload.writes_per_second)
            tell_ready(lock)
            system.run(pace)
        case PgbenchWorkload():
            database = Database(mounts[workload.data_disk], mounts[workload.wal_disk])
            try:
                database.make(workload.scale)
                database.start()
                pace = Pace(PASSES_WATCHED_PER_SECOND)
                tell_ready(lock)
                Pgbench(database, workload).run(pace)
            finally:
                database.kill()


if __name__ == "__main__":
    sys.exit(main())
