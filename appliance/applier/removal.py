"""The end of a machine at the second site: its store goes, and what waits for it in the cache.

Nothing goes while a point is held or locked. A rename takes the store's folder away from its name;
from then on it is removed for whoever looks, and what is left of the files goes file by file. A
crash before the rename leaves the whole store, and whoever asked asks again; a crash after it
leaves a folder that the next start clears away.
"""

import contextlib
import datetime as dt
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Collection

import structlog

from appliance.applier.cache_account import CacheAccount
from appliance.applier.store.holds import read_holds
from appliance.applier.store.reader_store import machine_folder
from daemon.durable import storage_error, sync_folder
from daemon.folder_lock import FolderLock
from replication.cache_layout import lease_name, machine_prefix
from replication.errors import ConflictError, StorageError, UnavailableError

REMOVED_PREFIX = ".removed-"


def check_removable(root: str, machine: uuid.UUID, wanted: Collection[uuid.UUID] = ()) -> None:
    """Raise ConflictError while a point of the machine is locked, or held by one of ``wanted``."""
    now_ns = time.time_ns()
    holds = read_holds(machine_folder(root, machine))
    until_ns = max((held.until_ns for held in holds), default=0)
    if until_ns > now_ns:
        until = dt.datetime.fromtimestamp(until_ns / 1e9, dt.UTC)
        raise ConflictError(
            f"the points of machine {machine} stay: one is locked until {until:%Y-%m-%dT%H:%M:%SZ}",
            hint="they are removed when the lock is over",
        )
    if any(held.id in wanted for held in holds):
        raise ConflictError(
            f"the points of machine {machine} stay: one is held",
            hint="they are removed when nothing that was made from it needs it any more",
        )


def remove_store(root: str, machine: uuid.UUID, wanted: Collection[uuid.UUID] = ()) -> None:
    """Remove all of a machine's store, durably; fine if there is none.

    Raises ConflictError as `check_removable` does, UnavailableError while another process has it
    open, StorageError.
    """
    folder = machine_folder(root, machine)
    machines = os.path.dirname(folder)
    if os.path.isdir(folder):
        in_use = UnavailableError(
            f"the store of machine {machine} is in use by another applier: {folder}",
            hint="it is removed when that one ends",
        )
        with FolderLock(folder, in_use):
            check_removable(root, machine, wanted)
            try:
                gone = f"{REMOVED_PREFIX}{machine}-{secrets.token_hex(4)}"
                os.rename(folder, os.path.join(machines, gone))
                sync_folder(machines)
            except OSError as error:
                raise storage_error("remove", folder, error) from error
    finish_removals(root)


def finish_removals(root: str) -> None:
    """Clear away what removals that a crash interrupted have left. Raises StorageError."""
    machines = os.path.join(root, "machines")
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(machines)):
            if name.startswith(REMOVED_PREFIX):
                path = os.path.join(machines, name)
                try:
                    shutil.rmtree(path)
                    sync_folder(machines)
                except OSError as error:
                    raise storage_error("remove", path, error) from error


async def drop_cached(account: CacheAccount, machine: uuid.UUID, owner: uuid.UUID) -> None:
    """Drop what waits for a machine in the cache, unless another applier has the machine now.

    What the account does not let go stays: it costs room there and nothing else.
    """
    lease = lease_name(machine)
    try:
        if await account.hold(lease, owner):
            for name in await account.containers(machine_prefix(machine)):
                await account.drop(name)
            await account.release(lease, owner)
    except (UnavailableError, StorageError) as error:
        structlog.get_logger().warning(
            "changesets of a removed machine stay in the cache",
            machine=str(machine),
            reason=str(error),
        )
