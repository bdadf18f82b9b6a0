"""The base of every document of the control plane."""

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """Immutable. Unknown keys are passed over: the two sides may be of neighbouring versions."""

    model_config = ConfigDict(extra="ignore", frozen=True)
