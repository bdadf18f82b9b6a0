"""Every way in which a VM can be, against every way in which it should be."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from azure_emu.compute.step import STARTS_MAX, Process, Seen, Step, Wanted, next_step, state_of
from replication.control.recovery import VmPower, VmState


def every_seen() -> Iterator[Seen]:
    choices: dict[str, tuple[Any, ...]] = {
        field.name: (False, True) for field in dataclasses.fields(Seen)
    }
    choices |= {"process": tuple(Process), "starts": (0, STARTS_MAX)}
    for values in itertools.product(*choices.values()):
        yield Seen(**dict(zip(choices, values, strict=True)))


SEEN = list(every_seen())
WANTED = [
    Wanted(power, independent, removed)
    for power in VmPower
    for independent in (False, True)
    for removed in (False, True)
]


def test_every_pair_has_a_step_that_keeps_the_rules() -> None:
    for wanted in WANTED:
        for seen in SEEN:
            step = next_step(seen, wanted)
            told = (seen, wanted, step)
            running = seen.process is not Process.NONE
            if step is Step.START:
                assert not running, told  # never a second process
                assert seen.disks, told
                assert seen.guest_chosen, told
                assert seen.readable, told
                assert wanted.power is VmPower.ON, told
                assert not wanted.removed, told
                assert not seen.failed, told
                assert seen.starts < STARTS_MAX, told
            if step is Step.REMOVE:
                assert wanted.removed, told
            if wanted.removed:
                assert step in (Step.KILL, Step.REMOVE, Step.SEND_EVIDENCE), told
                assert (step is Step.KILL) is running, told  # before evidence, which takes its time
            if step is Step.MAKE_DISKS:
                assert not seen.disks, told
            if step is Step.MAKE_INDEPENDENT:
                assert not running, told  # two writers would spoil the disk
                assert wanted.independent, told
                assert not seen.independent, told
            if step is Step.STREAM:
                assert seen.process is Process.RUNNING, told
                assert wanted.independent, told
            if step in (Step.KILL, Step.SHUT_DOWN, Step.RESUME):
                assert running, told
            if step is Step.RESUME:
                assert seen.room, told
            if step is Step.FORGET_BOOT:
                assert not running, told
                assert wanted.power is not VmPower.ON, told
            if step is Step.GIVE_UP:
                assert not seen.answered or not running, told
            if step is Step.REST:
                assert not seen.evidence_due or not seen.disks, told


FREE = Wanted(VmPower.ON, independent=True)


def test_a_vm_comes_up_step_by_step() -> None:
    wanted = Wanted(VmPower.ON)
    none = Process.NONE
    seen = Seen(disks=False, guest_chosen=False, process=none)
    assert next_step(seen, wanted) is Step.MAKE_DISKS
    seen = dataclasses.replace(seen, disks=True)
    assert next_step(seen, wanted) is Step.CHOOSE_GUEST
    assert next_step(dataclasses.replace(seen, guest_chosen=True), wanted) is Step.START
    up = Seen(disks=True, guest_chosen=True, process=Process.RUNNING, started=True)
    assert next_step(up, wanted) is Step.READ_CONSOLE
    assert next_step(dataclasses.replace(up, overdue=True), wanted) is Step.GIVE_UP
    answered = dataclasses.replace(up, answered=True, evidence_due=True)
    assert next_step(answered, wanted) is Step.SEND_EVIDENCE
    assert next_step(dataclasses.replace(up, answered=True), wanted) is Step.REST
    assert next_step(dataclasses.replace(up, answered=True), FREE) is Step.STREAM
    assert next_step(dataclasses.replace(up, answered=True), Wanted(VmPower.OFF)) is Step.SHUT_DOWN


@pytest.mark.parametrize(
    ("process", "readable", "starts", "step"),
    [
        (Process.STUCK, True, 1, Step.KILL),
        (Process.NONE, False, 1, Step.AWAIT_SOURCE),
        (Process.NONE, True, 1, Step.START),
        (Process.NONE, True, STARTS_MAX, Step.GIVE_UP),
        (Process.HALTED, True, 1, Step.GIVE_UP),
    ],
)
def test_a_point_that_vanishes_is_a_power_failure(
    process: Process, readable: bool, starts: int, step: Step
) -> None:
    seen = Seen(
        disks=True,
        guest_chosen=True,
        process=process,
        started=True,
        readable=readable,
        starts=starts,
    )
    assert next_step(seen, Wanted(VmPower.ON)) is step


def test_a_full_disk_stops_the_vm_until_there_is_room() -> None:
    full = Seen(disks=True, guest_chosen=True, process=Process.FULL, started=True)
    assert next_step(dataclasses.replace(full, room=False), Wanted(VmPower.ON)) is Step.AWAIT_ROOM
    assert next_step(full, Wanted(VmPower.ON)) is Step.RESUME


def test_every_pair_has_a_state() -> None:
    for wanted in WANTED:
        for seen in SEEN:
            for passed in (False, True):
                state = state_of(seen, wanted, passed=passed)
                told = (seen, wanted, passed, state)
                if state is VmState.UP:
                    assert (seen.answered, passed) == (True, True), told
                    assert seen.process is Process.RUNNING, told
                if not seen.disks:
                    assert state in (VmState.PREPARING, VmState.FAILED), told
