"""Seeds of random histories: some in every run of the tests, all of them in the long mode."""

from typing import Any

import pytest


def histories(always: int, soak: int) -> list[Any]:
    """Seeds 0 to ``soak``; those from ``always`` on belong to the long mode alone."""
    marked = [pytest.param(seed, marks=pytest.mark.soak) for seed in range(always, soak)]
    return [*range(always), *marked]
