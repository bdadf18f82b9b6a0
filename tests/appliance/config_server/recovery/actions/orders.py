"""Orders as a run gives them, and a runner with folders of its own."""

import os
import uuid
from pathlib import Path
from typing import Any

from appliance.config_server.identity.vault_key import VaultKey
from appliance.config_server.recovery.actions.runner import ActionRunner
from appliance.config_server.recovery.config import RecoveryConfig
from appliance.config_server.recovery.ports import ActedVm, ActionOrder
from appliance.config_server.recovery.run import ActionKind, ActionPlace, FailoverKind

VAULT = VaultKey.create()
VM = uuid.UUID(int=5)
MACHINE = uuid.UUID(int=6)
RUN = uuid.UUID(int=7)


def order(kind: ActionKind, spec: dict[str, Any], **changes: Any) -> ActionOrder:
    whole: dict[str, Any] = {
        "id": uuid.UUID(int=1),
        "name": "an action",
        "kind": kind,
        "spec": spec,
        "seconds_max": 20,
        "attempt": 1,
        "run": RUN,
        "plan": "shop",
        "failover": FailoverKind.TEST,
        "group": 2,
        "place": ActionPlace.AFTER,
        "vms": (
            ActedVm(MACHINE, "db-1", 1, "up", VM, "10.0.0.5", "azure-1", "p1"),
            ActedVm(uuid.UUID(int=8), "web-1", 2, "starting"),
        ),
    }
    return ActionOrder(**{**whole, **changes})


def script(spec: dict[str, Any], **changes: Any) -> ActionOrder:
    return order(ActionKind.SCRIPT, spec, **changes)


def write_program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def runner(folder: Path, **config: Any) -> ActionRunner:
    """Programs below ``scripts``, keys below ``keys``."""
    for each in ("scripts", "keys"):
        os.makedirs(folder / each, mode=0o755, exist_ok=True)
    whole = {
        "scripts_folder": str(folder / "scripts"),
        "keys_folder": str(folder / "keys"),
        "allow_inline_scripts": True,
    }
    return ActionRunner(RecoveryConfig.model_validate({**whole, **config}), VAULT)
