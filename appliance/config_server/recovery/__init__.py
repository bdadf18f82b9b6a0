"""From recovery points to machines that run at the second site.

Source: docs/RECOVERY.md.
"""
