"""What Alembic runs for each migration: over the connection and in the transaction it is given."""

from alembic import context

from appliance.config_server.store.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
