"""Networks of VMs: a Linux network namespace and a bridge each, with a tap for every VM.

The namespace of an isolated network has no way out at all. Another one has a pair of interfaces to
the uplink's namespace, if the configuration names one. A network is made when its first VM is, and
goes with its last; each step may be done again. What lies in the namespace goes with it.

Source: ip-netns(8), ip-link(8); dnsmasq(8).
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from azure_emu.compute.address import (
    bridge_address,
    free_address,
    free_network,
    mac_of,
    uplink_address,
)
from azure_emu.compute.config import NetworkConfig
from azure_emu.compute.process import find_processes, has_argument, kill
from azure_emu.compute.tool import run_tool, try_tool
from daemon.durable import make_folder, write_whole
from replication.errors import ConflictError, StorageError

BRIDGE = "br0"
SLUG_CHARACTERS_MAX = 20
DIGEST_CHARACTERS = 32
NETWORK_SLUG_CHARACTERS = SLUG_CHARACTERS_MAX + 1 + DIGEST_CHARACTERS
RECORD = "network.json"
CONFIGURATION = "dnsmasq.conf"
"""Empty, and of each network's own: by that argument its dnsmasq is found."""

NAMESPACES = "/run/netns"
LEASE_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Attachment:
    """Where a VM is in its network: ``tap`` is the interface in ``namespace`` that is its own."""

    namespace: str
    tap: str
    mac: str
    address: ipaddress.IPv4Interface
    gateway: ipaddress.IPv4Address


@dataclass(frozen=True, slots=True)
class Network:
    """name: as ordered. subnet: its part of the pool. vms: addresses by VM."""

    name: str
    namespace: str
    isolated: bool
    subnet: ipaddress.IPv4Network
    vms: dict[uuid.UUID, ipaddress.IPv4Address]

    def attachment(self, vm: uuid.UUID) -> Attachment:
        return Attachment(
            namespace=self.namespace,
            tap=f"tap-{vm.hex[:10]}",
            mac=mac_of(vm.bytes),
            address=ipaddress.IPv4Interface(f"{self.vms[vm]}/{self.subnet.prefixlen}"),
            gateway=bridge_address(self.subnet),
        )


