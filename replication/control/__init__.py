"""What the config server and the daemons say to each other: documents, and the proof at enrolment.

Source: docs/CONTROL.md.
"""
