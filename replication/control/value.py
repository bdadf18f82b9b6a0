"""Values that a report may hold: what a column of the database takes, and sums can be made of."""

from typing import Annotated

from pydantic import Field

COUNT_MAX = 2**63 - 1
"""Times, sizes and numbers: what a column of the database takes."""

SECONDS_MAX = 1e12
Text = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")]
"""Without NUL, which PostgreSQL does not store."""

Count = Annotated[int, Field(ge=0, le=COUNT_MAX)]
Difference = Annotated[int, Field(ge=-COUNT_MAX, le=COUNT_MAX)]
Seconds = Annotated[float, Field(ge=0, le=SECONDS_MAX, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
