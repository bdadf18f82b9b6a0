"""A machine's data key, as the config server gives it to those who may have it.

Source: docs/CONTROL.md §3; FORMAT.md (what it encrypts).
"""

import uuid
from typing import Annotated

from pydantic import Field

from replication.control.message import Message


class GivenDataKey(Message):
    """The answer to ``GET /api/v1/node/data-keys/{machine}``. ``data_key``: in hexadecimal."""

    machine: uuid.UUID
    data_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]

    def key(self) -> bytes:
        return bytes.fromhex(self.data_key)
