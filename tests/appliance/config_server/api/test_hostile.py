"""Requests that nobody means well with: each is refused in the API's shape, none is a defect."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from appliance.config_server.api.app import OPENAPI_PATH, create_app
from appliance.config_server.api.router import PREFIX
from replication.control.role import OperatorRole
from tests.appliance.config_server.running import open_rig

JSON = "application/json"
BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", JSON),
    "no JSON": (b"{", JSON),
    "not UTF-8": (b'{"name": "\xff\xfe"}', JSON),
    "nested without end": (b"[" * 500_000, JSON),
    "objects nested without end": (b'{"a":' * 100_000, JSON),
    "a number of many digits": (
        b'{"name": "a", "role": "reader", "days": 1' + b"0" * 10_000 + b"}",
        JSON,
    ),
    "infinity": (b'{"name": "a", "role": "reader", "days": Infinity}', JSON),
    "a lone surrogate": (b'{"name": "\\ud800", "role": "reader"}', JSON),
    "a NUL": (b'{"name": "a\\u0000b", "role": "reader"}', JSON),
    "a list": (b"[]", JSON),
    "null": (b"null", JSON),
    "an unknown key": (b'{"name": "a", "role": "reader", "admin": true}', JSON),
    "a name as long as a novel": (b'{"name": "' + b"a" * 900_000 + b'", "role": "reader"}', JSON),
    "a form": (b"name=a&role=reader", "application/x-www-form-urlencoded"),
    "XML": (b"<a/>", "application/xml"),
    "no type": (b'{"name": "a", "role": "reader"}', ""),
    "an odd type": (b'{"name": "a", "role": "reader"}', "\xff/json"),
    "many files": (b"--x\r\n" * 1000, "multipart/form-data; boundary=x"),
}


async def test_no_body_is_a_defect(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        operator = rig.operator()
        for name, (body, kind) in BODIES.items():
            headers = {b"content-type": kind.encode("latin-1")} if kind else {}
            told = await operator.post("tokens", content=body, headers=headers)
            assert told.status_code in (400, 422), (name, told.status_code, told.text[:300])
            assert set(told.json()) == {"code", "message", "hint", "details"}, name
            assert len(told.text) < 5000, name  # nothing that large is played back
        assert len((await operator.get("tokens")).json()["items"]) == len(OperatorRole)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("nothing", 404),
        ("tokens/", 404),
        ("tokens//x", 404),
        ("../../etc/passwd", 404),
        ("tokens/%2e%2e%2f", 405),
        ("tokens/%00", 405),
        ("%ff", 404),
        ("x" * 8000, 404),
    ],
)
async def test_odd_paths_are_refused_in_one_shape(tmp_path: Path, path: str, status: int) -> None:
    async with open_rig(tmp_path) as rig:
        told = await rig.operator().get(path)
        assert told.status_code in (status, 404), told.text
        assert set(told.json()) == {"code", "message", "hint", "details"}


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "HEAD", "BREW"])
async def test_other_methods_are_not_allowed(tmp_path: Path, method: str) -> None:
    async with open_rig(tmp_path) as rig:
        told = await rig.operator().request(method, "tokens")
        assert told.status_code == 405
        assert told.headers["allow"]


async def test_a_defect_is_told_as_one_and_logged_whole(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:

        def broken() -> dict[str, object]:
            raise RuntimeError("the secret reason")

        rig.app.openapi = broken  # type: ignore[method-assign]
        with capture_logs() as logs:
            told = await rig.client().get("openapi.json")
        assert (told.status_code, told.json()["code"]) == (500, "defect")
        assert "secret" not in told.text
        assert any("exc_info" in line and line["path"] == OPENAPI_PATH for line in logs)
        assert (await rig.client().get("healthz")).status_code == 200


async def test_the_documents_say_the_same_in_every_process(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        assert create_app(rig.server).openapi() == rig.app.openapi()
        paths = rig.app.openapi()["paths"]
        assert f"{PREFIX}/tokens" in paths
        assert all(path.startswith(f"{PREFIX}/") for path in paths)
