"""One vCenter, read over its API (pyvmomi) in a thread: everything once, then what changes.

The filter of changes leaves the devices out, which make it slow; ``config.changeVersion`` moves
when they change. A VM that changed is read again whole. Places (folders, datacenters, hosts) are
small and come along with the changes.

Properties are only read through the property collector, where one that is not set is absent: as
attributes of an object they raise, and each costs a round trip.

Source: vSphere Web Services API, PropertyCollector (CreateFilter, WaitForUpdatesEx,
RetrievePropertiesEx), ViewManager, SessionManager; docs/adr/0013-pyvmomi-and-govmomi.md.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pyVmomi import SoapAdapter, vim, vmodl

from appliance.config_server.discovery.inventory import (
    Place,
    Vm,
    folder_path,
    place_from,
    vm_from,
)
from appliance.config_server.discovery.news import Alive, Connected, Deliver, Delta, Snapshot
from appliance.config_server.discovery.target import Target, parse_url, tls_context

API_VERSION = "vim.version.version11"
"""6.5: every vCenter from 6.5 on speaks it, and it has all that is read here."""

HTTP_SECONDS_MAX = 30.0
UPDATE_SECONDS_MAX = 10
"""A call for changes ends by itself after so long; well below HTTP_SECONDS_MAX."""

PAGE_OBJECTS = 100
UPDATE_OBJECTS = 500
PLACE_KINDS = ("Folder", "Datacenter", "HostSystem")
WATCHED = (
    "name",
    "parent",
    "runtime.powerState",
    "runtime.host",
    "config.changeVersion",
    "guest.hostName",
    "guest.ipAddress",
    "guest.toolsRunningStatus",
)
READ = (
    "name",
    "parent",
    "runtime.powerState",
    "runtime.host",
    "config.uuid",
    "config.guestId",
    "config.guestFullName",
    "config.hardware.device",
    "guest.hostName",
    "guest.ipAddress",
    "guest.net",
    "guest.toolsRunningStatus",
)

# pyvmomi makes its classes when they are first asked for: their types are not known before.
_vim: Any = vim
_query: Any = vmodl.query.PropertyCollector
_soap: Any = SoapAdapter
GONE: type[Exception] = vmodl.fault.ManagedObjectNotFound


class Session:
    """A login at a vCenter, and the view of its VMs. Use it in one thread alone."""

    def __init__(self, target: Target) -> None:
        """Log in. Raises what pyvmomi and sockets raise: see trouble.py."""
        address = parse_url(target.url)
        self._stub = _soap.SoapStubAdapter(
            host=address.host,
            port=address.port,
            path=address.path,
            version=API_VERSION,
            sslContext=tls_context(target.verify, target.ca_pem),
            httpConnectionTimeout=HTTP_SECONDS_MAX,
        )
        try:
            self.content = _vim.ServiceInstance("ServiceInstance", self._stub).RetrieveContent()
            self.content.sessionManager.Login(target.username, target.password, None)
        except BaseException:
            self._stub.DropConnections()
            raise
        self.instance_uuid = str(self.content.about.instanceUuid or "")
        self._collector = self.content.propertyCollector
        self._vms: dict[str, Vm] = {}
        self._where: dict[str, tuple[str, str]] = {}
        self._places: dict[str, Place] = {}

    def close(self) -> None:
        """Log out if that is still possible."""
        with contextlib.suppress(Exception):
            self.content.sessionManager.Logout()
        self._stub.DropConnections()

    def virtual_machine(self, moid: str) -> Any:
        """The VM of that moid, whether or not there is one."""
        return _vim.VirtualMachine(moid, self._stub)

    def properties(self, of: Any, *paths: str) -> dict[str, Any]:
        """Those properties of one object that are set. Raises GONE where there is none."""
        spec = _query.FilterSpec(
            objectSet=[_query.ObjectSpec(obj=of, skip=False)],
            propSet=[_query.PropertySpec(type=type(of), pathSet=list(paths), all=False)],
        )
        return {one.name: one.val for told in self._retrieve(spec) for one in told.propSet}

    def follow(self, deliver: Deliver, stop: threading.Event) -> None:
        """Tell everything, then changes, until ``stop``. Raises when the session is of no use."""
        deliver(Connected(self.instance_uuid))
        view = self.content.viewManager.CreateContainerView(
            self.content.rootFolder,
            [_vim.VirtualMachine, _vim.Folder, _vim.Datacenter, _vim.HostSystem],
            True,
        )
        # The filter is there before the reading: what changes in between is told afterwards.
        self._collector.CreateFilter(_spec(view, {"VirtualMachine": WATCHED, **_PLACES}), False)
        version = ""
        for update in self._updates(version, 0):
            version = update.version
            self._take_places(_objects(update))
        self._read(_spec(view, {"VirtualMachine": READ}))
        deliver(Snapshot(dict(self._vms)))
        while not stop.is_set():
            changed: dict[str, Any] = {}
            removed: set[str] = set()
            places = False
            for update in self._updates(version, UPDATE_SECONDS_MAX):
                version = update.version
                objects = _objects(update)
                places |= self._take_places(objects)
                for one in objects:
                    if one.obj._wsdlName == "VirtualMachine":  # noqa: SLF001
                        moid = one.obj._moId  # noqa: SLF001
                        changed.pop(moid, None)
                        removed.discard(moid)
                        if one.kind == "leave":
                            removed.add(moid)
                        else:
                            changed[moid] = one.obj
            deliver(self._delta(changed, removed, places=places))

    def _delta(
        self, changed: Mapping[str, Any], removed: set[str], *, places: bool
    ) -> Delta | Alive:
        before = dict(self._vms)
        for moid in removed | self._read_again(changed):
            self._vms.pop(moid, None)
            self._where.pop(moid, None)
        if places:
            for moid, vm in self._vms.items():
                self._vms[moid] = self._placed(vm)
        told = {moid: vm for moid, vm in self._vms.items() if before.get(moid) != vm}
        gone = frozenset(before.keys() - self._vms.keys())
        return Delta(told, gone) if told or gone else Alive()

    def _updates(self, version: str, seconds: int) -> Iterator[Any]:
        """All updates since ``version``: the first may take so many seconds, the rest is there."""
        options = _query.WaitOptions(maxWaitSeconds=seconds, maxObjectUpdates=UPDATE_OBJECTS)
        while True:
            update = self._collector.WaitForUpdatesEx(version, options)
            if update is None:
                return
            yield update
            if not update.truncated:
                return
            version = update.version

    def _take_places(self, objects: Iterable[Any]) -> bool:
        """Note folders, datacenters and hosts; return whether any of them is another now."""
        before = dict(self._places)
        for one in objects:
            kind, moid = one.obj._wsdlName, one.obj._moId  # noqa: SLF001
            if kind not in PLACE_KINDS:
                continue
            if one.kind == "leave":
                self._places.pop(moid, None)
                continue
            told = {change.name: change.val for change in one.changeSet}
            new = place_from(kind, told)
            old = self._places.get(moid, new)
            self._places[moid] = Place(
                kind,
                new.name if "name" in told else old.name,
                new.parent if "parent" in told else old.parent,
            )
        return before != self._places

    def _read(self, spec: Any) -> None:
        for told in self._retrieve(spec):
            properties = {one.name: one.val for one in told.propSet}
            moid = told.obj._moId  # noqa: SLF001
            self._where[moid] = (
                getattr(properties.get("parent"), "_moId", ""),
                getattr(properties.get("runtime.host"), "_moId", ""),
            )
            self._vms[moid] = vm_from(moid, properties, self._places)

    def _retrieve(self, spec: Any) -> Iterator[Any]:
        page = self._collector.RetrievePropertiesEx(
            [spec], _query.RetrieveOptions(maxObjects=PAGE_OBJECTS)
        )
        while page is not None:
            yield from page.objects
            if not page.token:
                return
            page = self._collector.ContinueRetrievePropertiesEx(page.token)

    def _read_again(self, changed: Mapping[str, Any]) -> set[str]:
        """Read those VMs whole; return which of them are gone meanwhile."""
        found = list(changed.values())
        for start in range(0, len(found), PAGE_OBJECTS):
            some = found[start : start + PAGE_OBJECTS]
            try:
                self._read(_spec_of(some))
            except GONE:  # one of them makes the whole question fail: ask one by one
                return self._read_singly(changed)
        return set()

    def _read_singly(self, changed: Mapping[str, Any]) -> set[str]:
        gone = set()
        for moid, vm in changed.items():
            try:
                self._read(_spec_of([vm]))
            except GONE:
                gone.add(moid)
        return gone

    def _placed(self, vm: Vm) -> Vm:
        parent, host = self._where[vm.moid]
        return dataclasses.replace(
            vm,
            folder=folder_path(parent, self._places),
            host=self._places[host].name if host in self._places else "",
        )


_PLACES: Mapping[str, tuple[str, ...]] = {
    "Folder": ("name", "parent"),
    "Datacenter": ("name", "parent"),
    "HostSystem": ("name",),
}


def _objects(update: Any) -> list[Any]:
    return [one for told in update.filterSet for one in told.objectSet]


def _properties(kinds: Mapping[str, tuple[str, ...]]) -> list[Any]:
    return [
        _query.PropertySpec(type=getattr(_vim, kind), pathSet=list(paths), all=False)
        for kind, paths in kinds.items()
    ]


def _spec(view: Any, kinds: Mapping[str, tuple[str, ...]]) -> Any:
    """Those properties of everything in ``view``."""
    traversal = _query.TraversalSpec(
        name="view", path="view", skip=False, type=_vim.view.ContainerView
    )
    return _query.FilterSpec(
        objectSet=[_query.ObjectSpec(obj=view, skip=True, selectSet=[traversal])],
        propSet=_properties(kinds),
    )


def _spec_of(vms: Iterable[Any]) -> Any:
    return _query.FilterSpec(
        objectSet=[_query.ObjectSpec(obj=vm, skip=False) for vm in vms],
        propSet=_properties({"VirtualMachine": READ}),
    )
