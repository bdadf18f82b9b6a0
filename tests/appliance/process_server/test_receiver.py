import uuid

from replication.bookmark import NOTHING, Stamp
from tests.appliance.process_server.rig import Agent, ProcessServer
from tests.appliance.process_server.sample import make_changeset


async def test_committed_changeset_is_told_in_the_state(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        state = (await agent.state()).state
        assert (state.committed, state.watermark.applied) == (NOTHING, NOTHING)
        first = make_changeset(machine, Stamp(1, 1))
        assert [(await agent.put(first, i)).status for i in (0, 1)] == [201, 201]
        assert (await agent.state()).state.committed == NOTHING
        reply = await agent.commit(first)
        assert reply.status == 201
        assert reply.state.committed == Stamp(1, 1)
        assert reply.state.attempt == first.attempt
        assert (await agent.commit(first)).status == 200
        assert (await agent.put(first, 1)).status == 200
