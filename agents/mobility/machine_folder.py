"""The folder of a machine's state: one agent's at a time, and emptied when protection ends."""

import contextlib
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence

from agents.mobility.app_scripts import DUE_FILE, ScriptReport, is_post_due, run_post_if_due
from agents.mobility.tracker.pins import remove_machine
from daemon.durable import make_folder, storage_error, sync_folder
from daemon.folder_lock import FolderLock
from replication.errors import ConfigError

LOCK_FILE = "agent.lock"
STATE_FILE = "stream.state"
_KEPT = (LOCK_FILE, DUE_FILE)


def machine_folder(state_folder: str, machine: uuid.UUID) -> str:
    return os.path.join(state_folder, str(machine))


@contextlib.contextmanager
def hold(state_folder: str, machine: uuid.UUID) -> Iterator[None]:
    """Two agents that share a state and a tracker would lose each other's changes."""
    folder = machine_folder(state_folder, machine)
    make_folder(folder)
    runs = ConfigError(
        f"another agent of machine {machine} runs: {os.path.join(folder, LOCK_FILE)} is locked",
        hint="stop it, or give this one a machine id and a state folder of its own",
    )
    with FolderLock(folder, runs, name=LOCK_FILE), _only_one_on_this_host(machine):
        yield


@contextlib.contextmanager
def _only_one_on_this_host(machine: uuid.UUID) -> Iterator[None]:
    """Agents with state folders of their own still share the machine's tracker in the kernel.

    A name that the kernel keeps as long as the process lives. Source: unix(7), abstract sockets.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as held:
        try:
            held.bind(f"\0understudy-agent/{machine}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise storage_error("hold the name of", f"machine {machine}", error) from error
            raise ConfigError(
                f"another agent on this host tracks machine {machine}, with another state folder",
                hint="stop it, or give this one a machine id of its own",
            ) from error
        yield


def run_owed_scripts(
    state_folder: str, machine: uuid.UUID, post: Sequence[str], seconds_max: float
) -> ScriptReport | None:
    """Run the post scripts that a killed agent owes; None when none are, or an agent runs."""
    folder = machine_folder(state_folder, machine)
    if not is_post_due(folder):
        return None
    runs = ConfigError("an agent runs, and sees to its scripts by itself")
    try:
        with FolderLock(folder, runs, name=LOCK_FILE):
            return run_post_if_due(folder, post, seconds_max)
    except ConfigError as error:
        if error is runs:
            return None
        raise


def forget(state_folder: str, machine: uuid.UUID) -> None:
    """Protection has ended: stop tracking and remove what is known of the stream.

    Killed at any step it is done again from the start; nothing is left that could be mistaken for
    a stream which goes on: the trackers go first, then the position, then the rest.
    """
    remove_machine(machine)
    folder = machine_folder(state_folder, machine)
    try:
        names = sorted(os.listdir(folder), key=lambda name: name != STATE_FILE)
        for name in names:
            path = os.path.join(folder, name)
            if name in _KEPT:
                continue
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
            if name == STATE_FILE:
                sync_folder(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error("remove the stream's state in", folder, error) from error
