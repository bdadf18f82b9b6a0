"""A datastore: a folder of real VMDKs, each a descriptor and a sparse flat file.

A VMDK exists when its descriptor does: it is written last and deleted first, so that a crash
leaves at most a flat file that nothing names, which the next ``create`` takes over. The
descriptor is that of a disk on VMFS, as VMware's Virtual Disk Format 1.1 specifies it.
"""

import contextlib
import os
import re
import secrets
from dataclasses import dataclass

from daemon.durable import make_folder, storage_error, sync_folder, write_whole
from replication.errors import ConfigError, StorageError
from vsphere_emu.tool import run_tool

SECTOR_BYTES = 512
DESCRIPTOR_BYTES_MAX = 64 * 1024
HEADS, SECTORS_PER_TRACK = 255, 63

_PATH = re.compile(r"\[(?P<store>[^\]/]+)\] (?P<path>[^/\0][^\0]*\.vmdk)")
_EXTENT = re.compile(
    r'(?P<access>RW|RDONLY|NOACCESS) (?P<sectors>\d+) (?P<type>[A-Z]+) "(?P<name>[^"]+)"'
    r"(?: (?P<offset>\d+))?"
)
_ENTRY = re.compile(r'(?P<key>[A-Za-z0-9_.]+) ?= ?"?(?P<value>[^"]*)"?')


@dataclass(frozen=True, slots=True)
class Vmdk:
    """A virtual disk.

    datastore_path: as vSphere writes it: ``[datastore1] web-01/web-01.vmdk``.
    descriptor_path, flat_path: the two files.
    size_bytes: of the disk; a multiple of 512.
    """

    datastore_path: str
    descriptor_path: str
    flat_path: str
    size_bytes: int


