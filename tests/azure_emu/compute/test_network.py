"""Networks in real namespaces. What is asserted of isolation is asked of the kernel."""

import subprocess
import uuid
from collections.abc import Iterator

import pytest

from azure_emu.compute import network
from azure_emu.compute.config import NetworkConfig
from azure_emu.compute.network import NETWORK_SLUG_CHARACTERS, Networks, slug_of
from azure_emu.compute.process import find_processes, has_argument
from replication.errors import ConflictError, LimitError
from tests.azure_emu.compute.site import Place


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def reaches(namespace: str, address: str) -> bool:
    command = ["nsenter", f"--net=/run/netns/{namespace}", "--", "busybox", "ping", "-c1", "-W1"]
    return subprocess.run([*command, address], check=False, capture_output=True).returncode == 0


@pytest.fixture
def uplink(place: Place) -> Iterator[str]:
    name = f"{place.namespaces}-uplink"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def networks(place: Place, **changed: object) -> Networks:
    config = NetworkConfig.model_validate({"namespaces": place.namespaces} | changed)
    return Networks(str(place.data / "networks"), config)


async def test_an_isolated_network_reaches_nothing_and_leaves_nothing(
    place: Place, uplink: str
) -> None:
    first, second = uuid.uuid4(), uuid.uuid4()
    made = networks(place, uplink=uplink)
    one = await made.attach(first, "Test 1!", isolated=True)
    two = await made.attach(second, "Test 1!", isolated=True)
    assert one.namespace == two.namespace
    assert one.address != two.address
    assert one.address.network == two.address.network
    links = ip("-n", one.namespace, "-o", "link")
    assert sorted(line.split(": ")[1] for line in links.splitlines()) == sorted(
        ["lo", "br0", one.tap, two.tap]
    )
    routes = ip("-n", one.namespace, "route").split()
    assert routes[0] == str(one.address.network)
    assert "default" not in routes
    assert not reaches(one.namespace, "10.90.0.254")
    assert not reaches(one.namespace, "192.0.2.1")
    mark = f"--conf-file={place.data}/networks/{slug_of('Test 1!')}/dnsmasq.conf"
    (dnsmasq,) = find_processes(mark)
    assert has_argument(dnsmasq, f"--dhcp-host={two.mac},{two.address.ip}")

    # A restart of the daemon finds all of it, and does nothing twice.
    again = networks(place, uplink=uplink)
    assert await again.attach(first, "Test 1!", isolated=True) == one
    assert again.attachment(second, "Test 1!") == two

    await again.detach(first, "Test 1!")
    assert one.tap not in ip("-n", two.namespace, "-o", "link")
    await again.remove_unused(set())
    await again.detach(second, "Test 1!")
    assert place.left_namespaces() == [uplink]
    assert not (place.data / "networks" / slug_of("Test 1!")).exists()
    assert find_processes(mark) == []


async def test_a_network_with_an_uplink_is_reached_from_there(place: Place, uplink: str) -> None:
    vm = uuid.uuid4()
    made = networks(place, uplink=uplink)
    one = await made.attach(vm, "production", isolated=False)
    assert reaches(uplink, str(one.gateway))
    assert await made.attach(vm, "production", isolated=False) == one
    with pytest.raises(ConflictError, match="is not isolated"):
        await made.attach(uuid.uuid4(), "production", isolated=True)
    await made.detach(vm, "production")
    assert place.left_namespaces() == [uplink]
    assert len(ip("-n", uplink, "-o", "link").splitlines()) == 1


async def test_no_room_is_told_and_leaves_nothing(place: Place) -> None:
    made = networks(place, pool="10.0.0.0/29", prefix=29, dhcp=False)
    vms = [uuid.uuid4() for _ in range(5)]
    for vm in vms[:4]:
        await made.attach(vm, "a", isolated=True)
    with pytest.raises(LimitError, match="no room for another VM"):
        await made.attach(vms[4], "a", isolated=True)
    with pytest.raises(LimitError, match="no room for another network"):
        await made.attach(vms[4], "b", isolated=True)
    assert len(place.left_namespaces()) == 1
    await made.remove_unused(set())
    assert place.left_namespaces() == []


@pytest.mark.parametrize("name", ["", "x" * 2000, "../../etc", "ÄÖ", "a b", "A-B", "a-b"])
def test_a_name_becomes_one_that_a_namespace_may_have(name: str) -> None:
    slug = slug_of(name)
    assert len(slug) <= NETWORK_SLUG_CHARACTERS
    assert slug.replace("-", "").isalnum()
    assert slug.isascii()
    assert slug == slug_of(name)


def test_names_that_look_alike_are_two_networks() -> None:
    assert len({slug_of(name) for name in ("A-B", "a-b", "a b", "a  b")}) == 4


async def test_a_network_whose_slug_another_one_has_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = networks(place, dhcp=False)
    first, second = uuid.uuid4(), uuid.uuid4()
    monkeypatch.setattr(network, "slug_of", lambda _: "same")
    await made.attach(first, "a", isolated=True)
    with pytest.raises(ConflictError, match="share a namespace with a"):
        await made.attach(second, "b", isolated=True)
    await made.attach(second, "a", isolated=True)
    await made.remove_unused(set())
    assert place.left_namespaces() == []
