"""Who asks."""

import uuid
from dataclasses import dataclass

from replication.control.role import NodeRole, OperatorRole

NOBODY = "nobody"
NAME_CHARS_MAX = 255
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._@-]*$"
"""Of what people give a name."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, as far as it was shown.

    name:   of the token, or the node's id; ``nobody`` where a route asks for neither.
    source: the address it comes from.
    node, serial: of a node's certificate.
    """

    name: str
    role: OperatorRole | NodeRole | None
    source: str
    node: uuid.UUID | None = None
    serial: str = ""

    @property
    def node_id(self) -> uuid.UUID:
        """The node; only of a caller that a node's route has let in."""
        assert self.node is not None
        return self.node


LOCAL_OPERATOR = Caller("local administrator", OperatorRole.CONTRIBUTOR, "this host")
"""Who runs the program's commands on its own host: the files protect it, no token."""
