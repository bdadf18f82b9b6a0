"""What is done for failovers that no job is at work on, and what is kept how long."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.recovery import part
from appliance.config_server.recovery.follow_up import commit
from appliance.config_server.recovery.intake import take_evidence
from appliance.config_server.recovery.part import EVIDENCE_DAYS, prune_evidence
from appliance.config_server.recovery.requests import clean_up
from appliance.config_server.recovery.room import candidate
from appliance.config_server.recovery.run import FailoverKind
from appliance.config_server.recovery.workflows import steps_of_run
from appliance.config_server.store.recovery_tables import Failover, StoredEvidence
from appliance.config_server.store.schema import Certificate
from replication.control.recovery import VMS_MAX, EvidenceKind
from replication.control.report import ComputeReport, Load, Trouble
from replication.errors import ConflictError
from tests.appliance.config_server.protection.stage import GIB
from tests.appliance.config_server.recovery.killing import plan
from tests.appliance.config_server.recovery.stage import COMPUTE, RecoveryStage, open_recovery

DAY_NS = 86400 * 10**9
NOW_NS = 1000 * DAY_NS


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[RecoveryStage]:
    async with open_recovery(tmp_path) as opened:
        await opened.protected()
        yield opened


async def test_a_compute_node_that_is_out_has_no_vm_of_ours(stage: RecoveryStage) -> None:
    failover = await stage.failed_over(FailoverKind.TEST)
    stage.nodes.stubborn.add(COMPUTE)
    async with stage.asking() as asking:
        job = await clean_up(asking, failover.id)
    await stage.protection.begin(job.id)
    await stage.noted(job.id, 1)
    async with stage.database.writing() as session:
        revoked = update(Certificate).where(Certificate.node_id == COMPUTE).values(revoked_ns=1)
        await session.execute(revoked)
    assert (await stage.ended(job.id)).error is None
    await stage.nothing_is_left()


async def test_points_that_a_test_reads_from_are_not_deleted_by_a_commit(
    stage: RecoveryStage,
) -> None:
    await stage.failed_over(FailoverKind.TEST, "old")
    failover = await stage.failed_over(FailoverKind.UNPLANNED)
    with pytest.raises(ConflictError, match="needs its points"):
        async with stage.asking() as asking:
            await commit(asking, failover.id, delete_points=True)
    assert (await stage.machine()).job_id is None


async def test_evidence_is_kept_for_so_long_and_so_much_of_it(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    failover = await stage.failed_over(FailoverKind.TEST)
    assert failover.vm_id is not None
    async with stage.database.writing() as session:
        for at, kind in enumerate((EvidenceKind.CONSOLE, EvidenceKind.SCREENSHOT)):
            content = b"\x89PNG\r\n\x1a\n"
            await take_evidence(session, COMPUTE, failover.vm_id, kind, content, now_ns=at)
        assert await prune_evidence(session, stage.clock()) == 0
        row = await session.get_one(Failover, failover.id)
        row.ended_ns = stage.clock() - EVIDENCE_DAYS * DAY_NS - 1
        await session.flush()
        assert await prune_evidence(session, stage.clock()) == 2
        assert (await session.scalars(select(StoredEvidence))).all() == []
        row.ended_ns = None
        await take_evidence(session, COMPUTE, failover.vm_id, EvidenceKind.CONSOLE, b"x", now_ns=1)
        await session.flush()
        monkeypatch.setattr(part, "EVIDENCE_COUNT_MAX", 0)
        assert await prune_evidence(session, stage.clock()) == 1


def heard(memory_bytes: int = 8 * GIB, *troubles: Trouble, at_ns: int = NOW_NS) -> Heard:
    load = Load(memory_bytes=memory_bytes)
    return Heard(at_ns, ComputeReport(time_ns=at_ns, load=load, troubles=troubles))


@pytest.mark.parametrize(
    ("said", "taken", "why"),
    [
        (heard(), (0, 0), ""),
        (heard(), (0, 8 * GIB), "memory"),
        (heard(0), (0, 8 * GIB), ""),
        (heard(), (VMS_MAX, 0), f"can have {VMS_MAX}"),
        (heard(at_ns=NOW_NS - 61 * 10**9), (0, 0), "last heard of 61 s ago"),
        (
            heard(8 * GIB, Trouble(part="disk", severity="critical", reason="it is full")),
            (0, 0),
            "disk: it is full",
        ),
        (None, (0, 0), "never reported"),
    ],
)
def test_a_compute_node_is_told_apart_by_its_room(
    said: Heard | None, taken: tuple[int, int], why: str
) -> None:
    found = candidate(COMPUTE, "compute-1", said, taken, (1, GIB), is_live=True, now_ns=NOW_NS)
    assert bool(found.trouble) == bool(why)
    assert why in found.trouble
    out = candidate(COMPUTE, "compute-1", said, taken, (1, GIB), is_live=False, now_ns=NOW_NS)
    assert "certificate" in out.trouble


def test_the_steps_of_a_run_follow_from_what_it_is() -> None:
    alone = plan().model_copy(update={"plan": ""})
    assert steps_of_run(FailoverKind.PLANNED, alone) == (
        "final changeset",
        "shut down",
        "hold the points",
        "make the disks",
        "start",
        "check",
        "after 1: announce",
    )
    assert steps_of_run(FailoverKind.UNPLANNED, plan())[0] == "shut down"
    assert steps_of_run(FailoverKind.TEST, plan())[-1] == "group 1: after 1: announce"
