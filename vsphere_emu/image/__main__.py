"""``python -m vsphere_emu.image build OUT.img``: the bootable Debian of the lab."""

import argparse
import sys
from collections.abc import Sequence

from daemon.service import fail
from replication.errors import ReplicationError
from vsphere_emu.image.builder import cache_folder, copy_image, default_recipe, ensure_image


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 or that of the error's class."""
    parser = argparse.ArgumentParser(prog="understudy-image", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="build the image, or take the one that is built")
    build.add_argument("output", nargs="?", help="a copy of it; without, it is only in the cache")
    build.add_argument("--cache", default=cache_folder(), help="where built images are kept")
    build.add_argument("--mirror", help="of Debian; the one apt is configured with if absent")
    build.add_argument("--fresh", action="store_true", help="with the packages as they are now")
    asked = parser.parse_args(arguments)
    try:
        path = ensure_image(
            default_recipe(), asked.cache, mirror=asked.mirror, fresh=asked.fresh, tell=_tell
        )
        if asked.output:
            copy_image(path, asked.output)
    except ReplicationError as error:
        return fail(error)
    sys.stdout.write(f"{asked.output or path}\n")
    return 0


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
