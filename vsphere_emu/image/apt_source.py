"""Where this machine gets its Debian packages from, read from its own apt configuration."""

import glob
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from replication.errors import ConfigError

KEYRING_DEFAULT = "/usr/share/keyrings/debian-archive-keyring.gpg"
_URI = re.compile(r"(https?|file)://?[^\s]+")
_OPTION = re.compile(r"([a-z-]+)=(\S+)")


@dataclass(frozen=True, slots=True)
class AptSource:
    """An archive of packages. uri: as debootstrap takes it; keyring: who may sign it."""

    uri: str
    suite: str
    components: tuple[str, ...]
    keyring: str = KEYRING_DEFAULT


def find_source(suite: str, folder: str = "/etc/apt") -> AptSource:
    """The first archive that has ``suite`` with its component main.

    Raises ConfigError when apt knows of none.
    """
    for source in read_sources(folder):
        if source.suite == suite and "main" in source.components and _URI.fullmatch(source.uri):
            return source
    raise ConfigError(
        f"apt on this machine knows no archive of Debian {suite} ({folder}/sources.list)",
        hint="name one with --mirror URL",
    )


def read_sources(folder: str) -> Iterator[AptSource]:
    """What apt is configured with, in apt's order; files that cannot be read have nothing."""
    for path in (
        os.path.join(folder, "sources.list"),
        *sorted(glob.glob(os.path.join(folder, "sources.list.d", "*.*"))),
    ):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError:
            continue
        if path.endswith(".list"):
            yield from parse_lines(text)
        elif path.endswith(".sources"):
            yield from parse_stanzas(text)


def parse_lines(text: str) -> Iterator[AptSource]:
    """One archive a line: ``deb [options] uri suite component …``. Source: sources.list(5)."""
    for line in text.splitlines():
        told = line.partition("#")[0].strip()
        options: dict[str, str] = {}
        if found := re.fullmatch(r"deb\s+\[([^]]*)\]\s+(.*)", told):
            options = dict(_OPTION.findall(found[1]))
            told = f"deb {found[2]}"
        words = told.split()
        if len(words) >= 3 and words[0] == "deb":
            keyring = _keyring(options.get("signed-by", ""))
            yield AptSource(words[1], words[2], tuple(words[3:]), keyring)


def parse_stanzas(text: str) -> Iterator[AptSource]:
    """Stanzas of fields, apart by empty lines. Source: sources.list(5), deb822-style format."""
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split() or fields.get("enabled") == "no":
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                components = tuple(fields.get("components", "").split())
                yield AptSource(uri, suite, components, _keyring(fields.get("signed-by", "")))


def _fields(stanza: str) -> Mapping[str, str]:
    """Field names in lower case; a line that begins with a blank goes on with the field above."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
            continue
        name, _, value = line.partition(":")
        name = name.strip().lower()
        fields[name] = value.strip()
    return fields


def _keyring(told: str) -> str:
    """A file's path; a key that is written into the stanza itself is not for debootstrap."""
    return told if told.startswith("/") and "\n" not in told else KEYRING_DEFAULT
