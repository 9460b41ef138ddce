import itertools
import time

import pytest

from bench.timing import Rivals, contenders, rounds_within, scout, timed_call, turn


def test_rivals_take_turns() -> None:
    order: list[str] = []
    rivals = Rivals({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    rivals.run(rounds=3)
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["a", "b"] * 3
    assert {name: len(times) for name, times in rivals.seconds.items()} == {"a": 3, "b": 3}


def test_the_first_call_of_a_turn_is_not_timed() -> None:
    cold = True

    def slow_when_cold() -> None:
        nonlocal cold
        if cold:
            time.sleep(0.05)
        cold = False

    for _ in range(3):
        cold = True
        assert timed_call(slow_when_cold) < 0.025


def test_a_long_call_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("bench.timing._LONG_S", 0.0)
    assert len(turn(lambda: calls.append(1))) == 1
    assert len(calls) == 2


def test_who_times_itself_is_believed() -> None:
    class Elsewhere:
        def __call__(self) -> None:
            raise AssertionError

        def turn(self) -> list[float]:
            return [3.0, 1.0, 2.0]

    assert timed_call(Elsewhere()) == 2.0


def test_scouting_takes_the_least_and_spares_who_is_far_behind() -> None:
    class Takes:
        def __init__(self, *seconds: float) -> None:
            self.left = list(seconds)

        def __call__(self) -> None:
            raise AssertionError

        def turn(self) -> list[float]:
            return [self.left.pop(0)]

    calls = {"disturbed": Takes(3.0, 9.0, 1.0), "steady": Takes(2.0, 2.0, 2.0), "slow": Takes(9.0)}
    found = scout(calls)
    assert found == {"disturbed": 1.0, "steady": 2.0, "slow": 9.0}
    assert contenders(found, ["disturbed", "steady", "slow", "absent"]) == ["disturbed"]
    assert contenders(found, ["steady", "slow"]) == ["steady"]
    assert contenders(found, []) == []


def test_speedup_pairs_times_of_the_same_round() -> None:
    rivals = Rivals({"ours": lambda: None, "theirs": lambda: None})
    # A machine that slows down tenfold half way: each pair still says 2.
    rivals.seconds = {"ours": [1.0, 1.0, 10.0], "theirs": [2.0, 2.0, 20.0]}
    assert rivals.speedup("ours", "theirs") == 2.0
    assert rivals.medians() == {"ours": 1.0, "theirs": 2.0}


def test_speedup_refuses_unequal_rounds() -> None:
    rivals = Rivals({"ours": lambda: None, "theirs": lambda: None})
    rivals.seconds = {"ours": [1.0], "theirs": [2.0, 2.0]}
    with pytest.raises(ValueError, match="zip"):
        rivals.speedup("ours", "theirs")


@pytest.mark.parametrize(
    ("budget", "one_round", "expected"),
    [(1.0, 0.1, 11), (1.0, 10.0, 5), (1.0, 0.0, 31), (1.0, 0.14, 7)],
)
def test_rounds_fit_the_budget_and_are_odd(budget: float, one_round: float, expected: int) -> None:
    assert rounds_within(budget, one_round) == expected
