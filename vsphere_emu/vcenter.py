"""The emulated vCenter: govmomi's simulator as a child, its VMs' power followed by the guests.

It keeps nothing: each start takes over what the guests are just then, from the kernel. What was
changed through its API alone (names, folders, further disks) is as in the configuration again.

Source: docs/VSPHERE_EMULATOR.md.
"""

import asyncio
import json
import os
import shutil

import structlog

from daemon.durable import make_folder, write_whole
from daemon.folder_lock import FolderLock
from daemon.supervised import Supervised, child_environment
from replication.errors import ConfigError
from vsphere_emu.certificate import own_certificate
from vsphere_emu.config import Config, Tls
from vsphere_emu.datastore import Datastore
from vsphere_emu.fixture import render
from vsphere_emu.guest import Guest
from vsphere_emu.power import PowerSwitch

LAUNCHER = os.path.join(os.path.dirname(__file__), "vcsim", "build", "vcsim")

_log = structlog.get_logger()


class VCenter:
    """A vCenter that answers from ``start`` until ``stop``."""

    def __init__(self, config: Config) -> None:
        if config.vcenter is None:
            raise ConfigError("the configuration has no [vcenter]", hint="add one: user, password")
        if not os.access(LAUNCHER, os.X_OK):
            raise ConfigError(f"the launcher {LAUNCHER} is missing", hint="make setup")
        self._config = config
        self._vcenter = config.vcenter
        self._vcenter.read_password()
        self.folder = os.path.join(os.path.abspath(config.root_folder), "vcenter")
        self._datastore = Datastore(config.datastore.name, config.datastore.folder)
        self.switches = {
            guest.name: PowerSwitch(Guest(guest, self._datastore, config.root_folder))
            for guest in config.guests
        }
        self._answers = False
        self._lock: FolderLock | None = None
        self.service = Supervised(
            f"vcenter {self._vcenter.name}",
            (self._vcenter.host, self._vcenter.port),
            (LAUNCHER, self._fixture_path),
            child_environment(TMPDIR=os.path.join(self.folder, "tmp")),
            self._probe,
            prepare=self._prepare,
            hear=self._hear,
        )

    async def start(self) -> None:
        """Return when it answers.

        Raises ConfigError when its port or its folder is in use.
        """
        make_folder(self.folder)
        in_use = ConfigError(
            f"{self.folder} is in use by another emulator",
            hint="end that one, or give this one a root_folder of its own",
        )
        self._lock = FolderLock(self.folder, in_use)
        try:
            await self.service.start()
        except BaseException:
            self._release()
            raise

    async def run(self) -> None:
        """Keep it running and let the guests follow; until cancelled or stopped."""
        async with asyncio.TaskGroup() as tasks:
            for switch in self.switches.values():
                tasks.create_task(switch.follow())
            await self.service.supervise()

    async def stop(self) -> None:
        """It is gone on return; the guests stay as they are."""
        await self.service.stop()
        for name in ("tmp", "synthetic"):
            shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def _fixture_path(self) -> str:
        return os.path.join(self.folder, "fixture.json")

    async def _probe(self) -> bool:
        return self._answers

    async def _prepare(self) -> None:
        self._answers = False
        await asyncio.to_thread(self._write_fixture)

    def _write_fixture(self) -> None:
        for name in ("tmp", "synthetic"):  # a child that was killed leaves its own behind
            path = os.path.join(self.folder, name)
            shutil.rmtree(path, ignore_errors=True)
            make_folder(path)
        for switch in self.switches.values():
            switch.guest.create_disks()
        fixture = render(
            self._config,
            self._vcenter,
            tls=self._tls(),
            folder=self._datastore.folder,
            powered_on=[name for name, one in self.switches.items() if one.is_on()],
            synthetic_folder=os.path.join(self.folder, "synthetic"),
        )
        make_folder(self._datastore.folder)
        write_whole(self._fixture_path, json.dumps(fixture, indent=1).encode())

    def _tls(self) -> Tls:
        given = self._vcenter.tls
        if given is None:
            return own_certificate(self.folder, self._vcenter.name, self._vcenter.host)
        for path in (given.certificate, given.key):
            if not os.access(path, os.R_OK):
                raise ConfigError(f"vcenter.tls: cannot read {path}")
        return Tls(certificate=os.path.abspath(given.certificate), key=os.path.abspath(given.key))

    def _hear(self, line: str) -> None:
        """A line of the child: JSON for us, or its log."""
        try:
            told = json.loads(line)
        except ValueError:
            return
        match told:
            case {"ready": str()}:
                self._answers = True
            case {"machine": str(name), "is_on": bool(is_on), "is_cut": bool(is_cut)} if (
                name in self.switches
            ):
                _log.info("VM's power changed", machine=name, on=is_on, cut=is_cut)
                self.switches[name].turn(on=is_on, cut=is_cut)
