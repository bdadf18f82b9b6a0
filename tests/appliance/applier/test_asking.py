from appliance.applier.asking import REASK_SECONDS_MAX, Asking


def test_asks_again_after_waits_that_double_up_to_a_limit() -> None:
    asking = Asking(10, 900)
    asking.ask(["a"], 0.0)
    due, now = [], 0.0
    while now < 2000:
        asking.ask(["a"], now)
        if asking.is_due(now):
            due.append(now)
        now += 1
    waits = [after - before for before, after in zip([0.0, *due], due, strict=False)]
    assert waits[:6] == [10, 20, 40, 80, 160, 300]
    assert max(waits) == REASK_SECONDS_MAX


def test_is_in_vain_only_after_the_gap_has_lasted() -> None:
    asking = Asking(10, 900)
    assert not asking.is_in_vain(1e9)
    asking.ask(["a"], 100)
    asking.ask(["b"], 500)
    assert not asking.is_in_vain(1000)
    assert asking.is_in_vain(1001)


def test_settled_question_starts_anew() -> None:
    asking = Asking(10, 900)
    asking.ask(["a"], 0)
    asking.settle()
    assert not asking.names
    asking.ask(["b"], 2000)
    assert not asking.is_in_vain(2001)
    assert asking.names == ("b",)
