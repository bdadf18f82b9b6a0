"""Addresses of networks and VMs: pure, the lowest free one each.

Of a network the first address is the bridge's, the last one the uplink's; VMs get those between.
"""

import hashlib
import ipaddress
from collections.abc import Collection

from replication.errors import LimitError

MAC_PREFIX = "52:54:00"


def free_network(
    pool: ipaddress.IPv4Network, prefix: int, taken: Collection[ipaddress.IPv4Network]
) -> ipaddress.IPv4Network:
    """Raises LimitError when the pool has no room."""
    taken = set(taken)
    for candidate in pool.subnets(new_prefix=prefix):
        if candidate not in taken and not any(candidate.overlaps(other) for other in taken):
            return candidate
    raise LimitError(
        f"no room for another network: {pool} holds {1 << (prefix - pool.prefixlen)} of /{prefix}",
        hint="clean up test failovers that are over, or give network.pool more",
    )


def free_address(
    network: ipaddress.IPv4Network, taken: Collection[ipaddress.IPv4Address]
) -> ipaddress.IPv4Address:
    """Raises LimitError when the network has no room."""
    taken = set(taken)
    last = network.broadcast_address - 1
    candidate = bridge_address(network) + 1
    while candidate < last:
        if candidate not in taken:
            return candidate
        candidate += 1
    raise LimitError(
        f"no room for another VM: {network} has {max(0, network.num_addresses - 4)} for them",
        hint="a smaller network.prefix makes networks larger",
    )


def bridge_address(network: ipaddress.IPv4Network) -> ipaddress.IPv4Address:
    return network.network_address + 1


def uplink_address(network: ipaddress.IPv4Network) -> ipaddress.IPv4Address:
    return network.broadcast_address - 1


def mac_of(vm: bytes) -> str:
    """A MAC address that a VM always has, by its id."""
    digest = hashlib.sha256(vm).digest()
    return MAC_PREFIX + "".join(f":{byte:02x}" for byte in digest[:3])
