"""``GET healthz``: is it up."""

from typing import Literal

from pydantic import BaseModel

from appliance.config_server.api.access import anyone
from appliance.config_server.api.router import Router, ServerOf

router = Router()


class HealthCheck(BaseModel):
    """``state`` as in the health of a daemon; why is told to Readers alone."""

    state: Literal["normal", "warning", "critical"]


@router.get("/healthz", dependencies=[anyone()])
async def health_check(server: ServerOf) -> HealthCheck:
    """Answer while the API answers."""
    return HealthCheck.model_validate({"state": server.health.state})
