"""Building the image, and keeping built ones by the stamp of their recipe.

An image is in the cache whole or not at all: it is built in a folder beside and renamed. One
builder at a time works in a cache; others wait and find the image made.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO

from daemon.durable import make_folder, storage_error, sync_folder
from replication.errors import ConfigError, StorageError
from vsphere_emu.image.apt_source import KEYRING_DEFAULT, find_source
from vsphere_emu.image.recipe import PARTITION_OFFSET_BYTES, Recipe
from vsphere_emu.tool import run_tool

CACHE_FOLDER_DEFAULT = "/var/cache/understudy"
CACHE_VARIABLE = "UNDERSTUDY_CACHE"
"""Of the environment: another folder for built images."""

IMAGES_KEPT_MAX = 4
BUILD_SECONDS_MAX = 1800.0
OUTPUT_CHARACTERS_SHOWN = 3000
SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "build.sh")
TOOLS = ("debootstrap", "extlinux", "parted", "unshare", "setpriv", "mkfs.ext4")
_BUILDING = "building-"

Tell = Callable[[str], object]
"""Hears, for a person, what is going on."""


def _silent(_text: str) -> None:
    pass


def default_recipe() -> Recipe:
    """The recipe of the lab's machine, with the script that carries it out."""
    return with_script(Recipe())


def with_script(recipe: Recipe) -> Recipe:
    """The recipe, its stamp now also over the script that carries it out."""
    with open(SCRIPT, encoding="utf-8") as file:
        return replace(recipe, script=file.read())


def cache_folder() -> str:
    """Where built images are kept."""
    return os.environ.get(CACHE_VARIABLE) or CACHE_FOLDER_DEFAULT


def cached_path(recipe: Recipe, folder: str) -> str:
    """Where the image of a recipe lies once it is built."""
    return os.path.join(os.path.abspath(folder), f"debian-{recipe.stamp}.img")


def ensure_image(
    recipe: Recipe,
    folder: str,
    *,
    mirror: str | None = None,
    fresh: bool = False,
    tell: Tell = _silent,
) -> str:
    """The path of the built image, read-only to all; built first if it is not there.

    mirror: of Debian; the one that apt is configured with if absent.
    fresh:  build anew, with the packages as they are now.

    Raises ConfigError (a tool or an archive is missing, no root), StorageError (it failed, with
    the end of what was printed).
    """
    path = cached_path(recipe, folder)
    if os.path.exists(path) and not fresh:
        _touch(path)
        return path
    if os.geteuid() != 0:
        raise ConfigError("only root can build an image: it needs mounts", hint="sudo make image")
    with _alone(folder, tell):
        if os.path.exists(path) and not fresh:
            return path
        _remove_leftovers(folder)
        _build(recipe, path, mirror, tell)
        _forget_old(folder, path)
    return path


def copy_image(image: str, output: str) -> None:
    """Copy the image to ``output``, sparse, or sharing its blocks; whole or not at all."""
    folder = os.path.dirname(os.path.abspath(output))
    pending = ""
    try:
        fd, pending = tempfile.mkstemp(prefix=f".{os.path.basename(output)}.", dir=folder)
        os.close(fd)
        run_tool("cp", "--sparse=always", "--reflink=auto", image, pending)
        run_tool("sync", pending)
        os.chmod(pending, 0o644)
        os.rename(pending, output)
        sync_folder(folder)
    except OSError as error:
        raise storage_error("write", output, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(pending)


def _build(recipe: Recipe, path: str, mirror: str | None, tell: Tell) -> None:
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for tool in TOOLS:
        if shutil.which(tool, path=search) is None:
            raise ConfigError(f"{tool} is not installed", hint="make setup")
    source = None if mirror else find_source(recipe.suite)
    folder = os.path.dirname(path)
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=folder) as work:
        _lay_out(recipe, work)
        environment = {
            "PATH": search,
            "WORK": work,
            "SUITE": recipe.suite,
            "MIRROR": mirror or (source.uri if source else ""),
            "KEYRING": source.keyring if source else KEYRING_DEFAULT,
            "SIZE_BYTES": str(recipe.size_bytes),
            "OFFSET_BYTES": str(PARTITION_OFFSET_BYTES),
        }
        _run_script(environment, tell)
        image = os.path.join(work, "disk.img")
        os.chmod(image, 0o444)
        os.rename(image, path)
        sync_folder(folder)


def _lay_out(recipe: Recipe, work: str) -> None:
    """What the script reads."""
    lists = {
        "packages": recipe.packages,
        "enabled": recipe.enabled,
        "masked": recipe.masked,
        "trimmed": recipe.trimmed,
        "copied": tuple(f"{source} {target}" for source, target in recipe.copied),
        "arguments": (recipe.kernel_arguments,),
    }
    for name, words in lists.items():
        with open(os.path.join(work, name), "w", encoding="utf-8") as file:
            file.writelines(f"{word}\n" for word in words)
    overlay = os.path.join(work, "overlay")
    os.mkdir(overlay, 0o755)
    contents = [(one.path, one.content, one.mode) for one in recipe.files]
    contents.append(("/etc/machine-id", f"{recipe.machine_id}\n", 0o444))
    for path, content, mode in contents:
        target = overlay + path
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        with open(target, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(target, mode)


def _run_script(environment: dict[str, str], tell: Tell) -> None:
    """Run it so that it ends with us: the namespaces, and all in them, go with their first
    process, and that goes with its parent.
    """
    command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--fork"]
    command += ["--kill-child=KILL", "--mount-proc", "bash", SCRIPT]
    with tempfile.TemporaryFile() as output:
        tell("building a bootable Debian (about two minutes; the next time it is there)")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            umask=0o022,
            env={**os.environ, **environment},
        )
        try:
            code = process.wait(BUILD_SECONDS_MAX)
        except subprocess.TimeoutExpired as error:
            raise StorageError(
                f"the image was not built within {BUILD_SECONDS_MAX:.0f} s: {_tail(output)}"
            ) from error
        finally:
            process.kill()
            process.wait()
        if code != 0:
            raise StorageError(
                f"the image cannot be built (exit code {code}): {_tail(output)}",
                hint="check the network and apt's sources",
            )


def _tail(output: IO[bytes]) -> str:
    output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_CHARACTERS_SHOWN))
    return output.read().decode(errors="replace").strip()


@contextlib.contextmanager
def _alone(folder: str, tell: Tell) -> Iterator[None]:
    make_folder(folder, mode=0o755)
    fd = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another process builds an image: waiting for it")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_leftovers(folder: str) -> None:
    """Folders of builders that were killed; whoever holds the lock is the only builder."""
    for name in os.listdir(folder):
        if name.startswith(_BUILDING):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def _forget_old(folder: str, kept: str) -> None:
    """Keep the IMAGES_KEPT_MAX images that were used last."""
    images = [
        os.path.join(folder, name)
        for name in os.listdir(folder)
        if name.startswith("debian-") and name.endswith(".img")
    ]
    others = sorted((one for one in images if one != kept), key=os.path.getmtime, reverse=True)
    for path in others[IMAGES_KEPT_MAX - 1 :]:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _touch(path: str) -> None:
    """Remember that it was used; who may not write there does not count."""
    with contextlib.suppress(OSError):
        os.utime(path)
