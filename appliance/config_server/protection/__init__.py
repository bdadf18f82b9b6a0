"""What is protected: policies, the machines' states, and the durable jobs that change them.

Source: docs/CONTROL.md §8, §9.
"""
