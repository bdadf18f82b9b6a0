"""The machine's watermark in the cache: put at each change, and again where it was forgotten.

What it says of ``applied`` is on stable storage before it is put. A cache that is away keeps
nobody from applying: what could not be put is put at the next chance.
"""

from appliance.applier.cache_account import CacheAccount
from replication.cache_layout import CONTROL_CONTAINER, watermark_name
from replication.errors import StorageError, UnavailableError
from replication.watermark import WATERMARK_BYTES_MAX, Watermark


class WatermarkBlob:
    """Puts one machine's watermark."""

    def __init__(self, account: CacheAccount) -> None:
        self._account = account
        self._said: Watermark | None = None
        self._put = False

    @property
    def is_put(self) -> bool:
        """Whether the cache has taken what was said last."""
        return self._put

    async def say(self, watermark: Watermark) -> bool:
        """Put ``watermark`` unless it is what was put last; False when the cache is away."""
        if watermark == self._said and self._put:
            return True
        self._said = watermark
        return await self._write()

    async def say_again(self) -> bool:
        """Put it anew, so that who watches the blob sees that it is still meant."""
        return await self._write()

    async def refresh(self) -> None:
        """Put it again if the cache has something else, or nothing.

        Raises UnavailableError or StorageError.
        """
        if self._said is None:
            return
        name = watermark_name(self._said.machine)
        found = await self._account.read(CONTROL_CONTAINER, name, WATERMARK_BYTES_MAX)
        if found != self._said.to_bytes():
            await self._write()

    async def _write(self) -> bool:
        assert self._said is not None
        name = watermark_name(self._said.machine)
        try:
            await self._account.write(CONTROL_CONTAINER, name, self._said.to_bytes())
        except (UnavailableError, StorageError):
            self._put = False
        else:
            self._put = True
        return self._put
