"""Tell what names a certificate is for, and until when a node may come with a new key."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Of certificates that are there already no names are known until they are renewed."""
    op.add_column(
        "certificates", sa.Column("names", sa.JSON(), nullable=False, server_default="[]")
    )
    op.add_column(
        "nodes", sa.Column("new_key_until_ns", sa.BigInteger(), nullable=False, server_default="0")
    )
