"""Alembic's folder: what each schema adds to the one before it."""
