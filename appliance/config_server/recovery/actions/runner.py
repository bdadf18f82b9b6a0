"""What runs an action: finds out what it is, runs it within its limit, and tells what came of it.

Every end is an outcome; logs have the action's name, its attempt and its end, never its command,
headers or output.

Source: docs/RECOVERY.md §5.
"""

import asyncio
import shlex
from collections.abc import Mapping

import structlog
from pydantic import ValidationError

from appliance.config_server.recovery.actions.allowed import file_below, program_of
from appliance.config_server.recovery.actions.context import context_bytes
from appliance.config_server.recovery.actions.local import SHELL, run_local
from appliance.config_server.recovery.actions.ssh import Place, run_ssh
from appliance.config_server.recovery.actions.tail import Tail
from appliance.config_server.recovery.actions.webhook import host_of, post
from appliance.config_server.recovery.config import RecoveryConfig
from appliance.config_server.recovery.plans.document import ScriptAction, SshPlace, WebhookAction
from appliance.config_server.recovery.plans.plan import Act, Plan
from appliance.config_server.recovery.plans.secrets import Vault, open_header
from appliance.config_server.recovery.ports import ActionOrder, ActionOutcome
from appliance.config_server.recovery.run import ActionKind
from replication.errors import ConfigError, ReplicationError

TURN_SECONDS_MAX = 3600.0
"""How long an action waits until fewer than `recovery.actions_at_once` others run."""


class ActionRunner:
    """Runs scripts and webhooks; so many at once as the configuration allows."""

    def __init__(self, config: RecoveryConfig, vault: Vault) -> None:
        self._config = config
        self._vault = vault
        self._turn = asyncio.Semaphore(config.actions_at_once)

    async def run(self, order: ActionOrder) -> ActionOutcome:
        """See `ActionPort`."""
        log = structlog.get_logger().bind(
            action=order.name, kind=order.kind.value, run=str(order.run), attempt=order.attempt
        )
        output = Tail()
        try:
            async with asyncio.timeout(TURN_SECONDS_MAX):
                await self._turn.acquire()
        except TimeoutError:
            detail = f"it was not begun within {TURN_SECONDS_MAX:.0f} s: others took too long"
            return ActionOutcome(succeeded=False, detail=detail)
        try:
            log.info("action begins")
            try:
                async with asyncio.timeout(order.seconds_max):
                    outcome = await self._run(order, output)
            except TimeoutError:
                outcome = ActionOutcome(
                    succeeded=False,
                    detail=f"it had not ended after {order.seconds_max} s, and was ended",
                    output=output.text(),
                )
            except (ReplicationError, ValidationError, OSError) as error:
                outcome = ActionOutcome(succeeded=False, detail=_told(error), output=output.text())
        finally:
            self._turn.release()
        log.info("action ended", succeeded=outcome.succeeded, exit_code=outcome.exit_code)
        return outcome

    async def _run(self, order: ActionOrder, output: Tail) -> ActionOutcome:
        if order.kind is ActionKind.WEBHOOK:
            return await self._webhook(WebhookAction.model_validate(dict(order.spec)), order)
        assert order.kind is ActionKind.SCRIPT, "a manual action is the job's own"
        script = ScriptAction.model_validate(dict(order.spec))
        if isinstance(script.where, SshPlace):
            code = await self._ssh(script, script.where, order, output)
        else:
            code = await self._local(script, order, output)
        detail = ""
        if code:
            detail = f"it ended with exit code {code}" if code > 0 else f"signal {-code} ended it"
        return ActionOutcome(
            succeeded=code == 0, exit_code=code, detail=detail, output=output.text()
        )

    async def _local(self, script: ScriptAction, order: ActionOrder, output: Tail) -> int:
        if script.inline is not None:
            refuse_inline(self._config)
            words: tuple[str, ...] = (SHELL, "-c", script.inline)
        else:
            words = program_of(self._config.scripts_folder, script.command or "")
        folder = self._config.scripts_folder or "/"
        return await run_local(words, stdin=context_bytes(order), folder=folder, output=output)

    async def _ssh(
        self, script: ScriptAction, where: SshPlace, order: ActionOrder, output: Tail
    ) -> int:
        folder = keys_folder(self._config)
        place = Place(
            where.host,
            where.port,
            where.user,
            file_below(folder, where.key_file, secret=True),
            file_below(folder, where.known_hosts),
        )
        command = script.command or f"{SHELL} -c {shlex.quote(script.inline or '')}"
        return await run_ssh(place, command, stdin=context_bytes(order), output=output)

    async def _webhook(self, hook: WebhookAction, order: ActionOrder) -> ActionOutcome:
        headers = {
            name: open_header(self._vault, name, value) for name, value in hook.headers.items()
        }
        answer = await post(hook.url, headers, context_bytes(order))
        detail = "" if answer.is_success else f"{host_of(hook.url)} answered {answer.status_code}"
        return ActionOutcome(
            succeeded=answer.is_success, exit_code=answer.status_code, detail=detail
        )


def refused_actions(config: RecoveryConfig, plan: Plan) -> Mapping[str, str]:
    """Actions of a plan that would be refused here as things are, by their place, and why."""
    refused = {}
    for group in plan.groups:
        for act in group.acts:
            try:
                _check(config, act)
            except ReplicationError as error:
                refused[act.where] = _told(error)
    return refused


def _check(config: RecoveryConfig, act: Act) -> None:
    if act.is_inline:
        refuse_inline(config)
    elif act.is_local:
        program_of(config.scripts_folder, act.command)
    if act.keys:
        folder = keys_folder(config)
        file_below(folder, act.keys[0], secret=True)
        file_below(folder, act.keys[1])


def refuse_inline(config: RecoveryConfig) -> None:
    """Raise ConfigError where plans may not bring the text of what runs on this host."""
    if not config.allow_inline_scripts:
        raise ConfigError(
            "this config server runs no inline scripts on its host",
            hint="put the script into recovery.scripts_folder, or allow them: "
            "recovery.allow_inline_scripts",
        )


def keys_folder(config: RecoveryConfig) -> str:
    """Raises ConfigError where there is none."""
    if config.keys_folder is None:
        raise ConfigError(
            "this config server has no keys for SSH",
            hint="its administrator names a folder: recovery.keys_folder",
        )
    return config.keys_folder


def _told(error: Exception) -> str:
    if isinstance(error, ReplicationError):
        return str(error)
    if isinstance(error, ValidationError):
        return "what it is to do cannot be read: it is of another version"
    return f"it cannot be started: {getattr(error, 'strerror', None) or error}"
