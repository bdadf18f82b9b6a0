"""Who may hold a certificate, and who a token."""

from enum import StrEnum


class NodeRole(StrEnum):
    """What a daemon is; written into its certificate's organizational unit (OU)."""

    MACHINE = "machine"
    PROCESS_SERVER = "process-server"
    APPLIER = "applier"
    COMPUTE = "compute"


class OperatorRole(StrEnum):
    """What a token allows; each includes the ones before it."""

    READER = "reader"
    OPERATOR = "operator"
    CONTRIBUTOR = "contributor"
