"""An action that was under way when the config server ended is done again, and is told so."""

import asyncio
import json
from pathlib import Path

from appliance.config_server.recovery.requests import begin_run
from appliance.config_server.recovery.run import (
    ActionKind,
    FailoverKind,
    RunAction,
    RunGroup,
    RunMachine,
    RunPlan,
)
from tests.appliance.config_server.protection.stage import MACHINE, WAIT_SECONDS
from tests.appliance.config_server.recovery.actions.orders import runner, write_program
from tests.appliance.config_server.recovery.stage import open_recovery


async def test_a_script_is_run_again_with_its_attempt_counted_up(tmp_path: Path) -> None:
    """The first attempt never ends; the second one finds what the first one began."""
    noted = tmp_path / "noted"
    write_program(
        tmp_path / "scripts",
        "switch",
        f"#!/bin/sh\ncat >> {noted}\n[ $(wc -l < {noted}) -gt 1 ] || exec sleep 3600\n",
    )
    action = RunAction(name="switch", kind=ActionKind.SCRIPT, spec={"command": "switch"})
    plan = RunPlan(
        plan="shop", groups=(RunGroup(machines=(RunMachine(id=MACHINE),), before=(action,)),)
    )
    async with open_recovery(tmp_path, runner=runner(tmp_path)) as stage:
        await stage.protected()
        async with stage.asking() as asking:
            job = await begin_run(asking, FailoverKind.TEST, plan)
        await stage.protection.begin(job.id)
        async with asyncio.timeout(WAIT_SECONDS):
            while not noted.exists() or not noted.read_text().endswith("\n"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    async with open_recovery(tmp_path, runner=runner(tmp_path)) as stage:
        assert (await stage.ended(job.id)).state == "succeeded"
    told = [json.loads(line) for line in noted.read_text().splitlines()]
    assert [each["Attempt"] for each in told] == [1, 2]
    assert told[0]["RunId"] == told[1]["RunId"]
