"""The reader of one vCenter: a thread that logs in, follows, and tries again with patience.

A wrong password is tried once: after it the thread ends, so that no account gets locked. All other
trouble is tried again, from BACKOFF_SECONDS_MIN doubling to BACKOFF_SECONDS_MAX, with jitter so
that several do not come at once.
"""

import random
import socket
import ssl
import threading
from collections.abc import Callable
from http.client import HTTPException
from xml.parsers.expat import ExpatError

import structlog
from pyVmomi import vim, vmodl

from appliance.config_server.discovery.news import (
    Deliver,
    MistakenError,
    News,
    Refused,
    Snapshot,
    Unreachable,
    UnwantedError,
)
from appliance.config_server.discovery.target import Target
from appliance.config_server.discovery.vcenter import HTTP_SECONDS_MAX, Session
from replication.errors import InputError, ReplicationError

BACKOFF_SECONDS_MIN = 1.0
BACKOFF_SECONDS_MAX = 60.0
JITTER_SHARE = 0.25
REASON_CHARS_MAX = 500

_log = structlog.get_logger()

EXPIRED: type[Exception] = vim.fault.NotAuthenticated
BARRED: type[Exception] = vim.fault.InvalidLogin
TROUBLE: tuple[type[Exception], ...] = (
    OSError,
    HTTPException,
    ExpatError,
    vmodl.MethodFault,
    vmodl.RuntimeFault,
)


def read_forever(target: Target, deliver: Deliver, stop: threading.Event) -> None:
    """The thread's whole life."""
    failures = 0

    def tell(news: News) -> None:
        nonlocal failures
        if isinstance(news, Snapshot):
            failures = 0
        deliver(news)

    try:
        while not stop.is_set():
            try:
                _follow(target, tell, stop)
            except EXPIRED:
                if failures == 0:
                    failures = 1  # log in again at once; wait if that does not lead to a reading
                    continue
                reason = "the session ends before all is read"
            except BARRED as error:
                deliver(Refused(explain(error)))
                return
            except (InputError, MistakenError) as error:
                reason = str(error)
            except TROUBLE as error:
                reason = explain(error)
            except (UnwantedError, ReplicationError):
                raise
            except Exception as error:  # noqa: BLE001 - what pyvmomi raises at what it cannot read
                _log.warning("vCenter not understood", vcenter=target.name, exc_info=error)
                reason = explain(error)
            else:
                return
            failures += 1
            deliver(Unreachable(reason))
            stop.wait(backoff_seconds(failures, random.random))
    except UnwantedError:
        return
    except ReplicationError:
        return  # what we tell cannot be kept: whoever started us sees it, and starts us again


def _follow(target: Target, deliver: Deliver, stop: threading.Event) -> None:
    session = Session(target)
    try:
        session.follow(deliver, stop)
    finally:
        session.close()


def backoff_seconds(failures: int, random_share: Callable[[], float]) -> float:
    """How long to wait after so many failures in a row, 1 at least."""
    plain = BACKOFF_SECONDS_MIN * 2.0 ** min(failures - 1, 16)
    jittered = plain * (1 + JITTER_SHARE * (2 * random_share() - 1))
    return min(jittered, BACKOFF_SECONDS_MAX)


def explain(error: Exception) -> str:
    """Why a vCenter cannot be read, for a person; never what we sent to it."""
    match error:
        case vim.fault.InvalidLogin():
            text = "user or password is wrong"
        case vim.fault.NoPermission():
            text = "the user may not read the inventory: it needs the role Read-only at the root"
        case ssl.SSLCertVerificationError():
            text = f"its certificate is not trusted: {error.verify_message}"
        case ssl.SSLError():
            text = f"TLS fails: {getattr(error, 'reason', '') or error.strerror or error}"
        case TimeoutError():
            text = f"no answer within {HTTP_SECONDS_MAX:.0f} s"
        case socket.gaierror():
            text = f"its name cannot be resolved: {error.strerror}"
        case OSError():
            text = error.strerror or type(error).__name__
        case vmodl.MethodFault():
            told = getattr(error, "msg", "") or ""
            text = f"it answers {type(error).__name__.rpartition('.')[2]}: {told}".rstrip(": ")
        case _:
            text = f"it does not answer as a vCenter does ({type(error).__name__})"
    return text[:REASON_CHARS_MAX]
