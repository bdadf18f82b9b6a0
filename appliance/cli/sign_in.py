"""Which config server the command line speaks to, and as whom: a file, or the environment."""

import json
import os
import stat
from collections.abc import Mapping
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.durable import make_folder, write_whole
from replication.errors import ConfigError

URL_VARIABLE = "UNDERSTUDY_URL"
TOKEN_VARIABLE = "UNDERSTUDY_TOKEN"  # noqa: S105 - the variable's name
CA_VARIABLE = "UNDERSTUDY_CA"
_HINT = f"`understudy login URL`, or set {URL_VARIABLE}, {TOKEN_VARIABLE} and {CA_VARIABLE}"


class SignIn(BaseModel):
    """Where, as whom, and whom to trust. ``ca_pem`` empty: whom the system trusts.

    name, role: of the token, when it was stored.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    token: str
    ca_pem: str = ""
    name: str = ""
    role: str = ""


def sign_in_file(environ: Mapping[str, str] = os.environ) -> str:
    """Below XDG_CONFIG_HOME, else below ``~/.config``."""
    root = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(root, "understudy", "login.json")


def check_url(url: str) -> str:
    """An https URL without a path; ConfigError for anything else."""
    url = url if "://" in url else f"https://{url}"
    parts = urlsplit(url)
    try:
        good = parts.scheme == "https" and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or parts.path.strip("/") or parts.query or parts.username or parts.fragment:
        raise ConfigError(
            f"{url!r:.200} is not the address of a config server",
            hint="it looks like https://config.example.net or https://10.0.0.5:8443",
        )
    return f"https://{parts.netloc}"


def find_sign_in(environ: Mapping[str, str] = os.environ) -> SignIn | None:
    """From the environment where it names a URL, else from the file; None if there is neither."""
    if environ.get(URL_VARIABLE):
        ca = environ.get(CA_VARIABLE)
        return SignIn(
            url=check_url(environ[URL_VARIABLE]),
            token=environ.get(TOKEN_VARIABLE, ""),
            ca_pem=read_pem(ca) if ca else "",
        )
    path = sign_in_file(environ)
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}")
            return SignIn.model_validate_json(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is damaged", hint="sign in again: `understudy login`") from error


def require_sign_in(environ: Mapping[str, str] = os.environ) -> SignIn:
    """ConfigError where nobody is signed in."""
    found = find_sign_in(environ)
    if found is None:
        raise ConfigError("not signed in to a config server", hint=_HINT)
    if not found.token:
        raise ConfigError(f"{URL_VARIABLE} is set but {TOKEN_VARIABLE} is not", hint=_HINT)
    return found


def store_sign_in(sign_in: SignIn, environ: Mapping[str, str] = os.environ) -> str:
    """Write it, its owner's alone, and return where."""
    path = sign_in_file(environ)
    make_folder(os.path.dirname(path))
    write_whole(path, json.dumps(sign_in.model_dump(), indent=2).encode() + b"\n", mode=0o600)
    return path


def forget_sign_in(environ: Mapping[str, str] = os.environ) -> bool:
    """False when there was none."""
    path = sign_in_file(environ)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot remove {path}: {error.strerror}") from error
    return True


def read_pem(path: str) -> str:
    """A PEM file, as text."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read(64 << 10)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the CA {path}: {told_unread(error)}") from error


def told_unread(error: OSError | UnicodeDecodeError) -> str:
    """Why a file cannot be read, without its name."""
    return error.strerror or str(error) if isinstance(error, OSError) else "it is no text"
