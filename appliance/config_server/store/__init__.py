"""The config server's memory: tables, engine, migrations."""
