import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from replication.errors import IntegrityError
from tests.vsphere_emu.conftest import MakeGuest
from vsphere_emu import block_device
from vsphere_emu.check import check_database
from vsphere_emu.guest import Guest
from vsphere_emu.workload.database import find_binaries, pgbench_invariant, shared_memory_of

MIB = 1 << 20


@pytest.fixture
def db(make_guest: MakeGuest) -> Guest:
    return make_guest(
        name="db-01",
        disks=[
            {"name": "data", "size_bytes": 512 * MIB, "file_system": "ext4"},
            {"name": "wal", "size_bytes": 512 * MIB, "file_system": "xfs"},
        ],
        workload={
            "kind": "pgbench",
            "data_disk": "data",
            "wal_disk": "wal",
            "scale": 1,
            "clients": 4,
        },
    )


def sockets(guest: Guest) -> str:
    folder = guest.socket_folder
    assert folder is not None
    return folder


def postmaster(guest: Guest) -> int:
    return int(Path(guest.folder, "data/postgresql/postmaster.pid").read_text().split("\n")[0])


def transactions(guest: Guest) -> int:
    try:
        return pgbench_invariant(sockets(guest)).transactions
    except IntegrityError:
        return -1  # it recovers; sums that differ would fail the checks that follow


def wait_for_transactions(guest: Guest, count: int) -> None:
    deadline = time.monotonic() + 60
    while transactions(guest) < count:
        assert time.monotonic() < deadline, Path(guest.log_path).read_text()[-3000:]
        time.sleep(0.1)


@contextlib.contextmanager
def frozen(*folders: str) -> Iterator[None]:
    for folder in folders:
        subprocess.run(["fsfreeze", "--freeze", folder], check=True)
    try:
        yield
    finally:
        for folder in folders:
            subprocess.run(["fsfreeze", "--unfreeze", folder], check=True)


def copy_disks(guest: Guest, folder: Path) -> list[str]:
    images = []
    for disk in guest.status().disks:
        images.append(str(folder / f"{disk.name}.img"))
        subprocess.run(["cp", "--sparse=always", disk.flat_path, images[-1]], check=True)
    return images


def test_copies_of_a_frozen_moment_recover_with_agreeing_sums(db: Guest, tmp_path: Path) -> None:
    db.power_on()
    db.start_workload()
    wait_for_transactions(db, 200)
    with frozen(f"{db.folder}/data", f"{db.folder}/wal"):
        images = copy_disks(db, tmp_path)
    before = Path(images[0]).stat().st_mtime_ns
    sums = check_database(images[0], images[1], str(tmp_path))
    assert sums.transactions >= 200
    assert db.status().workload_pid is not None, "the source is left running"
    assert Path(images[0]).stat().st_mtime_ns == before, "the image is only read"
    assert sorted(os.listdir(tmp_path)) == ["data.img", "root", "store", "wal.img"]

    os.truncate(images[1], 0)
    os.truncate(images[1], 512 * MIB)
    with pytest.raises(IntegrityError, match="no known file system"):
        check_database(images[0], images[1], str(tmp_path))


def test_database_without_its_log_does_not_pass(db: Guest, tmp_path: Path) -> None:
    """A data disk and a log disk of two moments: what the invariant is there to find."""
    db.power_on()
    db.start_workload()
    wait_for_transactions(db, 50)
    with frozen(f"{db.folder}/data", f"{db.folder}/wal"):
        images = copy_disks(db, tmp_path)
    device = block_device.attach(images[1])
    point = tmp_path / "point"
    point.mkdir()
    try:
        block_device.mount(device, str(point), "xfs", "rw,nouuid")
        for segment in point.glob("wal/0*"):
            os.truncate(segment, 8192)
            os.truncate(segment, 16 * MIB)
    finally:
        block_device.unmount_by_force(str(point))
        block_device.detach(images[1])
    with pytest.raises(IntegrityError, match=r"(?s)PostgreSQL does not recover.*checkpoint record"):
        check_database(images[0], images[1], str(tmp_path))


