"""The command line against a config server that runs."""

import asyncio
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cli.names import complete_machine, complete_policy
from appliance.config_server.store.engine import open_database
from replication.control.role import OperatorRole
from tests.appliance.cli.daemon import Daemon, run_daemon
from tests.appliance.cli.person import Person
from tests.appliance.config_server.watching.scene import (
    PROCESS_SERVER,
    add_job,
    report_all,
    set_scene,
)

NS = 1_000_000_000


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(tmp_path_factory.mktemp("config-server"), free_port()) as running:
        (running.folder / "ca.pem").write_text(running.ca() + "\n")
        running.token("boss", OperatorRole.CONTRIBUTOR)
        running.token("guest", OperatorRole.READER)

        async def fill() -> None:
            async with open_database(running.database) as database:
                await set_scene(database)
                await report_all(database, time.time_ns(), cpu_share=0.97)
                await add_job(database, "0123456789abcdef", "failed", time.time_ns(), "no disk")

        asyncio.run(fill())
        yield running


@pytest.fixture
def person(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Person:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    for name in ("UNDERSTUDY_URL", "UNDERSTUDY_TOKEN", "UNDERSTUDY_CA", "UNDERSTUDY_STORE"):
        monkeypatch.delenv(name, raising=False)
    return Person(capsys, monkeypatch)


def sign_in(person: Person, daemon: Daemon, name: str = "boss") -> None:
    token, ca = str(daemon.folder / f"{name}.token"), str(daemon.folder / "ca.pem")
    person.sees("login", daemon.url, "--token-file", token, "--ca", ca)


@pytest.fixture
def boss(person: Person, daemon: Daemon) -> Person:
    sign_in(person, daemon)
    return person


@pytest.fixture
def guest(person: Person, daemon: Daemon) -> Person:
    sign_in(person, daemon, "guest")
    return person


def test_login_keeps_the_token_for_its_owner_alone(
    person: Person, daemon: Daemon, tmp_path: Path
) -> None:
    told = person.sees(
        "login", daemon.url, "--token-stdin", "--ca", str(daemon.folder / "ca.pem"),
        stdin=(daemon.folder / "guest.token").read_text(),
    )  # fmt: skip
    assert told == f"Signed in to {daemon.url} as guest (reader).\n"
    kept = tmp_path / "home" / "understudy" / "login.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.chmod(0o644)
    assert "can be read by others" in person.is_told("health", code=2)
    kept.chmod(0o600)
    kept.write_text("{")
    assert "is damaged" in person.is_told("health", code=2)
    assert person.sees("logout") == "Signed out.\n"
    assert person.sees("logout") == "Nobody was signed in.\n"
    assert "not signed in" in person.is_told("health", code=2)


def test_login_by_the_fingerprint_of_the_ca(person: Person, daemon: Daemon) -> None:
    token = str(daemon.folder / "boss.token")
    good = daemon.ca(fingerprint=True)
    wrong = "sha256:" + "0" * 64
    login = ("login", daemon.url, "--token-file", token)
    assert "not the one given" in person.is_told(*login, "--fingerprint", wrong, code=3)
    assert "64 hexadecimal" in person.is_told(*login, "--fingerprint", "abc", code=2)
    assert "cannot be trusted" in person.is_told(*login, code=3)
    assert "not signed in" in person.is_told("health", code=2), "a refused login keeps nothing"
    person.sees(*login, "--fingerprint", good)
    assert person.reads("health")["state"] in {"normal", "warning", "critical"}


def test_environment_instead_of_login(
    person: Person, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_URL", daemon.url)
    assert "UNDERSTUDY_TOKEN is not" in person.is_told("health", code=2)
    monkeypatch.setenv("UNDERSTUDY_TOKEN", (daemon.folder / "guest.token").read_text().strip())
    assert "cannot be trusted" in person.is_told("health", code=3)
    monkeypatch.setenv("UNDERSTUDY_CA", str(daemon.folder / "ca.pem"))
    person.reads("components")


def test_a_token_that_is_revoked_or_unknown(boss: Person, daemon: Daemon, tmp_path: Path) -> None:
    made = boss.reads("tokens", "create", "for-a-day", "--role", "operator", "--days", "1")
    assert boss.sees("tokens", "revoke", "for-a-day") == "for-a-day: good no more.\n"
    token = tmp_path / "token"
    token.write_text(made["token"])
    ca = str(daemon.folder / "ca.pem")
    told = boss.is_told("login", daemon.url, "--token-file", str(token), "--ca", ca, code=12)
    assert "unknown, expired or revoked" in told
    assert "understudy login" in told
    assert made["token"] not in told
    states = {one["name"]: one["revoked_ns"] for one in boss.reads("tokens", "list")}
    assert states["for-a-day"]
    assert not states["boss"]


def test_nobody_there(boss: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_URL", f"https://127.0.0.1:{free_port()}")
    monkeypatch.setenv("UNDERSTUDY_TOKEN", "us_x")
    assert "cannot reach the config server" in boss.is_told("health", code=4)
    for url in ("http://x", "https://x/path", "https://user@x", "https://x:99999"):
        assert "not the address" in boss.is_told("login", url, "--token-stdin", code=2)


def test_forbidden_says_which_role_it_takes(guest: Person) -> None:
    told = guest.is_told("policies", "create", "mine", code=12)
    assert "reader may not do this" in told
    assert "it takes contributor" in told
    assert "it takes operator" in guest.is_told("resync", "db-01", "--now", code=12)


def test_policies(boss: Person) -> None:
    made = boss.reads(
        "policies", "create", "gold", "--retention", "3d", "--app-frequency", "4h",
        "--rpo-threshold", "5m",
    )  # fmt: skip
    assert made["retention_seconds"] == 3 * 86400
    assert made["app_frequency_seconds"] == 4 * 3600
    listed = boss.sees("policies", "list")
    assert "gold-failback" in listed
    edited = boss.reads("policies", "edit", "gold", "--app-frequency", "off")
    assert (edited["app_frequency_seconds"], edited["retention_seconds"]) == (0, 3 * 86400)
    assert "off" in boss.sees("policies", "show", "gold")
    assert "up to" in boss.is_told("policies", "edit", "gold", "--retention", "20d", code=9)
    assert "no duration" in boss.is_told("policies", "edit", "gold", "--retention", "x", code=2)
    assert "nothing is to be changed" in boss.is_told("policies", "edit", "gold", code=2)
    boss.is_told("policies", "create", "gold", code=11)
    assert complete_policy("go") == ["gold", "gold-failback"]
    assert boss.sees("policies", "delete", "gold") == "gold: deleted.\n"
    boss.is_told("policies", "show", "gold", code=10)


def test_health_components_and_events(guest: Person) -> None:
    told = guest.sees("health")
    assert told.startswith("CRITICAL\n")
    assert "CPU use is 97 %" in told
    assert "action" in told
    assert "ps-1 (process-server): critical" in guest.sees("health", "ps-1")
    assert guest.reads("health", "db-01")["health"]["state"] == "warning"
    guest.is_told("health", "nobody", code=10)
    for words, code in ((("ps-1",), 21), (("db-01", "--json"), 20), ((), 21)):
        assert guest.types("health", *words, "--exit-code")[0] == code
    listed = guest.sees("components")
    assert "97 %" in listed
    assert [one["name"] for one in guest.reads("components")] == ["applier-1", "ps-1", "vc-1"]
    (event,) = guest.reads("events", "--open", "--machine", "ps-1")
    assert (event["code"], event["source_id"]) == ("cpu-high", str(PROCESS_SERVER))
    assert "CPU use is 97 %" in guest.sees("events", "--severity", "critical", "--since", "1h")
    assert "There are no such events." in guest.sees("events", "--machine", "nobody")
    assert "give it more cores" in guest.sees("events", "--long", "--machine", "ps-1")


def test_events_are_followed(guest: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def sleep(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("appliance.cli.events.time.sleep", sleep)
    _, out, _ = guest.types("events", "--follow", "--machine", "ps-1")
    assert out.count("CPU use is 97 %") == 1, "told once, however often it is looked at"


def test_machines(guest: Person) -> None:
    (machine,) = guest.reads("machines")
    assert (machine["name"], machine["state"]) == ("db-01", "protected")
    listed = guest.sees("machines")
    assert "db-01" in listed
    assert "warning" in listed
    assert "RPO durable" in guest.sees("machines", "db-01")
    assert complete_machine("db") == ["db-01"]
    assert complete_machine("x") == []
    guest.is_told("machines", "nobody", code=10)


def test_completion_without_a_config_server_is_silent(person: Person) -> None:
    assert complete_machine("d") == []


def test_store_is_read_where_it_is_named(boss: Person, tmp_path: Path) -> None:
    assert "there is no store" in boss.is_told("machines", "--store", str(tmp_path), code=2)
    (tmp_path / "machines").mkdir()
    assert "holds no machine" in boss.sees("machines", "--store", str(tmp_path))


def test_conflict_is_one_line(boss: Person) -> None:
    boss.sees("policies", "create", "silver")
    assert "protected" in boss.is_told("protect", "db-01", "--policy", "silver", code=11)
    assert "not both" in boss.is_told(
        "protect", "db-01", "--policy", "silver", "--disk", "a", "--exclude", "b", code=2
    )


def test_jobs(guest: Person) -> None:
    listed = guest.sees("jobs", "--state", "failed")
    assert "no disk" in listed
    assert guest.reads("jobs", "0123456789abcdef")["state"] == "failed"
    code, _, err = guest.types("jobs", "0123456789abcdef", "--follow")
    assert code == 1
    assert "protect db-01: no disk" in err
    for job in ("fedcba9876543210", "zzz"):
        err = guest.is_told("jobs", job, code=10)
        assert f"there is no job {job}\nhint: `understudy jobs`" in err
    guest.is_told("jobs", "--state", "sleeping", code=9)


def test_a_node_is_shut_out_and_let_in_again(boss: Person) -> None:
    assert "ps-1" in boss.sees("certificates", "list")
    boss.is_told("certificates", "revoke", "nobody", code=10)
    revoked = boss.reads("certificates", "revoke", "applier-1")
    assert revoked["certificate"]["name"] == "applier-1"
    assert "applier-1" not in boss.sees("certificates", "list")
    assert "applier-1" in boss.sees("certificates", "list", "--all")
    boss.is_told("certificates", "allow", "nobody", code=10)
    told = boss.is_told("certificates", "allow", "ps-1", code=11)
    assert "certificates revoke" in told
    assert boss.reads("certificates", "allow", "applier-1")["name"] == "applier-1"
    assert "applier-1 may enrol" in boss.sees("certificates", "allow", "applier-1")
    assert boss.reads("audit", "-n", "1")[0]["action"] == "certificate.allow"


def test_audit_tells_who_did_what(boss: Person) -> None:
    boss.sees("policies", "create", "audited")
    boss.sees("policies", "delete", "audited")
    newest = boss.reads("audit", "-n", "2")
    assert [(one["who"], one["action"], one["outcome"]) for one in newest] == [
        ("boss", "policy.create", "done"),
        ("boss", "policy.delete", "done"),
    ]
    assert "policy.delete" in boss.sees("audit")


def test_secrets_are_no_arguments(boss: Person) -> None:
    for words in (("login", "--help"), ("vcenters", "add", "--help")):
        options = boss.sees(*words)
        assert "--token " not in options
        assert "--password " not in options
    told = boss.is_told("vcenters", "add", "x", "https://x", "--username", "u", code=2)
    assert "--password-stdin" in told


def test_without_sign_in_a_store_answers_and_is_named(
    person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "store")
    monkeypatch.setattr("appliance.cli.store_choice.STORES_LOOKED_FOR", (store,))
    for words in (("machines",), ("points", "db-01")):
        err = person.is_told(*words, code=2)
        assert "not signed in" in err
        assert "`understudy login URL`" in err
        assert "--store DIR" in err
    (tmp_path / "store" / "machines").mkdir(parents=True)
    code, out, err = person.types("machines")
    assert (code, "holds no machine" in out) == (0, True)
    assert err == f"not signed in: from the store in {store}\n"
    assert person.types("machines", "--store", store)[2] == ""


def test_a_file_that_is_not_there_is_named_once(person: Person) -> None:
    err = person.is_told("login", "https://localhost:1", "--token-file", "/nowhere", code=2)
    assert err == "error: cannot read the token from /nowhere: No such file or directory\n"


def test_the_version(person: Person) -> None:
    assert person.sees("--version").startswith("understudy 0.")


def test_following_outlasts_a_restart_of_the_config_server(
    guest: Person, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.cli.jobs.POLL_SECONDS", 0.5)
    daemon.stop()
    late = threading.Thread(target=_after(0.5, daemon.start))
    late.start()
    try:
        code, _, err = guest.types("jobs", "0123456789abcdef", "--follow")
    finally:
        late.join()
    assert (code, "no disk" in err) == (1, True)


def _after(seconds: float, act: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        time.sleep(seconds)
        act()

    return run
