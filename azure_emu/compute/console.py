"""What a VM has written on its serial console: the recovery guest's result, a login prompt.

Anything may be on a console: a disk's content, messages of the kernel. The result counts only with
the nonce of this very boot, which nothing on the disks knows.
"""

import base64
import binascii
import json
import re
from typing import Any

from pydantic import ValidationError

from replication.control.recovery import (
    FILE_SYSTEMS_MAX,
    CheckedFileSystem,
    VmCheck,
)

RESULT_PREFIX = b"understudy-result "
RESULT_BYTES_MAX = 512 << 10
TEXT_CHARACTERS_MAX = 1900
_LOGIN = re.compile(rb"(?:^|\n)(?!Last )[^\r\n]{0,120}\blogin: ?(?:\r?\n|\[|$)")
"""A prompt, alone or with a message of the kernel or of systemd behind it."""

PROMPT_BYTES_MAX = 64 << 10
"""A prompt is looked for in so much of the console's end."""


def asks_for_login(console: bytes) -> bool:
    """Whether a getty waits; ``console``: the end of what was written."""
    return _LOGIN.search(console[-PROMPT_BYTES_MAX:]) is not None


def result_of(console: bytes, nonce: str) -> VmCheck | None:
    """The recovery guest's result; None while there is none of this boot.

    What is cut off, forged or no such document is passed over.
    """
    for line in console.splitlines(keepends=True):
        at = line.find(RESULT_PREFIX)
        if at < 0 or not line.endswith(b"\n") or len(line) > RESULT_BYTES_MAX:
            continue
        try:
            tree = json.loads(line[at + len(RESULT_PREFIX) :])
        except (ValueError, RecursionError):
            continue
        if isinstance(tree, dict) and nonce and tree.get("nonce") == nonce:
            try:
                return _check(tree)
            except (KeyError, TypeError, AttributeError, ValueError, ValidationError):
                continue
    return None


def _check(tree: dict[str, Any]) -> VmCheck:
    listed = tree["file_systems"]
    systems = tuple(
        CheckedFileSystem.model_validate({**each, "detail": _text(each.get("detail", ""))})
        for each in listed[:FILE_SYSTEMS_MAX]
    )
    script_exit = tree["script_exit"]
    if script_exit is not None and (isinstance(script_exit, bool) or not 0 <= script_exit < 256):
        raise ValueError("no exit code")
    unclean = [system for system in systems if not system.clean]
    if unclean:
        detail = "; ".join(
            f"{system.device} of disk {system.disk} ({system.kind}): {system.detail[-200:]}"
            for system in unclean
        )
    elif script_exit:
        detail = f"the script ended with exit code {script_exit}"
        if script_exit in _OUT_OF_TIME:
            detail = "the script did not end in time"
    elif not systems and script_exit is None:
        detail = "no disk holds a file system that can be mounted"
    else:
        count = len(systems)
        detail = "1 file system is clean" if count == 1 else f"{count} file systems are clean"
        detail += "" if script_exit is None else ", the script has passed"
        return VmCheck(
            passed=True,
            detail=detail,
            file_systems=systems,
            script_exit=script_exit,
            output=_text(tree["output"]),
        )
    return VmCheck(
        passed=False,
        detail=detail[:TEXT_CHARACTERS_MAX],
        file_systems=systems,
        script_exit=script_exit,
        output=_text(tree["output"]),
    )


_OUT_OF_TIME = (124, 143, 137)
"""Exit codes of a command that timeout(1) has ended."""


def _text(encoded: str) -> str:
    try:
        raw = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError("no base64") from error
    return raw.decode(errors="replace").replace("\0", "\\0").strip()[-TEXT_CHARACTERS_MAX:]
