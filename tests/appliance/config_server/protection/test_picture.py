from pathlib import Path

from appliance.config_server.protection.picture import draw
from appliance.config_server.protection.table import State

PAGE = Path(__file__).parents[4] / "docs" / "PROTECTION.md"


def test_page_is_what_the_table_draws() -> None:
    assert PAGE.read_text() == draw(), (
        "run: python -m appliance.config_server.protection.picture docs/PROTECTION.md"
    )


def test_page_shows_every_state() -> None:
    assert all(f'state "{state}"' in draw() for state in State)
