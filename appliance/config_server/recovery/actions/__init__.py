"""Actions of a run: scripts here and over SSH, webhooks. Manual ones are the job's own.

Source: docs/RECOVERY.md §5.
"""
