"""Recovery plans: which machines are recovered in which order, and what is done in between.

Source: docs/RECOVERY.md §5.
"""
