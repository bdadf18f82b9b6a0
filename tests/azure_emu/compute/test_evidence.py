import uuid
from pathlib import Path

import pytest

from azure_emu.compute import evidence
from azure_emu.compute.evidence import (
    ATTEMPTS_MAX,
    CONSOLE_BYTES_MAX,
    SCREENSHOT,
    bound_console,
    read_end,
    send_evidence,
)
from azure_emu.compute.launch import CONSOLE
from replication.control.recovery import EVIDENCE_BYTES_MAX, EvidenceKind
from replication.errors import NotFoundError, UnavailableError

VM = uuid.uuid4()


class Keeper:
    """Takes evidence after it has refused it so many times."""

    def __init__(self, refusals: int = 0, error: type[Exception] = UnavailableError) -> None:
        self.calls = 0
        self.kept: dict[EvidenceKind, bytes] = {}
        self._refusals = refusals
        self._error = error

    async def __call__(self, vm: uuid.UUID, kind: EvidenceKind, content: bytes) -> None:
        assert vm == VM
        self.calls += 1
        if self.calls <= self._refusals:
            raise self._error("not now")
        self.kept[kind] = content


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "RETRY_SECONDS", 0.0)


async def test_of_a_long_console_the_end_is_sent_and_half_a_picture_never(tmp_path: Path) -> None:
    (tmp_path / CONSOLE).write_bytes(b"a" * EVIDENCE_BYTES_MAX + b"end")
    (tmp_path / SCREENSHOT).write_bytes(b"x" * (EVIDENCE_BYTES_MAX + 1))
    keeper = Keeper()
    await send_evidence(VM, str(tmp_path), keeper)
    assert list(keeper.kept) == [EvidenceKind.CONSOLE]
    assert len(keeper.kept[EvidenceKind.CONSOLE]) == EVIDENCE_BYTES_MAX
    assert keeper.kept[EvidenceKind.CONSOLE].endswith(b"aend")


async def test_what_is_not_there_is_not_sent(tmp_path: Path) -> None:
    keeper = Keeper()
    await send_evidence(VM, str(tmp_path), keeper)
    assert keeper.calls == 0


async def test_sending_is_tried_a_bounded_number_of_times(tmp_path: Path) -> None:
    (tmp_path / CONSOLE).write_bytes(b"boot")
    patient = Keeper(ATTEMPTS_MAX - 1)
    await send_evidence(VM, str(tmp_path), patient)
    assert patient.kept == {EvidenceKind.CONSOLE: b"boot"}
    away = Keeper(10**9)
    with pytest.raises(UnavailableError):
        await send_evidence(VM, str(tmp_path), away)
    assert away.calls == ATTEMPTS_MAX
    refusing = Keeper(10**9, NotFoundError)
    with pytest.raises(NotFoundError):
        await send_evidence(VM, str(tmp_path), refusing)
    assert refusing.calls == 1


def test_a_console_that_grows_without_end_is_cut_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / CONSOLE
    bound_console(str(path))  # fine while there is none
    with path.open("ab", buffering=0) as writer:
        writer.write(b"short")
        bound_console(str(path))
        assert path.read_bytes() == b"short"
        writer.write(b"x" * CONSOLE_BYTES_MAX + b"end")
        bound_console(str(path))
        assert path.stat().st_size == EVIDENCE_BYTES_MAX
        writer.write(b" and on")
    assert read_end(str(path), 10) == b"end and on"
