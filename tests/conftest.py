"""What all tests share."""

import os
from pathlib import Path

# Azurite is started very often: a quarter of what a start costs is compiling its JavaScript.
os.environ.setdefault(
    "NODE_COMPILE_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "node")
)
