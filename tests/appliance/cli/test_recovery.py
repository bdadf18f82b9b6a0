"""The command line for recovery, typed against a config server whose nodes do as they are told."""

import asyncio
import stat
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
import structlog

from appliance.cli.names import complete_plan, complete_schedule
from appliance.config_server.identity.administration import show_ca
from appliance.config_server.recovery.intake import take_points
from appliance.config_server.store.recovery_tables import Failover
from replication.control.recovery import ListedPoint, PointList
from replication.control.role import OperatorRole
from tests.appliance.cli.person import Person
from tests.appliance.config_server.protection.stage import APPLIER, MACHINE
from tests.appliance.config_server.recovery.actions.orders import write_program
from tests.appliance.config_server.recovery.site import Site, open_site

START_SECONDS_MAX = 120
DAY_NS = 86400 * 10**9
PLAN = """\
name: shop
groups:
  - name: database
    machines:
      - db-1
    after:
      - name: look
        manual:
          instruction: look at it
  - name: web
    machines:
      - web-1
"""


class Running:
    """A site on a loop of its own, in a thread; ``folder`` has tokens and the CA."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.site: Site | None = None
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(START_SECONDS_MAX)
        assert self.site is not None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with open_site(self.folder) as site:
            server = site.control.server
            for role, name in ((OperatorRole.CONTRIBUTOR, "boss"), (OperatorRole.READER, "guest")):
                token = self.folder / f"{name}.token"
                token.write_text(site.control.rig.tokens[role])
            (self.folder / "ca.pem").write_text(await show_ca(server.config, fingerprint=False))
            await site.protected("web-1", "db-1")
            await self._list_points(site)
            self.url = f"https://localhost:{site.control.port}"
            self.site = site
            self._ready.set()
            await self._stop.wait()

    def switched_off(self, failover: str) -> None:
        """As if the source's vCenter had switched it off for this failover."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._switch_off(failover), self._loop).result()

    async def _switch_off(self, failover: str) -> None:
        assert self.site is not None
        server = self.site.control.server
        async with server.database.writing() as session:
            row = await session.get_one(Failover, uuid.UUID(failover))
            row.powered_off_ns = server.clock()

    async def _list_points(self, site: Site) -> None:
        server = site.control.server
        now_ns = server.clock()
        points = tuple(
            ListedPoint(name=name, position=place, time_ns=now_ns, consistency="crash")
            for place, name in enumerate(("old", "newer", "newest"), 1)
        )
        async with server.database.writing() as session:
            await take_points(session, APPLIER, PointList(machine=MACHINE, points=points), now_ns)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # it shares our terminal
    try:
        with Running(tmp_path_factory.mktemp("site")) as running:
            yield running
    finally:
        structlog.reset_defaults()