class Datastore:
    """The VMDKs below one folder."""

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self.folder = os.path.abspath(folder)

    def create(self, datastore_path: str, size_bytes: int, image: str | None = None) -> Vmdk:
        """Make a sparse disk: empty, or a copy of ``image``, which may be shorter.

        Raises ConfigError for an image that is absent or longer than the disk, StorageError if the
        disk is there already.
        """
        assert size_bytes > 0
        assert size_bytes % SECTOR_BYTES == 0
        descriptor = self._file(datastore_path)
        flat = _flat_path(descriptor)
        if os.path.exists(descriptor):
            raise StorageError(f"{datastore_path} exists already")
        make_folder(os.path.dirname(descriptor))
        try:
            fd = os.open(flat, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                if image is not None:
                    _copy(image, flat, size_bytes)
                os.ftruncate(fd, size_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_error("create", flat, error) from error
        text = render_descriptor(os.path.basename(flat), size_bytes)
        write_whole(descriptor, text.encode())
        return Vmdk(datastore_path, descriptor, flat, size_bytes)

    def open(self, datastore_path: str) -> Vmdk:
        """Read a disk's descriptor. Raises StorageError when it is absent or malformed."""
        descriptor = self._file(datastore_path)
        try:
            with open(descriptor, "rb") as file:
                content = file.read(DESCRIPTOR_BYTES_MAX + 1)
        except OSError as error:
            raise storage_error("open", datastore_path, error) from error
        flat_name, size_bytes = parse_descriptor(content, datastore_path)
        flat = os.path.join(os.path.dirname(descriptor), flat_name)
        try:
            flat_bytes = os.stat(flat).st_size
        except OSError as error:
            raise storage_error(f"find the data of {datastore_path}:", flat, error) from error
        if flat_bytes != size_bytes:
            raise StorageError(
                f"{datastore_path} says {size_bytes} bytes, but {flat} has {flat_bytes}"
            )
        return Vmdk(datastore_path, descriptor, flat, size_bytes)

    def flat_path(self, datastore_path: str) -> str:
        """Where the data of a disk made here lies, also when its descriptor is gone."""
        return _flat_path(self._file(datastore_path))

    def exists(self, datastore_path: str) -> bool:
        """Whether the disk is there."""
        return os.path.exists(self._file(datastore_path))

    def list(self) -> tuple[str, ...]:
        """The datastore paths of all disks, sorted."""
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                if name.endswith(".vmdk") and not name.endswith("-flat.vmdk"):
                    path = os.path.relpath(os.path.join(folder, name), self.folder)
                    found.append(f"[{self.name}] {path}")
        return tuple(sorted(found))

    def delete(self, datastore_path: str) -> None:
        """Remove a disk and its folder if that is empty then; fine if it is gone."""
        descriptor = self._file(datastore_path)
        folder = os.path.dirname(descriptor)
        try:
            for path in (descriptor, _flat_path(descriptor)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                    sync_folder(folder)
            if folder != self.folder:
                with contextlib.suppress(OSError):  # others' files, or gone: both fine
                    os.rmdir(folder)
        except OSError as error:
            raise storage_error("delete", datastore_path, error) from error

    def _file(self, datastore_path: str) -> str:
        match = _PATH.fullmatch(datastore_path)
        if match is None:
            raise ConfigError(
                f"{datastore_path!r} is no datastore path",
                hint=f"it looks like [{self.name}] guest/disk.vmdk",
            )
        if match["store"] != self.name:
            raise ConfigError(f"{datastore_path}: the datastore here is [{self.name}]")
        parts = match["path"].split("/")
        if any(part in ("", ".", "..") for part in parts) or parts[-1].endswith("-flat.vmdk"):
            raise ConfigError(f"{datastore_path!r} does not name a disk below the datastore")
        return os.path.join(self.folder, *parts)


def render_descriptor(flat_name: str, size_bytes: int) -> str:
    """The descriptor of a disk whose data is in ``flat_name`` beside it."""
    sectors = size_bytes // SECTOR_BYTES
    uuid = secrets.token_hex(16)
    pairs = [uuid[i : i + 2] for i in range(0, 32, 2)]
    return f"""# Disk DescriptorFile
version=1
encoding="UTF-8"
CID={secrets.randbelow(0xFFFFFFFE):08x}
parentCID=ffffffff
createType="vmfs"

# Extent description
RW {sectors} VMFS "{flat_name}"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "{max(1, sectors // (HEADS * SECTORS_PER_TRACK))}"
ddb.geometry.heads = "{HEADS}"
ddb.geometry.sectors = "{SECTORS_PER_TRACK}"
ddb.thinProvisioned = "1"
ddb.uuid = "{" ".join(pairs[:8])}-{" ".join(pairs[8:])}"
ddb.virtualHWVersion = "14"
"""


def parse_descriptor(content: bytes, where: str) -> tuple[str, int]:
    """The flat file's name and the disk's size in bytes. Raises StorageError naming ``where``.

    Read are disks of one flat extent without a parent: what is neither sparse nor a snapshot.
    """

    def malformed(why: str) -> StorageError:
        return StorageError(
            f"{where} is not a VMDK descriptor that can be used: {why}",
            hint="expected is a flat disk: createType vmfs or monolithicFlat, one extent",
        )

    if len(content) > DESCRIPTOR_BYTES_MAX:
        raise malformed(f"it is longer than {DESCRIPTOR_BYTES_MAX} bytes")
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise malformed("it is not text") from error
    if not lines or lines[0].lower() != "# disk descriptorfile":
        raise malformed("its first line is not '# Disk DescriptorFile'")
    extents, entries = [], {}
    for line in lines:
        if extent := _EXTENT.fullmatch(line):
            extents.append(extent)
        elif entry := _ENTRY.fullmatch(line):
            entries[entry["key"]] = entry["value"]
        elif line and not line.startswith("#"):
            raise malformed(f"the line {line[:60]!r} means nothing")
    if entries.get("createType") not in ("vmfs", "monolithicFlat"):
        raise malformed(f"createType is {entries.get('createType', 'missing')}")
    if entries.get("parentCID", "ffffffff").lower() != "ffffffff":
        raise malformed("it has a parent, so it is a snapshot's delta")
    if len(extents) != 1:
        raise malformed(f"it has {len(extents)} extents")
    extent = extents[0]
    if extent["type"] not in ("VMFS", "FLAT") or int(extent["offset"] or 0) != 0:
        raise malformed(f"its extent is {extent[0]!r}")
    if "/" in extent["name"] or extent["name"] in (".", ".."):
        raise malformed(f"its data {extent['name']!r} is not beside it")
    if (size_bytes := int(extent["sectors"]) * SECTOR_BYTES) == 0:
        raise malformed("its size is 0")
    return extent["name"], size_bytes


def _copy(image: str, flat: str, size_bytes: int) -> None:
    """Give ``flat``, which is there and empty, the content of ``image``: sparse or shared."""
    try:
        image_bytes = os.stat(image).st_size
    except OSError as error:
        raise ConfigError(f"cannot read the image {image}: {error.strerror}") from error
    if image_bytes > size_bytes:
        raise ConfigError(
            f"the image {image} has {image_bytes} bytes, the disk only {size_bytes}",
            hint="correct size_bytes",
        )
    run_tool("cp", "--sparse=always", "--reflink=auto", "--no-preserve=all", image, flat)


def _flat_path(descriptor: str) -> str:
    return descriptor.removesuffix(".vmdk") + "-flat.vmdk"