class Networks:
    """All networks of a compute node; one change at a time."""

    def __init__(self, folder: str, config: NetworkConfig) -> None:
        """Read what is written down in ``folder``. Raises StorageError for what cannot be read."""
        self._folder = folder
        self._config = config
        self._lock = asyncio.Lock()
        make_folder(folder)
        self._networks: dict[str, Network] = {}
        for entry in os.listdir(folder):
            path = os.path.join(folder, entry, RECORD)
            with contextlib.suppress(FileNotFoundError):
                network = _read(path)
                self._networks[network.name] = network

    async def attach(self, vm: uuid.UUID, name: str, *, isolated: bool) -> Attachment:
        """Make the network if it is missing, and the VM's tap in it.

        Raises ConflictError for a network that is isolated otherwise, or whose slug another one
        has; LimitError without room, StorageError.
        """
        async with self._lock:
            network = self._networks.get(name)
            if network is None:
                self._refuse_shared_slug(name)
                taken = [other.subnet for other in self._networks.values()]
                subnet = free_network(self._config.addresses, self._config.prefix, taken)
                network = Network(name, self._namespace(name), isolated, subnet, {})
            if network.isolated is not isolated:
                told = "isolated" if network.isolated else "not isolated"
                raise ConflictError(f"network {name} is {told}", hint="choose another name")
            if vm not in network.vms:
                address = free_address(network.subnet, network.vms.values())
                network = Network(
                    name, network.namespace, isolated, network.subnet, network.vms | {vm: address}
                )
                self._write(network)
            await self._make(network)
            attachment = network.attachment(vm)
            await self._make_tap(attachment)
            return attachment

    async def detach(self, vm: uuid.UUID, name: str) -> None:
        """Take the VM out; with the last one the network goes. Fine if it is out already."""
        async with self._lock:
            network = self._networks.get(name)
            if network is None:
                return
            tap = f"tap-{vm.hex[:10]}"
            rest = {other: address for other, address in network.vms.items() if other != vm}
            if rest:
                await try_tool("ip", "-n", network.namespace, "link", "delete", tap)
                if vm in network.vms:
                    self._write(
                        Network(name, network.namespace, network.isolated, network.subnet, rest)
                    )
                return
            await self._remove(network)

    async def remove_unused(self, used: set[uuid.UUID]) -> None:
        """Take out every VM that is not ``used`` any more, as after a kill."""
        for network in list(self._networks.values()):
            for vm in set(network.vms) - used:
                await self.detach(vm, network.name)

    def attachment(self, vm: uuid.UUID, name: str) -> Attachment | None:
        """Where a VM is, if it is in that network."""
        network = self._networks.get(name)
        return network.attachment(vm) if network is not None and vm in network.vms else None

    def _refuse_shared_slug(self, name: str) -> None:
        """Two networks in one namespace would reach each other."""
        for other in self._networks.values():
            if self._namespace(name) == other.namespace or self._place(name) == self._place(
                other.name
            ):
                raise ConflictError(
                    f"network {name} would share a namespace with {other.name}",
                    hint="choose another name",
                )

    def _place(self, name: str) -> str:
        return os.path.join(self._folder, slug_of(name))

    def _namespace(self, name: str) -> str:
        return f"{self._config.namespaces}-{slug_of(name)}"

    def _write(self, network: Network) -> None:
        make_folder(self._place(network.name))
        tree = {
            "name": network.name,
            "namespace": network.namespace,
            "isolated": network.isolated,
            "subnet": str(network.subnet),
            "vms": {str(vm): str(address) for vm, address in network.vms.items()},
        }
        write_whole(os.path.join(self._place(network.name), RECORD), json.dumps(tree).encode())
        self._networks[network.name] = network

    async def _make(self, network: Network) -> None:
        space = network.namespace
        if not _exists(space):
            await run_tool("ip", "netns", "add", space)
        if not await self._has(space, BRIDGE):
            await run_tool("ip", "-n", space, "link", "add", BRIDGE, "type", "bridge")
        address = f"{bridge_address(network.subnet)}/{network.subnet.prefixlen}"
        await run_tool("ip", "-n", space, "address", "replace", address, "dev", BRIDGE)
        for interface in ("lo", BRIDGE):
            await run_tool("ip", "-n", space, "link", "set", interface, "up")
        if not network.isolated and self._config.uplink:
            await self._join_uplink(network)
        if self._config.dhcp:
            await self._serve_addresses(network)

    async def _join_uplink(self, network: Network) -> None:
        space, uplink = network.namespace, self._config.uplink
        outer = _outer_interface(network)
        if not await self._has(uplink, outer):
            pair = ["link", "add", "uplink", "type", "veth", "peer", "name", outer]
            await run_tool("ip", "-n", space, *pair, "netns", uplink)
        await run_tool("ip", "-n", space, "link", "set", "uplink", "master", BRIDGE, "up")
        address = f"{uplink_address(network.subnet)}/{network.subnet.prefixlen}"
        await run_tool("ip", "-n", uplink, "address", "replace", address, "dev", outer)
        await run_tool("ip", "-n", uplink, "link", "set", outer, "up")

    async def _make_tap(self, attachment: Attachment) -> None:
        space, tap = attachment.namespace, attachment.tap
        if not await self._has(space, tap):
            await run_tool("ip", "-n", space, "tuntap", "add", tap, "mode", "tap")
        await run_tool("ip", "-n", space, "link", "set", tap, "master", BRIDGE, "up")

    async def _has(self, namespace: str, interface: str) -> bool:
        code, _, _ = await try_tool("ip", "-n", namespace, "link", "show", interface)
        return code == 0

    async def _serve_addresses(self, network: Network) -> None:
        """dnsmasq, started anew when there is a VM that it does not know."""
        place = self._place(network.name)
        hosts = [f"--dhcp-host={mac_of(vm.bytes)},{at}" for vm, at in network.vms.items()]
        running = _address_servers(place)
        if running and all(has_argument(running[0], host) for host in hosts):
            return
        for process in running:
            await kill(process)
        first, mask = bridge_address(network.subnet) + 1, network.subnet.netmask
        router = "--dhcp-option=option:router"  # without a value: none is told
        if not network.isolated and self._config.uplink:
            router += f",{uplink_address(network.subnet)}"
        await asyncio.to_thread(Path(place, CONFIGURATION).touch)
        await run_tool(
            "nsenter",
            f"--net={NAMESPACES}/{network.namespace}",
            "--",
            "dnsmasq",
            _mark(place),
            "--pid-file",  # without a value: none is written, which would be given to nobody
            "--port=0",
            "--bind-interfaces",
            f"--interface={BRIDGE}",
            f"--dhcp-range={first},static,{mask},{LEASE_SECONDS}",
            "--leasefile-ro",
            "--user=nobody",
            router,
            *hosts,
        )

    async def _remove(self, network: Network) -> None:
        place = self._place(network.name)
        for process in _address_servers(place):
            await kill(process)
        outer = _outer_interface(network)
        if (
            not network.isolated
            and self._config.uplink
            and await self._has(self._config.uplink, outer)
        ):
            await run_tool("ip", "-n", self._config.uplink, "link", "delete", outer)
        if _exists(network.namespace):
            await run_tool("ip", "netns", "delete", network.namespace)
        await asyncio.to_thread(_remove_folder, place)
        self._networks.pop(network.name, None)


def slug_of(name: str) -> str:
    """A name of letters, digits and hyphens; that two names have the same is next to impossible."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:SLUG_CHARACTERS_MAX]
    return f"{plain or 'net'}-{hashlib.sha256(name.encode()).hexdigest()[:DIGEST_CHARACTERS]}"


def _exists(namespace: str) -> bool:
    return os.path.exists(os.path.join(NAMESPACES, namespace))


def _mark(place: str) -> str:
    return f"--conf-file={place}/{CONFIGURATION}"


def _address_servers(place: str) -> list[int]:
    """Processes of the network's dnsmasq; one that was started before an upgrade writes its id."""
    return [*find_processes(_mark(place)), *find_processes(f"--pid-file={place}/dnsmasq.pid")]


def _outer_interface(network: Network) -> str:
    return f"us-{hashlib.sha256(network.namespace.encode()).hexdigest()[:10]}"


def _read(path: str) -> Network:
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
        return Network(
            name=tree["name"],
            namespace=tree["namespace"],
            isolated=tree["isolated"],
            subnet=ipaddress.IPv4Network(tree["subnet"]),
            vms={uuid.UUID(vm): ipaddress.IPv4Address(at) for vm, at in tree["vms"].items()},
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _remove_folder(place: str) -> None:
    """The record first: without it the rest is nobody's."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(place, RECORD))
    shutil.rmtree(place, ignore_errors=True)
