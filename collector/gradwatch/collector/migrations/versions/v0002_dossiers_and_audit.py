"""Dossiers, which deciding rests on, and the audit trail."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "dossier",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("job", sa.Text, nullable=True),
        sa.Column("state", sa.Text, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("job", sa.Text, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("about", sa.Text, nullable=True),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_index("audit_job", "audit", ["job", "id"])
