"""Handing an e-mail to an SMTP server."""

import os
import ssl
import stat
from email.message import EmailMessage

import aiosmtplib

from appliance.config_server.watching.config import SmtpConfig
from replication.errors import ConfigError, UnavailableError

PASSWORD_BYTES_MAX = 1024


def read_password(config: SmtpConfig) -> str | None:
    """From its file, which must be its owner's alone; None where no user is set."""
    if not config.user or config.password_file is None:
        return None
    path = config.password_file
    try:
        with open(path, encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(
                    f"the SMTP password {path} can be read by others", hint=f"chmod 600 {path}"
                )
            password = file.read(PASSWORD_BYTES_MAX).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read smtp.password_file {path}: {error}", hint="mode 0600, one line"
        ) from error
    if not password:
        raise ConfigError(f"smtp.password_file {path} is empty")
    return password


def tls_context(config: SmtpConfig) -> ssl.SSLContext | None:
    """Checks the server's name and certificate."""
    if config.tls == "none":
        return None
    try:
        context = ssl.create_default_context(cafile=config.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot use smtp.ca {config.ca}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def send(message: EmailMessage, config: SmtpConfig) -> dict[str, str]:
    """Return when the server has taken it; the recipients that it refused, with its answers.

    Raises UnavailableError when it did not take it: nothing was delivered then, as far as it says.
    """
    password = read_password(config)
    try:
        refused, _ = await aiosmtplib.send(
            message,
            hostname=config.host,
            port=config.port,
            username=config.user or None,
            password=password,
            use_tls=config.tls == "tls",
            start_tls=config.tls == "starttls",
            tls_context=tls_context(config),
            timeout=config.timeout_seconds,
        )
    except (aiosmtplib.SMTPException, OSError, ValueError) as error:
        told = str(error) or type(error).__name__
        if password:
            told = told.replace(password, "***")
        raise UnavailableError(
            f"the SMTP server {config.host}:{config.port} did not take an alert: {told}",
            hint="look at [smtp] in the configuration and at that server; it is tried again",
        ) from error
    return {address: f"{answer.code} {answer.message}" for address, answer in refused.items()}


def check(config: SmtpConfig) -> None:
    """Raise ConfigError for files that cannot be used: better at the start than at the alert."""
    if config.host:
        read_password(config)
        tls_context(config)
