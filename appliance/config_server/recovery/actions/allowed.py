"""What plans may use of this host: programs and keys below folders that its configuration names.

The folders are the host's administrator's, and so is what is in them: a file that somebody else
may write, or whose folder somebody else may write, is refused, for its writer would act as this
daemon. What is checked is the file that a path ends at, links followed.
"""

import os
import shlex
import stat
from collections.abc import Sequence

from replication.errors import AccessError, ConfigError, InputError, NotFoundError

TRUSTED_OWNERS = frozenset({0, os.geteuid()})
"""Root; and who runs this daemon, who could do as much anyway."""


def program_of(folder: str | None, command: str) -> tuple[str, ...]:
    """A command's words, the first one as the path of a program that may run here.

    Raises ConfigError when nothing may, InputError for what is no command, NotFoundError,
    AccessError for a file that others may write.
    """
    if folder is None:
        raise ConfigError(
            "this config server runs no scripts on its host",
            hint="its administrator names a folder: recovery.scripts_folder",
        )
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"the command cannot be read: {error}") from error
    if not words:
        raise InputError("the command has no words")
    path = file_below(folder, words[0])
    if not os.access(path, os.X_OK):
        raise AccessError(f"{path} is not executable", hint=f"chmod +x {path}")
    return (path, *words[1:])


def file_below(folder: str, name: str, *, secret: bool = False) -> str:
    """A file below ``folder`` that is trusted. ``secret``: nobody else may read it either."""
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if not path.startswith(root + os.sep):
        raise AccessError(f"{name!r:.200} is not below {folder}")
    try:
        info = os.stat(path)
        folders = [os.stat(each) for each in _folders(path)]
    except OSError as error:
        raise NotFoundError(
            f"there is no file {path}: {error.strerror}",
            hint=f"the administrator of the config server puts it into {folder}",
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise AccessError(f"{path} is no file")
    below = len(_folders(path)) - len(_folders(root))
    for place, each in enumerate((info, *folders)):
        # Above the folder a sticky one, as /tmp, lets nobody rename what is root's.
        is_sticky = place > below and each.st_mode & stat.S_ISVTX
        is_open = each.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky
        if each.st_uid not in TRUSTED_OWNERS or is_open:
            raise AccessError(
                f"others than root may write {path} or a folder that it is in",
                hint=f"chown root: and chmod go-w, {root} and what is above and below it",
            )
    if secret and info.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise AccessError(f"others may read the key {path}", hint=f"chmod go= {path}")
    return path


def _folders(path: str) -> Sequence[str]:
    """Those that a path is in, from the innermost to the root."""
    folders = [os.path.dirname(path)]
    while folders[-1] != os.sep:
        folders.append(os.path.dirname(folders[-1]))
    return folders
