"""The mobility agent: tracks dirty blocks, takes consistent points, streams changesets."""

import sys

if "structlog" not in sys.modules and "rich" not in sys.modules:
    # It would be loaded, some MiB of it, for tracebacks in colours, which no log of a daemon has.
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog  # noqa: F401 - so that it finds none

    del sys.modules["rich"]
