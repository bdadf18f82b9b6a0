"""``GET me``: whose token this is."""

from typing import Annotated

from pydantic import BaseModel

from appliance.config_server.api.access import needs
from appliance.config_server.api.router import Router
from appliance.config_server.caller import Caller
from replication.control.role import OperatorRole

router = Router()


class Me(BaseModel):
    """The token that the request came with."""

    name: str
    role: OperatorRole


@router.get("/me")
async def me(caller: Annotated[Caller, needs(OperatorRole.READER)]) -> Me:
    """Tell whose token this is."""
    assert isinstance(caller.role, OperatorRole)
    return Me(name=caller.name, role=caller.role)
