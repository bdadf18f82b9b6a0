"""How every daemon reads its configuration: one TOML file, one pydantic model, the environment.

Unknown keys are refused, so that a misspelt limit is an error and not a default. Any key can be
overridden by ``UNDERSTUDY_<SECTION>__<KEY>``, the value being TOML (a bare word is a string).
A file that holds a secret must not be readable by everyone.
"""

import copy
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, SecretBytes, SecretStr, ValidationError

from replication.errors import ConfigError

ENVIRONMENT_PREFIX = "UNDERSTUDY_"


class Section(BaseModel):
    """A part of a configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DaemonConfig(Section):
    """The root of a daemon's configuration."""

    @classmethod
    def load(cls, path: str, environ: Mapping[str, str] = os.environ) -> Self:
        """Read ``path`` and the environment; raise ConfigError that names the key."""
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                tree = tomllib.load(file)
        except OSError as error:
            raise ConfigError(
                f"cannot read the configuration {path}: {error.strerror}",
                hint="name it with --config FILE.toml",
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        written = copy.deepcopy(tree)
        for name, value in environ.items():
            keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            if name.startswith(ENVIRONMENT_PREFIX) and keys[0] in cls.model_fields:
                _override(tree, keys, value, name)
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(f"{path}: {_explain(error)}") from error
        told = next((keys for keys in _secrets(config) if _is_in(written, keys)), None)
        if told and mode & stat.S_IRWXO:
            raise ConfigError(
                f"everyone on this machine can read {path}, which holds the secret "
                f"{'.'.join(told)}",
                hint=f"chmod o= {path}",
            )
        return config


def _secrets(section: BaseModel, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys that have a secret as their value."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, BaseModel):
                yield from _secrets(item, (*prefix, name))
            elif isinstance(item, SecretStr | SecretBytes):
                yield (*prefix, name)


def _is_in(tree: Any, keys: tuple[str, ...]) -> bool:
    """Whether a key is in the file; in any element of a list of sections."""
    if not keys:
        return True
    if isinstance(tree, list):
        return any(_is_in(item, keys) for item in tree)
    return isinstance(tree, dict) and keys[0] in tree and _is_in(tree[keys[0]], keys[1:])


def _override(tree: dict[str, Any], keys: list[str], value: str, name: str) -> None:
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: {key} is not a section")
        tree = child
    tree[keys[-1]] = parsed


def _explain(error: ValidationError) -> str:
    told = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = "unknown key; check its spelling against the documentation"
        told.append(f"{where}: {what}")
    return "; ".join(told)
