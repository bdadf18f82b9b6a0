"""The config server's life: parts opened in order, background tasks, the port."""

import asyncio

from appliance.config_server.api.app import create_app
from appliance.config_server.api.listener import listen
from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.server import BACKGROUND, open_server
from daemon.garbage import collect_fully, spare_the_old
from daemon.service import Service


async def serve(service: Service, config: ConfigServerConfig) -> None:
    """Run until ``service.stop`` is set, then finish the requests that have begun."""
    async with open_server(config, service) as server, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(run(server), name=run.__name__) for run in BACKGROUND]
        running.append(tasks.create_task(collect_fully(), name="garbage"))
        context = server.identity.certificate.context
        async with listen(create_app(server), context, config.listen, config.limits) as port:
            spare_the_old()
            service.ready(f"operators and nodes on port {port}")
            await service.stop.wait()
        for task in running:
            task.cancel()
