"""`understudy-config-server`: the daemon, and its administration on its own host."""

import argparse
import asyncio
import re
import sys
from collections.abc import Coroutine

from appliance.config_server import administration
from appliance.config_server.caller import NAME_CHARS_MAX, NAME_PATTERN
from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.identity.administration import (
    change_unlock_file,
    rotate_passphrase,
    show_ca,
    show_passphrase,
)
from appliance.config_server.tokens import DAYS_DEFAULT, DAYS_MAX
from daemon.ownership import act_as_owner
from daemon.service import fail, run_daemon
from replication.control.enrolment import PassphraseKind
from replication.control.role import OperatorRole
from replication.errors import ReplicationError

SWITCH_SECONDS = 0.0005
"""Each answer of SQLite comes from a thread, which would wait 5 ms for a busy loop to let go."""


def main() -> int:
    """Run the config server, or one of its commands, and return the exit code."""
    arguments = _parser().parse_args()
    try:
        config = ConfigServerConfig.load(arguments.config)
        command = _command(config, arguments)
        if command is None:
            # Not for its commands: what only the daemon needs takes a second to load.
            from appliance.config_server.serving import serve  # noqa: PLC0415

            sys.setswitchinterval(SWITCH_SECONDS)
            return run_daemon(
                "config-server", config.service, lambda service: serve(service, config)
            )
        act_as_owner(config.state_folder)
        print(asyncio.run(command))  # noqa: T201 - this is the user's terminal
    except ReplicationError as error:
        return fail(error)
    return 0


def _command(
    config: ConfigServerConfig, arguments: argparse.Namespace
) -> Coroutine[None, None, str] | None:
    match arguments.command, getattr(arguments, "verb", None):
        case "check", _:
            return administration.check(config)
        case "migrate", _:
            return administration.bring_up_to_date(config)
        case "restored", _:
            return administration.confirm_restored(config)
        case "token", "create":
            role = OperatorRole(arguments.role)
            return administration.make_token(config, arguments.name, role, days=arguments.days)
        case "token", "list":
            return administration.tell_tokens(config)
        case "token", "revoke":
            return administration.end_token(config, arguments.name)
        case "passphrase", "rotate":
            return rotate_passphrase(config, PassphraseKind(arguments.kind))
        case "passphrase", _:
            return show_passphrase(config, PassphraseKind(arguments.kind))
        case "ca", _:
            return show_ca(config, fingerprint=arguments.fingerprint)
        case "reseal", _:
            return change_unlock_file(config, arguments.new_unlock_file)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="understudy-config-server",
        description="Knows who is who, what is protected and how well it goes; serves the API.",
    )
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("run", help="serve the API (as without a command)")
    commands.add_parser("check", help="look at configuration and database; change nothing")
    commands.add_parser("migrate", help="bring the database to this program's schema")
    commands.add_parser(
        "restored",
        help="the database was put back on purpose: nodes follow all it says, deletions too",
    )
    token = commands.add_parser("token", help="tokens of operators, made with no API at hand")
    verbs = token.add_subparsers(dest="verb", metavar="VERB", required=True)
    create = verbs.add_parser("create", help="make a token and print it, this once")
    create.add_argument("name", metavar="NAME", type=_name)
    create.add_argument("--role", choices=[*OperatorRole], default=OperatorRole.READER)
    create.add_argument("--days", type=_days, default=DAYS_DEFAULT, metavar="DAYS")
    verbs.add_parser("list", help="list the tokens")
    revoke = verbs.add_parser("revoke", help="make a token worthless")
    revoke.add_argument("name", metavar="NAME", type=_name)
    passphrase = commands.add_parser("passphrase", help="the enrolment passphrases of nodes")
    passphrase.add_argument(
        "verb",
        nargs="?",
        choices=("show", "rotate"),
        default="show",
        help="print it (the default); make a new one, and the old one worthless",
    )
    passphrase.add_argument(
        "--for",
        dest="kind",
        choices=[*PassphraseKind],
        default=PassphraseKind.MACHINES,
        help="whom it lets in: machines (the default), or the appliance's process servers and "
        "appliers",
    )
    ca = commands.add_parser("ca", help="the CA's certificate, for `understudy login --ca`")
    ca.add_argument("--fingerprint", action="store_true", help="its digest instead")
    reseal = commands.add_parser("reseal", help="seal the keys under another unlock file")
    reseal.add_argument("new_unlock_file", metavar="FILE")
    return parser


def _name(text: str) -> str:
    if not re.fullmatch(NAME_PATTERN, text) or len(text) > NAME_CHARS_MAX:
        raise argparse.ArgumentTypeError("letters, digits, space and ._@- only")
    return text


def _days(text: str) -> int:
    days = int(text)
    if not 1 <= days <= DAYS_MAX:
        raise argparse.ArgumentTypeError(f"1 to {DAYS_MAX}")
    return days


if __name__ == "__main__":
    sys.exit(main())
