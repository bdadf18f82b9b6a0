"""Which store, machine and point a command is about."""

import os
import uuid
from typing import Annotated

import typer

from appliance.applier.store import ReaderStore, machines_in, open_reader
from replication.errors import ConfigError

STORE_VARIABLE = "UNDERSTUDY_STORE"
STORES_LOOKED_FOR = ("/var/lib/understudy/store", "/var/lib/understudy-lab/store")

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar=STORE_VARIABLE,
        metavar="DIR",
        help="The applier's store; the first of "
        + " and ".join(STORES_LOOKED_FOR)
        + " that is there, if not given.",
    ),
]
Machine = Annotated[str, typer.Argument(metavar="MACHINE", help="A machine's name or id.")]


def find_store(store: str | None) -> str:
    """The folder of the store; ConfigError when there is none."""
    for folder in (store,) if store else STORES_LOOKED_FOR:
        if os.path.isdir(os.path.join(folder, "machines")):
            return folder
    raise ConfigError(
        f"there is no store in {store or ' or '.join(STORES_LOOKED_FOR)}",
        hint=f"name the applier's store with --store DIR or {STORE_VARIABLE}",
    )


def find_machine(store: str | None, wanted: str) -> ReaderStore:
    """The machine by name or id; ConfigError that lists what there is."""
    root = find_store(store)
    readers = [open_reader(root, machine) for machine in machines_in(root)]
    try:
        machine = uuid.UUID(wanted)
    except ValueError:
        machine = None
    found = [reader for reader in readers if reader.machine == machine or reader.name == wanted]
    if len(found) == 1:
        return found[0]
    names = ", ".join(sorted(reader.name or str(reader.machine) for reader in readers)) or "none"
    what = "more than one machine is" if found else "no machine is"
    raise ConfigError(f"{what} called {wanted!r}", hint=f"the store holds: {names}")
