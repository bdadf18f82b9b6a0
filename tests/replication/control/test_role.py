from replication.control.role import NodeRole, OperatorRole


def test_roles_are_written_as_certificates_and_tokens_have_them() -> None:
    assert [*NodeRole] == ["machine", "process-server", "applier", "compute"]
    assert [*OperatorRole] == ["reader", "operator", "contributor"]