@pytest.fixture
def boss(
    running: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Person:
    monkeypatch.setattr("appliance.cli.jobs.POLL_SECONDS", 0.1)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    for name in ("UNDERSTUDY_URL", "UNDERSTUDY_TOKEN", "UNDERSTUDY_CA", "UNDERSTUDY_STORE"):
        monkeypatch.delenv(name, raising=False)
    person = Person(capsys, monkeypatch)
    token, ca = str(running.folder / "boss.token"), str(running.folder / "ca.pem")
    person.sees("login", running.url, "--token-file", token, "--ca", ca)
    return person


def test_a_machine_is_tested_seen_and_cleaned_up(boss: Person, tmp_path: Path) -> None:
    (tmp_path / "check.sh").write_text("test -d /disk0\n")
    out = boss.sees(
        "failover", "test", "web-1", "--script", str(tmp_path / "check.sh"), "--notes", "spring",
        "--guest", "recovery", "--memory", "256", "--wait",
    )  # fmt: skip
    for told in ("✓ hold the points", "✓ check", "newest", "up", "spring", "passed"):
        assert told in out
    (vm,) = boss.reads("vms", "list")
    assert (vm["machine"], vm["vm"]["state"]) == ("web-1", "up")
    assert "10.0.0.2" in boss.sees("vms", "list")
    (listed,) = boss.reads("failover", "list")
    assert listed["id"] == vm["id"]
    assert boss.reads("failover", "show", vm["id"]) == boss.reads("failover", "show", "web-1")
    assert "all is mounted" in boss.sees("vms", "console", "web-1", "--tail", "1")
    picture = tmp_path / "web.png"
    boss.sees("vms", "screenshot", "web-1", "--output", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    # Of two at once, which one has to be said.
    boss.sees("failover", "test", str(MACHINE), "--point", "old", "--network", "second", "--wait")
    assert "second, isolated" in boss.sees("failover", "show", "web-1")
    err = boss.is_told("failover", "cleanup", "web-1", code=11)
    assert "has 2 of them" in err
    assert "--failover ID" in err
    out = boss.sees("failover", "cleanup", "web-1", "--failover", vm["id"], "--wait")
    assert "✓ they are gone" in out
    assert "Nothing is left of the test of web-1" in out
    boss.sees("failover", "cleanup", str(MACHINE), "--notes", "well", "--wait")
    assert boss.reads("failover", "list") == []
    assert len(boss.reads("failover", "list", "--all", "--machine", "web-1")) == 2
    assert "There are none" not in boss.sees("failover", "list", "--all")
    assert "has no open test failover" in boss.is_told("failover", "cleanup", "web-1", code=10)


def test_a_machine_fails_over_goes_to_another_point_and_back(
    boss: Person, running: Running
) -> None:
    err = boss.is_told("failover", "unplanned", "web-1", code=2)
    assert "This is not a terminal" in err
    for verb in ("commit", "cancel"):
        assert "no open failover" in boss.is_told("failover", verb, "web-1", code=10)
    err = boss.is_told("failover", "test", "web-1", "--point", "2020-01-01", code=10)
    assert "web-1 has no recovery point 2020-01-01\nhint: `understudy points web-1`" in err
    err = boss.is_told("failover", "test", "web-1", "--network", "default", code=11)
    assert "a test's is isolated" in err
    err = boss.types("failover", "test", "web-1", "--memory", "99999999")[2]
    assert "1048576" in err
    found = boss.reads(
        "failover", "unplanned", "web-1", "--point", "newer", "--no-shut-down", "--yes", "--wait"
    )
    assert (found["state"], found["point"], found["kind"]) == ("up", "newer", "unplanned")
    boss.sees("failover", "change-point", "web-1", "--point", "old", "--wait")
    assert boss.reads("failover", "show", "web-1")["point"] == "old"
    for verb in ("commit", "cancel"):
        assert "say --yes" in boss.is_told("failover", verb, "web-1", code=2)
    running.switched_off(found["id"])
    out = boss.sees("failover", "cancel", "web-1", "--yes", "--wait")
    assert out.splitlines()[-1] == (
        "web-1 is protected again. Its source is switched off: switch it on in the vCenter."
    )
    assert boss.reads("failover", "show", "web-1")["state"] == "cancelled"
    assert "say --yes" in boss.is_told("unprotect", "web-1", code=2)
    assert "there is no machine" in boss.is_told("failover", "show", "nobody", code=10)
    assert "--guest" in boss.is_told("failover", "test", "web-1", "--guest", "x", code=2)


def test_points_are_listed_and_locked(boss: Person) -> None:
    assert [point["name"] for point in boss.reads("points", "web-1")] == ["newest", "newer", "old"]
    lines = boss.sees("points", "web-1").splitlines()
    assert [line.split()[0] for line in lines] == ["point", "old", "newer", "newest", "3"]
    assert "cannot be deleted before" in boss.sees(
        "points", "lock", "web-1", "old", "--until", "30d"
    )
    for until in ("2020-01-01", "soon"):
        boss.is_told("points", "lock", "web-1", "old", "--until", until, code=2)
    err = boss.is_told("points", "lock", "web-1", "old", "--until", "1d", code=11)
    assert "shorter" in err or "longer" in err or "until" in err


def test_plans_are_made_edited_and_moved_as_yaml(
    boss: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boss.sees("plans", "create", "small", "--group", "all=web-1,db-1", "--description", "both")
    assert "small can run" in boss.sees("plans", "validate", "small")
    assert "web-1" in boss.sees("plans", "show", "small")
    text = boss.sees("plans", "export", "small")
    assert text == (
        "name: small\ndescription: both\ngroups:\n  - name: all\n    machines:\n"
        "      - web-1\n      - db-1\n"
    )
    file = tmp_path / "plan.yaml"
    file.write_text(text.replace("- db-1", "- db-1\n      - db-1"))
    err = boss.is_told("plans", "import", str(file), "--replace", code=9)
    assert "line 8: groups[1].machines[3]: db-1 is in group 1 and again" in err
    file.write_text(text.replace("- db-1", "- nobody"))
    assert "there is no machine nobody" in boss.sees("plans", "import", str(file), "--name", "odd")
    err = boss.types("plans", "validate", "odd")[2]
    assert "cannot run as things are" in err
    err = boss.is_told("plans", "import", str(file), code=11)
    assert "`understudy plans edit small`" in err
    assert "`understudy plans delete small`" in err
    boss.sees("plans", "import", str(file), "--replace")
    assert boss.reads("plans", "show", "small")["revision"] == 2

    editor = write_program(tmp_path, "editor", '#!/bin/sh\nsed -i s/nobody/db-1/ "$1"\n')
    monkeypatch.setenv("EDITOR", str(editor))
    monkeypatch.delenv("VISUAL", raising=False)
    assert "changed" in boss.sees("plans", "edit", "small")
    assert "nothing was changed" in boss.sees("plans", "edit", "small")
    assert "small can run" in boss.sees("plans", "validate", "small", "--kind", "planned")
    broken = write_program(tmp_path, "breaker", '#!/bin/sh\necho more: 1 >> "$1"\n')
    monkeypatch.setenv("EDITOR", str(broken))
    code, out, err = boss.types("plans", "edit", "small")
    assert (code, "unknown key" in err) == (9, True)
    kept = Path(out.split(" is in ")[1].split(":")[0])
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.unlink()
    boss.sees("plans", "clone", "small", "big")
    assert [plan["name"] for plan in boss.reads("plans", "list")] == ["big", "odd", "small"]
    assert complete_plan("s") == ["small"]
    assert "say --yes" in boss.is_told("plans", "delete", "big", code=2)
    for name in ("big", "odd", "small"):
        boss.sees("plans", "delete", name, "--yes")
    assert "There is no plan" in boss.sees("plans", "list")
    assert "as in web=web-1" in boss.is_told("plans", "create", "x", "--group", "web", code=2)


def test_a_plan_runs_waits_for_a_person_and_is_cleaned_up(boss: Person, tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(PLAN)
    boss.sees("plans", "import", str(file))
    job = boss.reads("plans", "test", "shop")["id"]
    while "look at it" not in boss.sees("jobs", job):
        pass
    out = boss.sees("jobs", "resume", job, "--note", "it looks well", "--wait")
    assert "resumed by" in out
    assert "✓ group 2: check" in out
    (run,) = boss.reads("plans", "runs", "shop")
    again, out, err = boss.types("plans", "test", "shop", "--network", "shops")
    assert (again, "shops, isolated" in out) == (0, True)
    assert f"`understudy plans cleanup shop --run {run['id']}`" in err
    while "look at it" not in boss.sees("jobs", "--machine", "shop", "--state", "running"):
        pass
    (second, first) = boss.reads("plans", "runs", "shop")
    assert first["id"] == run["id"]
    boss.types("jobs", second["job"], "--cancel", "--yes", "--follow")
    assert "Runs of it that are open stay so" in boss.is_told("plans", "delete", "shop", code=2)
    assert "there is no run x" in boss.is_told("plans", "runs", "shop", "--run", "x", code=10)
    out = boss.sees("plans", "runs", "shop", "--run", run["id"])
    assert "after group 1, look: done" in out
    out = boss.sees("plans", "cleanup", "shop", "--wait")
    assert "✓ they are gone" in out
    assert "Nothing is left of this test of shop" in out
    assert "no test of shop" in boss.is_told("plans", "cleanup", "shop", code=10)
    assert "say --yes" in boss.is_told("plans", "run", "shop", "--kind", "planned", code=2)
    for words in ((), ("--kind", "x")):
        err = boss.is_told("plans", "run", "shop", *words, code=2)
        assert "--kind planned" in err
        assert "--kind unplanned" in err
    a_drill_that_waits_for_a_person_says_so_and_is_cancelled(boss)
    boss.sees("plans", "delete", "shop", "--yes")


def a_drill_that_waits_for_a_person_says_so_and_is_cancelled(boss: Person) -> None:
    begun = boss.reads("drills", "run", "--plan", "shop")
    drill, job = begun["id"], begun["job"]
    while "look at it" not in boss.sees("drills", "show", drill):
        pass
    assert job in boss.sees("drills", "show", drill)
    assert "has no report yet" in boss.is_told("drills", "report", drill, "--json", code=11)
    assert "which job" in boss.is_told("jobs", "--cancel", code=2)
    err = boss.is_told("jobs", job, "--cancel", code=2)
    assert "test-failover shop" in err
    assert "say --yes" in err
    assert "cancelled" in boss.types("jobs", job, "--cancel", "--yes", "--follow")[2]
    assert boss.types("jobs", job, "--cancel", "--yes")[0] == 11
    while boss.reads("drills", "show", drill)["state"] != "failed":
        pass


def test_drills_are_held_scheduled_and_reported(boss: Person, tmp_path: Path) -> None:
    (tmp_path / "check.sh").write_text("test -d /disk0\n")
    script = ("--script", str(tmp_path / "check.sh"))
    found = boss.reads(
        "drills", "run", "--machine", "db-1", "--guest", "recovery", *script, "--wait"
    )
    assert (found["state"], found["untouched"]) == ("passed", True)
    drill = found["id"]
    out = boss.sees("drills", "show", "db-1")
    assert found["report"]["digest"] in out
    page = tmp_path / "page.html"
    assert "it opens in any browser" in boss.sees("drills", "report", drill, "--html", str(page))
    assert "data:image/png" in page.read_text()
    assert boss.reads("drills", "report", drill) == found["report"]
    err = boss.is_told("drills", "report", "files-01", code=10)
    assert "there is no drill files-01" in err
    assert "`understudy drills list`" in err
    assert drill in boss.sees("drills", "list")
    out = boss.sees(
        "drills", "schedule", "weekly", "--machine", "db-1", "--every", "7d", "--at", "03:00"
    )
    assert "every 7 days at 03:00 UTC" in out
    boss.sees("drills", "schedule", "saturdays", "--machine", "web-1", "--cron", "0 3 * * 6")
    assert "cron 0 3 * * 6" in boss.sees("drills", "schedules")
    assert complete_schedule("s") == ["saturdays"]
    for words in (
        ("run",),
        ("run", "--plan", "x", "--machine", "y"),
        ("schedule", "x", "--machine", "db-1", "--every", "soon", "--at", "03:00"),
        ("schedule", "x", "--machine", "db-1", "--every", "7d"),
        ("schedule", "x", "--machine", "db-1"),
        ("schedule", "x", "--machine", "db-1", "--every", "7d", "--at", "3:00", "--cron", "x"),
    ):
        boss.is_told("drills", *words, code=2)
    for words in (
        ("schedule", "x", "--machine", "db-1", "--every", "7d", "--at", "3:00"),
        ("schedule", "x", "--machine", "db-1", "--cron", "0 0 30 2 *"),
        ("run", "--plan", "x", *script),
    ):
        boss.is_told("drills", *words, code=9)
    assert "say --yes" in boss.is_told("drills", "unschedule", "weekly", code=2)
    for name in ("weekly", "saturdays"):
        boss.sees("drills", "unschedule", name, "--yes")
    boss.is_told("drills", "unschedule", "weekly", "--yes", code=10)


def test_a_reader_looks_and_changes_nothing(boss: Person, running: Running) -> None:
    token, ca = str(running.folder / "guest.token"), str(running.folder / "ca.pem")
    boss.sees("login", running.url, "--token-file", token, "--ca", ca)
    for noun in ("failover", "plans", "drills", "vms"):
        boss.reads(noun, "list")
    for words in (
        ("failover", "test", "web-1"),
        ("plans", "create", "x", "--group", "a=web-1"),
        ("drills", "run", "--machine", "web-1"),
        ("points", "lock", "web-1", "newer", "--until", "1d"),
    ):
        assert "may not do this" in boss.is_told(*words, code=12)
