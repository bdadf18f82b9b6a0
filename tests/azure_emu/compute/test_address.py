import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azure_emu.compute.address import (
    bridge_address,
    free_address,
    free_network,
    mac_of,
    uplink_address,
)
from replication.errors import LimitError

POOL = ipaddress.IPv4Network("10.90.0.0/16")
SMALL = ipaddress.IPv4Network("10.0.0.0/29")


@given(st.sets(st.integers(0, 255), max_size=255))
def test_a_network_is_the_lowest_that_is_free(taken_indices: set[int]) -> None:
    subnets = list(POOL.subnets(new_prefix=24))
    taken = [subnets[index] for index in taken_indices]
    found = free_network(POOL, 24, taken)
    assert found == next(one for one in subnets if one not in taken)


def test_a_network_of_another_size_is_never_overlapped() -> None:
    taken = [ipaddress.IPv4Network("10.90.0.0/23")]
    assert free_network(POOL, 24, taken) == ipaddress.IPv4Network("10.90.2.0/24")


def test_a_pool_without_room_says_what_to_do() -> None:
    taken = list(POOL.subnets(new_prefix=24))
    with pytest.raises(LimitError, match=r"10\.90\.0\.0/16 holds 256 of /24") as raised:
        free_network(POOL, 24, taken)
    assert raised.value.hint


def test_addresses_of_a_network_are_all_given_out_once() -> None:
    given_out: list[ipaddress.IPv4Address] = []
    for _ in range(4):
        given_out.append(free_address(SMALL, given_out))
    assert len(set(given_out)) == 4
    assert not {bridge_address(SMALL), uplink_address(SMALL)} & set(given_out)
    assert all(each in SMALL for each in given_out)
    with pytest.raises(LimitError, match="has 4 for them"):
        free_address(SMALL, given_out)


@given(st.binary(min_size=16, max_size=16))
def test_a_mac_is_one_that_nobody_sells(vm: bytes) -> None:
    octets = mac_of(vm).split(":")
    assert len(octets) == 6
    assert int(octets[0], 16) & 0b11 == 0b10
