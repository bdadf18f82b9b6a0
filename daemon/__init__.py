"""What every daemon has: configuration, logs, health, signals, durable writes.

Knows the errors of ``replication`` and no daemon.
"""
