"""Drills: test failovers as evidence, by schedule or by hand, cleaned up by themselves.

Source: docs/RECOVERY.md §6.
"""
