"""Seals and opens frames and manifests: zstd, AES-256-GCM, keys by HKDF-SHA256.

Invariant: no (key, nonce) pair is used twice. A key is derived for one *attempt* at one changeset
(its salt is 128 random bits, new whenever an agent starts the changeset anew), and the sealer
of an attempt hands out frame numbers itself, each once. Only agent and applier hold data keys.

Source: FORMAT.md §5; RFC 5869 (HKDF); NIST SP 800-38D (GCM).
"""

import os
import struct
import threading
import uuid
from collections.abc import Sequence

import xxhash
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replication.bookmark import Stamp
from replication.errors import ConfigError, IntegrityError, PeerError
from replication.extent import Extent
from replication.frame import (
    ATTEMPT_BYTES,
    DIGEST_BYTES,
    FRAME_NUMBER_MAX,
    PLAIN_BYTES_MAX,
    Codec,
    Frame,
    FrameHeader,
)

DATA_KEY_BYTES = 32
ZSTD_LEVEL_DEFAULT = 1

_INFO = struct.Struct("<21s16sIQ")
_LABEL = b"understudy attempt v1"
_NONCE = struct.Struct("<B7xI")
_FRAME_DOMAIN = 1
_MANIFEST_DOMAIN = 2
assert _NONCE.size == 12
assert len(_LABEL) == 21


def new_attempt() -> bytes:
    """The salt of a new attempt at a changeset."""
    return os.urandom(ATTEMPT_BYTES)


def new_salt() -> bytes:
    """The salt of a key that seals once."""
    return os.urandom(ATTEMPT_BYTES)


class AttemptKey:
    """The key of one attempt at one changeset of one machine."""

    def __init__(self, data_key: bytes, machine: uuid.UUID, stamp: Stamp, attempt: bytes) -> None:
        if len(data_key) != DATA_KEY_BYTES:
            raise ConfigError(f"a data key has {len(data_key)} bytes, not {DATA_KEY_BYTES}")
        assert len(attempt) == ATTEMPT_BYTES
        info = _INFO.pack(_LABEL, machine.bytes, stamp.generation, stamp.number)
        subkey = HKDF(SHA256(), length=32, salt=attempt, info=info).derive(data_key)
        self.machine = machine
        self.stamp = stamp
        self.attempt = attempt
        self._aead = AESGCM(subkey)

    def open_frame(self, frame: Frame) -> bytes:
        """The data of a frame's data extents, in order.

        Raises IntegrityError when the frame is not of this attempt, was altered, or does not
        unpack to exactly the declared bytes. Memory is bounded by the declared length.
        """
        header = frame.header
        mine = (self.machine, self.stamp, self.attempt)
        if (header.machine, header.stamp, header.attempt) != mine:
            raise IntegrityError(f"{_name(header)} belongs to another changeset or attempt")
        nonce = _NONCE.pack(_FRAME_DOMAIN, header.number)
        try:
            payload = self._aead.decrypt(nonce, frame.sealed, frame.associated)
        except InvalidTag as error:
            raise IntegrityError(f"{_name(header)} was altered: its tag does not match") from error
        digest, packed = payload[:DIGEST_BYTES], payload[DIGEST_BYTES:]
        data = packed if header.codec == Codec.RAW else _unpack(packed, header)
        if len(data) != header.plain_bytes or xxhash.xxh3_128_digest(data) != digest:
            raise IntegrityError(f"{_name(header)} does not unpack to what was packed")
        return data

    def open_manifest(self, associated: bytes, sealed: bytes) -> bytes:
        """The sealed part of a manifest; authenticates the public part (``associated``) too."""
        try:
            return self._aead.decrypt(_NONCE.pack(_MANIFEST_DOMAIN, 0), sealed, associated)
        except InvalidTag as error:
            raise IntegrityError(f"the manifest of {self.stamp} was altered") from error


class AttemptSealer(AttemptKey):
    """The writing end of an attempt: numbers and seals its frames, and its manifest once.

    May be used by several threads; frame numbers are given in the order of the calls to
    ``next_number``.
    """

    def __init__(
        self,
        data_key: bytes,
        machine: uuid.UUID,
        stamp: Stamp,
        *,
        level: int = ZSTD_LEVEL_DEFAULT,
    ) -> None:
        super().__init__(data_key, machine, stamp, new_attempt())
        self._level = level
        self._lock = threading.Lock()
        self._unused: set[int] = set()
        self._next = 0
        self._closed = False
        self._local = threading.local()

    @property
    def frame_count(self) -> int:
        """How many frame numbers were handed out."""
        return self._next

    def next_number(self) -> int:
        """Reserve the next frame number; it can seal one frame."""
        with self._lock:
            assert self._next <= FRAME_NUMBER_MAX
            number = self._next
            self._next += 1
            self._unused.add(number)
            return number

    def seal_frame(
        self, number: int, disk: int, extents: Sequence[Extent], data: bytes | memoryview
    ) -> bytes:
        """A whole frame as it travels; ``number`` came from ``next_number`` and is used up."""
        self._use(number)
        codec, packed = Codec.RAW, data
        if len(data):
            squeezed = self._compressor().compress(data)
            if len(squeezed) < len(data):
                codec, packed = Codec.ZSTD, squeezed
        header = FrameHeader(
            machine=self.machine,
            stamp=self.stamp,
            attempt=self.attempt,
            number=number,
            disk=disk,
            codec=codec,
            extents=tuple(extents),
            plain_bytes=len(data),
            sealed_bytes=DIGEST_BYTES + len(packed),
        )
        associated = header.to_bytes()
        payload = b"".join((xxhash.xxh3_128_digest(data), packed))
        sealed = self._aead.encrypt(_NONCE.pack(_FRAME_DOMAIN, number), payload, associated)
        return b"".join((associated, sealed))

    def seal_manifest(self, associated: bytes, secret: bytes) -> bytes:
        """Ciphertext and tag of a manifest's sealed part; may be called once."""
        with self._lock:
            assert not self._closed, "a manifest is sealed once an attempt"
            self._closed = True
        return self._aead.encrypt(_NONCE.pack(_MANIFEST_DOMAIN, 0), secret, associated)

    def _use(self, number: int) -> None:
        with self._lock:
            assert number in self._unused, "a frame number seals one frame"
            self._unused.remove(number)

    def _compressor(self) -> zstandard.ZstdCompressor:
        found: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if found is None:
            found = zstandard.ZstdCompressor(level=self._level)
            self._local.compressor = found
        return found


def _unpack(packed: bytes, header: FrameHeader) -> bytes:
    try:
        if zstandard.frame_content_size(packed) != header.plain_bytes:
            raise PeerError(f"{_name(header)} unpacks to another size than it declares")
        # Else a frame could ask for a window of 128 MiB to unpack its one.
        return zstandard.ZstdDecompressor(max_window_size=PLAIN_BYTES_MAX).decompress(
            packed, max_output_size=header.plain_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{_name(header)} does not unpack: {error}") from error


def _name(header: FrameHeader) -> str:
    return f"frame {header.number} of changeset {header.stamp} of {header.machine}"
