"""Add the tables of recovery, and a machine's orders for a final changeset."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Nothing of what is there already changes."""
    op.create_table(
        "drill_reports",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("schedule", sa.String(length=255), nullable=False),
        sa.Column("target", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("asked_by", sa.String(length=255), nullable=False),
        sa.Column("began_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("page", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_drill_reports_began_ns", "drill_reports", ["began_ns"], unique=False)
    op.create_index("ix_drill_reports_schedule", "drill_reports", ["schedule"], unique=False)
    op.create_index("ix_drill_reports_state", "drill_reports", ["state"], unique=False)
    op.create_table(
        "plan_runs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("plan", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("asked_by", sa.String(length=255), nullable=False),
        sa.Column("asked_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("notes", sa.Text(), nullable=False),
        sa.Column("drill_id", sa.Uuid(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_plan_runs_asked_ns", "plan_runs", ["asked_ns"], unique=False)
    op.create_index("ix_plan_runs_drill_id", "plan_runs", ["drill_id"], unique=False)
    op.create_index("ix_plan_runs_job_id", "plan_runs", ["job_id"], unique=False)
    op.create_index("ix_plan_runs_plan", "plan_runs", ["plan"], unique=False)
    op.create_table(
        "plans",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("updated_ns", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "actions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("group", sa.BigInteger(), nullable=False),
        sa.Column("place", sa.String(length=64), nullable=False),
        sa.Column("index", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("began_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("exit_code", sa.BigInteger(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("resumed_by", sa.String(length=255), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["plan_runs.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("run_id", "group", "place", "index"),
    )
    op.create_index("ix_actions_run_id", "actions", ["run_id"], unique=False)
    op.create_table(
        "drill_schedules",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("plan", sa.String(length=255), nullable=False),
        sa.Column("machine_id", sa.Uuid(), nullable=True),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("next_ns", sa.BigInteger(), nullable=False),
        sa.Column("last_ns", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["machine_id"],
            ["machines.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_index("ix_drill_schedules_next_ns", "drill_schedules", ["next_ns"], unique=False)
    op.create_index("ix_drill_schedules_plan", "drill_schedules", ["plan"], unique=False)
    op.create_table(
        "failovers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("machine_id", sa.Uuid(), nullable=False),
        sa.Column("machine", sa.String(length=255), nullable=False),
        sa.Column("group", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.Column("choice", sa.String(length=255), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("compute_id", sa.Uuid(), nullable=False),
        sa.Column("network", sa.String(length=255), nullable=False),
        sa.Column("vm_id", sa.Uuid(), nullable=True),
        sa.Column("next_vm_id", sa.Uuid(), nullable=True),
        sa.Column("point", sa.String(length=255), nullable=False),
        sa.Column("point_ns", sa.BigInteger(), nullable=False),
        sa.Column("consistency", sa.String(length=64), nullable=False),
        sa.Column("asked_ns", sa.BigInteger(), nullable=False),
        sa.Column("asked_source_ns", sa.BigInteger(), nullable=False),
        sa.Column("final", sa.BigInteger(), nullable=False),
        sa.Column("final_ns", sa.BigInteger(), nullable=False),
        sa.Column("final_generation", sa.BigInteger(), nullable=False),
        sa.Column("final_number", sa.BigInteger(), nullable=False),
        sa.Column("power_off_ns", sa.BigInteger(), nullable=False),
        sa.Column("powered_off_ns", sa.BigInteger(), nullable=False),
        sa.Column("up_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("notes", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["compute_id"],
            ["nodes.id"],
        ),
        sa.ForeignKeyConstraint(
            ["machine_id"],
            ["machines.id"],
        ),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["plan_runs.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_failovers_asked_ns", "failovers", ["asked_ns"], unique=False)
    op.create_index("ix_failovers_job_id", "failovers", ["job_id"], unique=False)
    op.create_index("ix_failovers_kind", "failovers", ["kind"], unique=False)
    op.create_index("ix_failovers_machine_id", "failovers", ["machine_id"], unique=False)
    op.create_index("ix_failovers_run_id", "failovers", ["run_id"], unique=False)
    op.create_index("ix_failovers_state", "failovers", ["state"], unique=False)
    op.create_index("ix_failovers_vm_id", "failovers", ["vm_id"], unique=False)
    op.create_table(
        "point_lists",
        sa.Column("machine_id", sa.Uuid(), nullable=False),
        sa.Column("applier_id", sa.Uuid(), nullable=False),
        sa.Column("heard_ns", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["applier_id"],
            ["nodes.id"],
        ),
        sa.ForeignKeyConstraint(
            ["machine_id"],
            ["machines.id"],
        ),
        sa.PrimaryKeyConstraint("machine_id"),
    )
    op.create_table(
        "evidence",
        sa.Column("vm_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("failover_id", sa.Uuid(), nullable=False),
        sa.Column("heard_ns", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["failover_id"],
            ["failovers.id"],
        ),
        sa.PrimaryKeyConstraint("vm_id", "kind"),
    )
    op.create_index("ix_evidence_failover_id", "evidence", ["failover_id"], unique=False)
    op.create_index("ix_evidence_heard_ns", "evidence", ["heard_ns"], unique=False)
    op.create_table(
        "holds",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("machine_id", sa.Uuid(), nullable=False),
        sa.Column("applier_id", sa.Uuid(), nullable=False),
        sa.Column("failover_id", sa.Uuid(), nullable=True),
        sa.Column("choice", sa.String(length=255), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("until_ns", sa.BigInteger(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=True),
        sa.Column("asked_by", sa.String(length=255), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["applier_id"],
            ["nodes.id"],
        ),
        sa.ForeignKeyConstraint(
            ["failover_id"],
            ["failovers.id"],
        ),
        sa.ForeignKeyConstraint(
            ["machine_id"],
            ["machines.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_holds_applier_id", "holds", ["applier_id"], unique=False)
    op.create_index("ix_holds_ended_ns", "holds", ["ended_ns"], unique=False)
    op.create_index("ix_holds_failover_id", "holds", ["failover_id"], unique=False)
    op.create_index("ix_holds_machine_id", "holds", ["machine_id"], unique=False)
    op.create_table(
        "recovered_vms",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("failover_id", sa.Uuid(), nullable=False),
        sa.Column("machine_id", sa.Uuid(), nullable=False),
        sa.Column("hold_id", sa.Uuid(), nullable=False),
        sa.Column("compute_id", sa.Uuid(), nullable=False),
        sa.Column("wanted", sa.String(length=64), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("independent", sa.Boolean(), nullable=False),
        sa.Column("is_independent", sa.Boolean(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("gone_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["compute_id"],
            ["nodes.id"],
        ),
        sa.ForeignKeyConstraint(
            ["failover_id"],
            ["failovers.id"],
        ),
        sa.ForeignKeyConstraint(
            ["hold_id"],
            ["holds.id"],
        ),
        sa.ForeignKeyConstraint(
            ["machine_id"],
            ["machines.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_recovered_vms_compute_id", "recovered_vms", ["compute_id"], unique=False)
    op.create_index("ix_recovered_vms_failover_id", "recovered_vms", ["failover_id"], unique=False)
    op.create_index("ix_recovered_vms_gone_ns", "recovered_vms", ["gone_ns"], unique=False)
    op.create_index("ix_recovered_vms_hold_id", "recovered_vms", ["hold_id"], unique=False)
    op.create_index("ix_recovered_vms_machine_id", "recovered_vms", ["machine_id"], unique=False)
    op.add_column(
        "machines", sa.Column("final_order", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column(
        "machines",
        sa.Column("final_wanted", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
