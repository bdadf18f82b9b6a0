"""What there is to tell of a failover, and of what followed it."""

from typing import Any

from appliance.cli.api_client import ApiClient, part
from appliance.cli.output import instant, print_line, print_pairs, size, span, text_or_dash


def tell_failover(found: dict[str, Any]) -> None:
    """All that is known of one, for people."""
    vm = found.get("vm") or {}
    check = vm.get("check") or {}
    is_test = found["kind"] == "test"
    pairs = [
        ("failover", found["id"]),
        ("machine", found["machine"]),
        ("kind", found["kind"]),
        ("state", found["state"]),
        ("point", text_or_dash(found.get("point"))),
        ("taken", instant(found.get("point_ns"))),
        ("consistency", text_or_dash(found.get("consistency"))),
        ("RTO", span(found.get("rto_seconds"))),
        ("RPO", span(found.get("rpo_seconds"))),
        ("network", f"{found['network']}, isolated" if is_test else found["network"]),
        ("asked", instant(found["asked_ns"])),
        ("notes", text_or_dash(found.get("notes"))),
    ]
    if vm:
        pairs += [
            ("VM", vm.get("state", "-")),
            ("guest", text_or_dash(vm.get("guest"))),
            ("address", text_or_dash(vm.get("address"))),
            ("space", size(vm.get("space_bytes"))),
        ]
    if check:
        verdict = "passed" if check["passed"] else "did not pass"
        pairs.append(("check", f"{verdict}: {check['detail']}" if check.get("detail") else verdict))
    print_pairs(pairs)
    for each in check.get("file_systems", []):
        clean = "clean" if each["clean"] else "not clean"
        print_line(
            f"  disk {each['disk']} {each['device']} {each['kind']}: "
            f"{each.get('detail') or clean}, {size(each.get('used_bytes'))} used"
        )
    if found.get("error"):
        print_line(f"error: {found['error'].get('message', '')}", style="red")
        if found["error"].get("hint"):
            print_line(f"hint: {found['error']['hint']}")


def told_commit(_: ApiClient, failover: dict[str, Any]) -> str:
    return f"{failover['machine']} runs at the second site for good."


def told_cancel(api: ApiClient, failover: dict[str, Any]) -> str:
    name = failover["machine"]
    state = api.get(f"/machines/{part(failover['machine_id'])}")["state"]
    told = f"{name} is protected again." if state == "protected" else f"{name} is {state}."
    if failover["powered_off_ns"]:
        told += " Its source is switched off: switch it on in the vCenter."
    return told


def told_cleanup(_: ApiClient, failover: dict[str, Any]) -> str:
    return f"Nothing is left of the test of {failover['machine']} but its notes and its console."


def told_point(_: ApiClient, failover: dict[str, Any]) -> str:
    return f"{failover['machine']} runs from the point {failover['point']}."
