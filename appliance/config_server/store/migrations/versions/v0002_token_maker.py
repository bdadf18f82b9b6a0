"""Tell who made a token."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Tokens that are there already say nothing of it."""
    op.add_column(
        "tokens", sa.Column("created_by", sa.String(255), nullable=False, server_default="")
    )
