"""Headers of webhooks: sealed, hidden, kept, opened."""

import pytest

from appliance.config_server.identity.vault_key import VaultKey
from appliance.config_server.recovery.plans.document import PlanDocument, WebhookAction
from appliance.config_server.recovery.plans.secrets import (
    HIDDEN,
    hide_headers,
    open_header,
    seal_headers,
)
from appliance.config_server.recovery.plans.yaml_text import parse_plan
from replication.errors import InputError, IntegrityError
from tests.appliance.config_server.recovery.plans.shop import SHOP

VAULT = VaultKey.create()


def webhook(plan: PlanDocument) -> WebhookAction:
    found = plan.groups[1].after[1].webhook
    assert found is not None
    return found


def webhook_name(plan: PlanDocument) -> str:
    return plan.groups[1].after[1].name


def test_a_header_is_sealed_hidden_and_opened() -> None:
    stored = seal_headers(VAULT, parse_plan(SHOP), None)
    assert "let-me-in" not in stored.model_dump_json()
    shown = hide_headers(stored)
    assert webhook(shown).headers == {"Authorization": HIDDEN}
    kept = seal_headers(VAULT, shown, stored)
    assert kept == stored
    value = webhook(kept).headers["Authorization"]
    assert open_header(VAULT, "authorization", value) == "Bearer let-me-in"
    with pytest.raises(IntegrityError):
        open_header(VAULT, "X-Other", value)
    with pytest.raises(IntegrityError):
        open_header(VAULT, "Authorization", "sealed:…")


def test_a_hidden_header_goes_to_no_other_address() -> None:
    stored = seal_headers(VAULT, parse_plan(SHOP), None)
    shown = hide_headers(stored)
    moved = parse_plan(
        SHOP.replace("monitoring.example.net", "evil.example.org").replace(
            "Bearer let-me-in", HIDDEN
        )
    )
    with pytest.raises(InputError, match="header Authorization is \\(hidden\\)"):
        seal_headers(VAULT, moved, stored)
    with pytest.raises(InputError, match=r"groups\.1\.after\.1"):
        seal_headers(VAULT, shown, None)


def test_a_hidden_header_goes_to_no_other_webhook_of_the_same_address() -> None:
    stored = seal_headers(VAULT, parse_plan(SHOP), None)
    other = parse_plan(
        SHOP.replace("Bearer let-me-in", HIDDEN).replace(webhook_name(stored), "another webhook")
    )
    with pytest.raises(InputError, match="header Authorization is \\(hidden\\)"):
        seal_headers(VAULT, other, stored)
