"""Plans as YAML: what is read, what is refused and where, and that writing and reading agree."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.config_server.recovery.plans.document import PlanDocument
from appliance.config_server.recovery.plans.yaml_text import (
    TEXT_BYTES_MAX,
    PlanTextError,
    parse_plan,
    read_yaml,
    write_plan,
)
from appliance.config_server.recovery.run import ActionKind, OnFailure
from tests.appliance.config_server.recovery.plans.shop import SHOP


def test_a_plan_is_read_whole() -> None:
    plan = parse_plan(SHOP)
    database, web = plan.groups
    assert database.machines[0].memory_bytes == 1 << 30
    assert [one.machine for one in web.machines] == ["web-1", "web-2"]
    assert [one.kind for one in (*database.before, *database.after, *web.after)] == [
        ActionKind.SCRIPT,
        ActionKind.MANUAL,
        ActionKind.SCRIPT,
        ActionKind.WEBHOOK,
    ]
    assert database.before[0].on_failure is OnFailure.CONTINUE


def test_what_is_written_is_what_was_written_by_hand() -> None:
    assert write_plan(parse_plan(SHOP)) == SHOP


GROUP = "name: a\ngroups:\n  - name: g\n"
AFTER = GROUP + "    machines: [m]\n    after:\n      - name: x\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("name: [", "line 1, column 8"),
        ("name: a\nname: b\n", "line 2: name is there twice"),
        ("name: a\n\ngroups: x\n", "line 3: groups: "),
        ("name: a\n", "line 1: groups: is missing"),
        (GROUP + "    machine: [m]\n", "line 4: groups[1].machine: unknown key"),
        (
            GROUP + "    machines:\n      - m\n      - n\n      - m\n",
            "line 7: groups[1].machines[3]: m is in group 1 and again",
        ),
        (GROUP + "    machines: [m]\n  - name: h\n", "line 5: groups[2]: group 2 (h) has neither"),
        (
            GROUP + "    machines: [m]\n  - name: g\n    machines: [n]\n",
            "line 5: groups[2].name: groups 1 and 2 are both called g",
        ),
        ("name: a\ngroups: &all\n  - *all\n", "line 2: an anchor (&…) is not allowed"),
        ("name: a\ngroups:\n  - *all\n", "line 3: an alias"),
        ("name: !!python/name:os.system ''\n", "line 1: a tag"),
        (
            AFTER + "        script: {command: a, inline: b}\n",
            "line 7: groups[1].after[1].script: a script has a command or an inline text",
        ),
        (AFTER, "line 6: groups[1].after[1]: an action is one of"),
        (
            AFTER + "        script:\n          command: a\n"
            "          where: {host: h, user: u, key_file: ../k}\n",
            "line 9: groups[1].after[1].script.where.key_file: ",
        ),
        (
            AFTER + "        webhook: {url: 'ftp://h'}\n",
            "line 7: groups[1].after[1].webhook.url: a URL that begins",
        ),
        (
            AFTER + "        webhook: {url: 'http://h', headers: {Host: x}}\n",
            "the header Host cannot be set",
        ),
        ("- a\n- b\n", "valid dictionary"),
        ("x" * (TEXT_BYTES_MAX + 1), "longer than 1024 KiB"),
        ("[" * 200, "nested"),
        ("name: \x07\n", "special characters are not allowed"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, told: str) -> None:
    if text == "[" * 200:
        text += "]" * 200
    with pytest.raises(PlanTextError) as caught:
        parse_plan(text)
    assert told in str(caught.value)


def test_a_misspelt_key_is_told_without_what_only_follows_from_it() -> None:
    with pytest.raises(PlanTextError) as caught:
        parse_plan(GROUP.replace("- name: g", "- nam: g") + "    machines: [m]\n")
    told = str(caught.value)
    assert "groups[1].name: is missing" in told
    assert "groups[1].nam: unknown key" in told
    assert "at least 1 item" not in told


def test_too_many_groups_and_machines_are_told() -> None:
    groups = "".join(f"  - {{name: g{n}, machines: [m{n}]}}\n" for n in range(8))
    with pytest.raises(PlanTextError, match=r"line 2: groups: .*at most 7"):
        parse_plan(f"name: a\ngroups:\n{groups}")
    halves = "".join(
        f"  - {{name: g{n}, machines: [{', '.join(f'm{n}-{m}' for m in range(51))}]}}\n"
        for n in range(2)
    )
    with pytest.raises(PlanTextError, match="102 machines, at most 100"):
        parse_plan(f"name: a\ngroups:\n{halves}")


def test_words_stay_words_and_json_is_yaml() -> None:
    assert read_yaml("{a: no, b: 22:00, c: 2026-12-01, d: 1e3, e: 0x10, f: ~, g: true}").tree == {
        "a": "no", "b": "22:00", "c": "2026-12-01", "d": "1e3", "e": "0x10", "f": None, "g": True,
    }  # fmt: skip
    document = parse_plan(SHOP)
    assert parse_plan(document.model_dump_json()) == document


_TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs"]), max_size=60
)
_LABELS = st.from_regex(r"\A[A-Za-z0-9 :#&*!|>'\"%@`{}\[\],?-]{1,20}\Z")


@settings(deadline=None)
@given(
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9 ._@-]{0,20}\Z"),
    description=_TEXTS,
    groups=st.lists(
        st.tuples(_LABELS, _LABELS, _TEXTS),
        min_size=1,
        max_size=7,
        unique_by=(lambda group: group[0], lambda group: group[1].lower()),
    ),
)
def test_whatever_is_written_is_read_back(
    name: str, description: str, groups: list[tuple[str, str, str]]
) -> None:
    document = PlanDocument.model_validate(
        {
            "name": name,
            "description": description,
            "groups": [
                {"name": group, "machines": [{"machine": machine, "script": script}]}
                for group, machine, script in groups
            ],
        }
    )
    assert parse_plan(write_plan(document)) == document


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(PlanTextError):
        parse_plan(text)
