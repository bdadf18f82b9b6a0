"""The keyring: made once, opened by its unlock file alone, bound to its database."""

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.config_server.identity.keyring import KEYRING_FILE, Keyring, open_keyring, reseal
from appliance.config_server.store.engine import Database, open_database
from replication.errors import ConfigError


def write_unlock(folder: Path, name: str = "unlock", content: str = "a passphrase of mine") -> str:
    path = folder / name
    path.touch(0o600)
    path.write_text(content)
    return str(path)


@contextlib.asynccontextmanager
async def database_in(folder: Path) -> AsyncIterator[Database]:
    async with open_database(f"sqlite+aiosqlite:///{folder}/state.db") as database:
        yield database


async def opened(folder: Path, unlock: str) -> Keyring:
    async with database_in(folder) as database:
        return await open_keyring(str(folder / "identity"), unlock, database)


async def test_it_is_made_once_and_opens_again(tmp_path: Path) -> None:
    unlock = write_unlock(tmp_path)
    first = await opened(tmp_path, unlock)
    path = tmp_path / "identity" / KEYRING_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == [KEYRING_FILE]
    assert b"PRIVATE KEY" not in path.read_bytes()
    content = path.read_bytes()
    assert (await opened(tmp_path, unlock)).fingerprint == first.fingerprint
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["other", "bit", "cut", "empty", "json"])
async def test_what_does_not_open_is_left_as_it_is(tmp_path: Path, damage: str) -> None:
    unlock = write_unlock(tmp_path)
    await opened(tmp_path, unlock)
    path = tmp_path / "identity" / KEYRING_FILE
    content = path.read_bytes()
    if damage == "other":
        unlock = write_unlock(tmp_path, "other", "another passphrase")
    changed = {
        "other": content,
        "bit": content.replace(b'"sealed": "', b'"sealed": "A', 1)[:-1],
        "cut": content[: len(content) // 2],
        "empty": b"",
        "json": b"{}",
    }[damage]
    path.write_bytes(changed)
    with pytest.raises(ConfigError, match="left as it is"):
        await opened(tmp_path, unlock)
    assert path.read_bytes() == changed


async def test_a_lost_keyring_is_not_replaced_by_a_new_one(tmp_path: Path) -> None:
    unlock = write_unlock(tmp_path)
    await opened(tmp_path, unlock)
    (tmp_path / "identity" / KEYRING_FILE).unlink()
    with pytest.raises(ConfigError, match="is missing") as caught:
        await opened(tmp_path, unlock)
    assert "backup" in str(caught.value.hint)
    assert os.listdir(tmp_path / "identity") == []


async def test_keyring_and_database_of_different_servers_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        await opened(folder, write_unlock(folder))
    os.replace(folders[1] / "identity" / KEYRING_FILE, folders[0] / "identity" / KEYRING_FILE)
    with pytest.raises(ConfigError, match="not of the same config server"):
        await opened(folders[0], str(folders[1] / "unlock"))


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        ("a passphrase of mine", 0o640, "can be read by others"),
        ("short", 0o600, "16 to 4096"),
        ("x" * 5000, 0o600, "16 to 4096"),
        (None, 0o600, "no unlock file"),
    ],
)
async def test_a_bad_unlock_file_is_told_and_nothing_is_made(
    tmp_path: Path, content: str | None, mode: int, told: str
) -> None:
    path = tmp_path / "unlock"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=told):
        await opened(tmp_path, str(path))
    assert not (tmp_path / "identity").exists()


async def test_resealed_it_opens_under_the_new_file_alone(tmp_path: Path) -> None:
    old, new = write_unlock(tmp_path), write_unlock(tmp_path, "new", "quite another passphrase")
    keyring = await opened(tmp_path, old)
    reseal(str(tmp_path / "identity"), old, new)
    with pytest.raises(ConfigError, match="does not open"):
        await opened(tmp_path, old)
    assert (await opened(tmp_path, new)).fingerprint == keyring.fingerprint


async def test_two_that_start_at_once_agree(tmp_path: Path) -> None:
    """A command and the daemon, on a host that never had a keyring."""
    unlock = write_unlock(tmp_path)
    async with database_in(tmp_path) as database:
        folder = str(tmp_path / "identity")
        keyrings = await asyncio.gather(*(open_keyring(folder, unlock, database) for _ in range(4)))
    assert len({keyring.fingerprint for keyring in keyrings}) == 1


def make_and_die(folder: Path, unlock: str, step: int) -> None:
    """Make a keyring; be killed at the given step of what touches its folder."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in _STEPS and "identity" in str(arguments[0]):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    asyncio.run(opened(folder, unlock))


_STEPS = {"open", "os.link", "os.remove", "os.mkdir", "os.rename"}


def test_killed_at_any_step_of_its_making_it_becomes_whole(tmp_path: Path) -> None:
    unlock = write_unlock(tmp_path)
    fork = multiprocessing.get_context("fork")
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        folder.mkdir()
        maker = fork.Process(target=make_and_die, args=(folder, unlock, step))
        maker.start()
        maker.join(60)
        ended = maker.exitcode == 0
        assert ended or maker.exitcode == -signal.SIGKILL
        keyring = asyncio.run(opened(folder, unlock))
        assert asyncio.run(opened(folder, unlock)).fingerprint == keyring.fingerprint
        if ended:
            break
    assert step > 6, "the steps of its making were seen"
