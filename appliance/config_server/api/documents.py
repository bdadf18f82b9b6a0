"""Health as the API shows it; shared by the routes that tell of machines and components."""

from typing import Literal

from pydantic import BaseModel

from appliance.config_server.watching.reason import Health, Severity, State

NS = 1_000_000_000


class ReasonDocument(BaseModel):
    """One thing that is not well. ``code`` is one of the table in docs/OPERATIONS.md."""

    code: str
    severity: Severity
    message: str
    cause: str
    action: str


class HealthDocument(BaseModel):
    """The worst of the reasons, and the reasons, worst first."""

    state: State
    reasons: list[ReasonDocument]

    @classmethod
    def of(cls, health: Health) -> "HealthDocument":
        return cls(
            state=health.state,
            reasons=[
                ReasonDocument(
                    code=reason.code,
                    severity=reason.severity,
                    message=reason.message,
                    cause=reason.cause,
                    action=reason.action,
                )
                for reason in health.reasons
            ],
        )


SourceKind = Literal["machine", "process-server", "applier", "compute", "vcenter"]
