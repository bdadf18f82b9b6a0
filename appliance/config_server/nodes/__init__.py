"""What nodes are told and what they say.

Source: docs/CONTROL.md §4, §5.
"""
