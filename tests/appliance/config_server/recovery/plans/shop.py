"""A plan with something of everything, and facts that it fits."""

import uuid
from typing import Any

from appliance.config_server.recovery.plans.document import PlanDocument
from appliance.config_server.recovery.plans.validation import MachineFacts

SHOP = """\
name: shop
description: |
  The shop: its database first.
  Then all that answers customers.
groups:
  - name: database
    machines:
      - machine: db-1
        guest: recovery
        script: |
          test -d /disk0
        memory_bytes: 1073741824
    before:
      - name: stop the queue
        script:
          command: stop-queue --now
          seconds_max: 60
        on_failure: continue
    after:
      - name: look at the database
        manual:
          instruction: Ask the administrator whether the database is sound.
  - name: web
    machines:
      - web-1
      - web-2
    after:
      - name: change the name service
        script:
          inline: |
            nsupdate < /etc/shop
          where:
            host: dns.example.net
            user: dr
            key_file: dns.key
      - name: tell the monitoring
        webhook:
          url: https://monitoring.example.net/hook
          headers:
            Authorization: Bearer let-me-in
"""
HOUR_NS = 3600 * 10**9
NOW_NS = 1_700_000_000 * 10**9


def document(tree: dict[str, Any] | None = None, **changes: Any) -> PlanDocument:
    """A plan of two machines in two groups, changed."""
    whole: dict[str, Any] = {
        "name": "small",
        "groups": [
            {"name": "one", "machines": [{"machine": "db-1"}]},
            {"name": "two", "machines": [{"machine": "web-1"}]},
        ],
    }
    return PlanDocument.model_validate({**whole, **(tree or {}), **changes})


def machine(name: str, **changes: Any) -> MachineFacts:
    """A machine that is well protected, changed."""
    whole: dict[str, Any] = {
        "id": uuid.uuid5(uuid.NAMESPACE_DNS, name),
        "name": name,
        "state": "protected",
        "protected": True,
        "newest_ns": NOW_NS,
        "newest_app_ns": NOW_NS - HOUR_NS,
    }
    return MachineFacts(**{**whole, **changes})
