"""Whether all is well: health and its reasons, events, alert e-mail, metrics.

What decides (`health`, `component_health`, `rpo`, `hysteresis`) is pure.
"""
