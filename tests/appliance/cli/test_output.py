"""Tables for people: what comes from a machine that others may own is shown, never obeyed."""

import pytest

from appliance.cli.output import Column, print_rows

HOSTILE = (
    ("ended: [/var/lib] is not there", "ended: [/var/lib] is not there"),
    ("[link=http://example]look[/link]", "[link=http://example]look[/link]"),
    ("\x1b[2J\x1b]0;title\x07\nroot@host:~#", "?[2J?]0;title??root@host:~#"),
    ("\u202edesrever", "?desrever"),
)


@pytest.mark.parametrize(("given", "shown"), HOSTILE)
def test_cell_is_plain_text(given: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"note": given}], (Column("note", "note"),), as_json=False, none="")
    assert capsys.readouterr().out.splitlines()[1].rstrip() == shown


def test_message_for_no_rows_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([], (Column("note", "note"),), as_json=False, none="[/x] \x1b has none")
    assert capsys.readouterr().out == "[/x] ? has none\n"
