from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import ConfigError
from vsphere_emu.image.apt_source import (
    KEYRING_DEFAULT,
    AptSource,
    find_source,
    parse_lines,
    parse_stanzas,
)

STANZAS = """\
# what the installer wrote
Types: deb deb-src
URIs: http://mirror.example/debian
 http://second.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/some.gpg

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: https://vendor.example/repo
Suites: stable
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 -----END PGP PUBLIC KEY BLOCK-----
"""


def test_stanzas_name_each_archive_and_suite() -> None:
    found = list(parse_stanzas(STANZAS))
    assert [(source.uri, source.suite) for source in found] == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://second.example/debian", "bookworm"),
        ("http://second.example/debian", "bookworm-updates"),
        ("https://vendor.example/repo", "stable"),
    ]
    assert found[0].components == ("main", "contrib")
    assert found[0].keyring == "/usr/share/keyrings/some.gpg"
    assert found[4].keyring == KEYRING_DEFAULT  # a key inside the stanza is no file


def test_lines_are_read_with_options_and_comments() -> None:
    text = """\
deb [arch=amd64 signed-by=/etc/apt/keyrings/x.gpg] http://a.example/debian bookworm main # here
deb-src http://a.example/debian bookworm main
# deb http://b.example/debian bookworm main
  deb http://c.example/debian   bookworm  main non-free
deb http://broken.example
"""
    assert list(parse_lines(text)) == [
        AptSource("http://a.example/debian", "bookworm", ("main",), "/etc/apt/keyrings/x.gpg"),
        AptSource("http://c.example/debian", "bookworm", ("main", "non-free")),
    ]


def test_first_archive_that_debootstrap_can_use_is_taken(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "deb cdrom:[Debian]/ bookworm main\ndeb http://a.example/debian bookworm contrib\n"
    )
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "a.sources").write_text(STANZAS)
    (parts / "b.list").write_text("deb http://late.example/debian bookworm main\n")
    (parts / "c.sources.save").write_text("Types: deb\n")
    assert find_source("bookworm", str(tmp_path)).uri == "http://mirror.example/debian"


def test_machine_that_knows_no_archive_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no archive of Debian bookworm") as caught:
        find_source("bookworm", str(tmp_path))
    assert caught.value.hint is not None
    assert "--mirror" in caught.value.hint


@given(st.text())
def test_any_text_is_read_without_failing(text: str) -> None:
    for source in (*parse_lines(text), *parse_stanzas(text)):
        assert source.suite