def test_killed_server_comes_back_and_balances_agree(db: Guest) -> None:
    db.power_on()
    db.start_workload()
    wait_for_transactions(db, 50)
    for _ in range(2):
        killed = postmaster(db)
        os.kill(killed, signal.SIGKILL)
        had = 0
        deadline = time.monotonic() + 60
        while had <= 0 or postmaster(db) == killed:
            assert time.monotonic() < deadline, Path(db.log_path).read_text()[-3000:]
            time.sleep(0.1)
            had = transactions(db)
        wait_for_transactions(db, had + 50)
    sums = pgbench_invariant(sockets(db))
    assert sums.transactions > 150
    assert db.status().workload_pid is not None


def test_database_goes_on_after_its_workload_is_killed_and_its_power_is_cut(db: Guest) -> None:
    db.power_on()
    pid = db.start_workload()
    assert pid is not None
    wait_for_transactions(db, 50)
    server = postmaster(db)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{server}/cwd"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    db.start_workload()
    had = transactions(db)
    assert had >= 50
    server = postmaster(db)
    (segment,) = shared_memory_of(f"{db.folder}/data")
    for name in ("data", "wal"):
        subprocess.run(["fsfreeze", "--freeze", f"{db.folder}/{name}"], check=True)
    db.cut_power()
    assert not os.path.exists(f"/proc/{server}/cwd")
    assert not os.path.exists(sockets(db))
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    assert segment not in [line.split()[1] for line in segments]
    db.power_on()
    db.start_workload()
    assert transactions(db) >= had
    db.power_off()


def test_workload_killed_while_it_makes_the_database_makes_it_anew(db: Guest) -> None:
    db.power_on()
    folder = Path(db.folder, "data")
    (folder / "postgresql.new").mkdir()
    (folder / "postgresql.new" / "half").write_text("made")
    Path(db.folder, "wal", "wal").mkdir()
    Path(db.folder, "wal", "wal", "stale").write_text("x")
    db.start_workload()
    wait_for_transactions(db, 10)
    assert not (folder / "postgresql.new").exists()
    assert (folder / "postgresql" / "pg_wal").is_symlink()


def test_remove_ends_a_server_whose_workload_is_gone(db: Guest) -> None:
    db.power_on()
    pid = db.start_workload()
    assert pid is not None
    wait_for_transactions(db, 10)
    db.stop_workload()
    folder = f"{db.folder}/data/postgresql"
    command = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]
    command += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search", "--"]
    # A socket of its own: whoever else runs a server here may have the one in /tmp.
    sockets = tempfile.mkdtemp(prefix="stray-")
    shutil.chown(sockets, "postgres")
    command += [f"{find_binaries()}/postgres", "-D", folder, "-c", "listen_addresses="]
    stray = subprocess.Popen([*command, "-k", sockets], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while not os.path.exists(f"{folder}/postmaster.pid"):
            assert stray.poll() is None, stray.stderr and stray.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        db.remove_all_traces(delete_disks=True)
        assert stray.wait(5) is not None
    finally:
        stray.kill()
        stray.wait()
        shutil.rmtree(sockets)
    assert not os.path.exists(db.folder)


def test_sums_that_differ_are_found(db: Guest) -> None:
    db.power_on()
    db.start_workload()
    wait_for_transactions(db, 10)
    sums = pgbench_invariant(sockets(db))
    assert replace(sums, accounts=sums.tellers) == sums
    update = "UPDATE pgbench_tellers SET tbalance = tbalance + 1 WHERE tid = 1"
    psql = [f"{find_binaries()}/psql", "-Xq", "-h", sockets(db), "-U", "postgres", "-c", update]
    subprocess.run(psql, check=True)
    with pytest.raises(IntegrityError, match="balances do not agree"):
        pgbench_invariant(sockets(db))
