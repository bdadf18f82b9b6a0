"""What the config file says of jobs."""

from pydantic import Field

from daemon.config import Section


class JobsConfig(Section):
    """How long jobs wait, and how config servers that share a database watch each other.

    answer_seconds_max:   for a node to do what it was told.
    sweep_seconds:        between heartbeats; each looks for jobs that nobody works on.
    silence_seconds_max:  one that is silent for longer is dead: its jobs are taken over.
    """

    answer_seconds_max: float = Field(default=600.0, gt=0)
    sweep_seconds: float = Field(default=5.0, gt=0)
    silence_seconds_max: float = Field(default=30.0, gt=0)
