"""Who is who: the CA, the vault key, enrolment, certificates, data keys.

Source: docs/CONTROL.md §3.
"""
