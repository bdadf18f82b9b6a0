"""Values of webhooks' headers: sealed in the database, never shown, opened when they are sent.

A plan that was read and is written back says `HIDDEN` for what it was not shown: that keeps it.

Source: docs/RECOVERY.md §5.
"""

import base64
import uuid
from collections.abc import Callable
from typing import Protocol

from appliance.config_server.recovery.plans.document import (
    PlanAction,
    PlanDocument,
    PlanGroup,
    WebhookAction,
)
from replication.errors import InputError, IntegrityError

HIDDEN = "(hidden)"
SEALED_PREFIX = "sealed:"
TABLE = "plan headers"


class Vault(Protocol):
    """What seals and opens. ``identity.vault_key.VaultKey`` is one."""

    def seal(self, secret: bytes, table: str, row: uuid.UUID | str) -> bytes: ...

    def open(self, sealed: bytes, table: str, row: uuid.UUID | str) -> bytes: ...


_Place = tuple[str, str, str]
"""Names of the group and of the action, and whether it comes before or after."""


def seal_headers(vault: Vault, document: PlanDocument, old: PlanDocument | None) -> PlanDocument:
    """As it is to be stored. Raises InputError for a hidden value that ``old`` does not have.

    old: the plan as it was stored, or the one that this is a copy of.
    """
    known = {} if old is None else _values(old)

    def seal(action: WebhookAction, place: _Place, where: str, name: str, value: str) -> str:
        if value == HIDDEN:
            # Bound to place and address as well: else another webhook, or a new URL, would be
            # sent an old secret.
            kept = known.get((*place, action.url, name.lower()))
            if kept is None:
                raise InputError(
                    f"{where}: the value of the header {name} is {HIDDEN}",
                    hint="give its value: it is not kept for this address",
                )
            return kept
        sealed = vault.seal(value.encode(), TABLE, name.lower())
        return SEALED_PREFIX + base64.b64encode(sealed).decode()

    return _rewritten(document, seal)


def hide_headers(document: PlanDocument) -> PlanDocument:
    """As it is shown."""
    return _rewritten(document, lambda *_: HIDDEN)


def open_header(vault: Vault, name: str, value: str) -> str:
    """What is sent. Raises IntegrityError when it was sealed for another header or vault."""
    try:
        sealed = base64.b64decode(value.removeprefix(SEALED_PREFIX), validate=True)
    except ValueError as error:
        raise IntegrityError(f"the value of the header {name} is damaged") from error
    return vault.open(sealed, TABLE, name.lower()).decode()


def _values(document: PlanDocument) -> dict[tuple[str, ...], str]:
    """Sealed values by place, address and header; those that two webhooks have alike are none's."""
    found: dict[tuple[str, ...], str] = {}
    alike = set()
    for group in document.groups:
        for place in ("before", "after"):
            for action in getattr(group, place):
                if action.webhook is None:
                    continue
                for name, value in action.webhook.headers.items():
                    key = (group.name, place, action.name, action.webhook.url, name.lower())
                    if key in found:
                        alike.add(key)
                    found[key] = value
    return {key: value for key, value in found.items() if key not in alike}


def _rewritten(
    document: PlanDocument, value_of: Callable[[WebhookAction, _Place, str, str, str], str]
) -> PlanDocument:
    def action(one: PlanAction, place: _Place, where: str) -> PlanAction:
        if one.webhook is None or not one.webhook.headers:
            return one
        headers = {
            name: value_of(one.webhook, place, where, name, value)
            for name, value in one.webhook.headers.items()
        }
        webhook = one.webhook.model_copy(update={"headers": headers})
        return one.model_copy(update={"webhook": webhook})

    def group(one: PlanGroup, index: int) -> PlanGroup:
        lists = {
            place: tuple(
                action(each, (one.name, place, each.name), f"groups.{index}.{place}.{position}")
                for position, each in enumerate(getattr(one, place))
            )
            for place in ("before", "after")
        }
        return one.model_copy(update=lists)

    groups = tuple(group(each, index) for index, each in enumerate(document.groups))
    return document.model_copy(update={"groups": groups})
