"""Who types commands, in this process."""

import io
import json
import sys
from typing import Any

import pytest

from appliance.cli.__main__ import main


class Person:
    """Who types commands; ``environ`` is theirs alone."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def types(self, *words: str, stdin: str = "") -> tuple[int, str, str]:
        """A command's exit code, what it prints, and what it says on standard error."""
        self._monkeypatch.setattr(sys, "argv", ["understudy", *words])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        try:
            code = main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        told = self._capsys.readouterr()
        return code, told.out, told.err

    def sees(self, *words: str, stdin: str = "") -> str:
        code, out, err = self.types(*words, stdin=stdin)
        assert code == 0, err
        return out

    def reads(self, *words: str) -> Any:
        return json.loads(self.sees(*words, "--json"))

    def is_told(self, *words: str, code: int) -> str:
        found, out, err = self.types(*words)
        assert (found, out) == (code, "")
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 2, "one line, and a hint"
        return err
