"""One module per noun; ROUTERS is what is served."""

from appliance.config_server.api.router import Router
from appliance.config_server.api.routes import (
    audit,
    certificates,
    components,
    enrolment,
    events,
    failovers,
    health,
    health_check,
    jobs,
    machines,
    me,
    node,
    points,
    policies,
    tokens,
    vcenters,
    vms,
)

ROUTERS: tuple[Router, ...] = (
    health_check.router,
    me.router,
    enrolment.router,
    node.router,
    certificates.router,
    jobs.router,
    machines.router,
    points.router,
    failovers.of_machine,
    failovers.router,
    policies.router,
    tokens.router,
    audit.router,
    health.router,
    events.router,
    components.router,
    vcenters.router,
    vms.router,
)
