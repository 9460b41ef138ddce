"""Interleaved timing, so that a change of clock or a busy neighbour hits every rival alike.

Needs the standard library alone: processes that measure other engines import it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Protocol, runtime_checkable

# Thread pools (OpenMP, ONNX Runtime) spin for a while after a call and would take cores away from
# the next rival; after this pause they sleep.
_SETTLE_S = 0.003
# Calls of a turn: some to wake the rival's threads and fill the caches, then those that are timed.
_WARM_CALLS = 2
_TIMED_CALLS = 3
# From this time on one call is enough for each.
_LONG_S = 0.05


@runtime_checkable
class SelfTimed(Protocol):
    """A rival in another process, which times itself so that the way there does not count."""

    def turn(self) -> list[float]:
        """Seconds of the timed calls of one turn, as `turn` of this module."""


def settle(call: Callable[[], object]) -> bool:
    """Lets other thread pools fall asleep, then wakes this one and warms its caches.

    Returns:
        Whether the call is a long one.
    """
    time.sleep(_SETTLE_S)
    for _ in range(_WARM_CALLS):
        start = time.perf_counter()
        call()
        if time.perf_counter() - start > _LONG_S:
            return True
    return False


def turn(call: Callable[[], object]) -> list[float]:
    """Seconds of each timed call of a settled rival: three, of a long call one."""
    seconds = []
    for _ in range(1 if settle(call) else _TIMED_CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def timed_call(call: Callable[[], object]) -> float:
    """Seconds of a call of a settled rival: the median of its turn."""
    return median(call.turn() if isinstance(call, SelfTimed) else turn(call))


HOPELESS = 1.5
"""Who is this many times slower than the fastest rival after `SCOUTING` turns has no more."""

SCOUTING = 3
# And who is this many times slower, not even those: some sparse engines take seconds.
_FAR_BEHIND = 4


def scout(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each call, the least of a few interleaved turns: what a busy machine delays once.

    Args:
        calls: Name to call; one that is far behind the fastest has a single turn.
    """
    best = {name: timed_call(call) for name, call in calls.items()}
    for _ in range(SCOUTING - 1):
        least = min(best.values(), default=0.0)
        for name, call in calls.items():
            if best[name] <= _FAR_BEHIND * least:
                best[name] = min(best[name], timed_call(call))
    return best


def contenders(seconds: Mapping[str, float], among: Iterable[str]) -> list[str]:
    """Those of some rivals that may be the fastest of them, by what `scout` found."""
    here = [name for name in among if name in seconds]
    least = min((seconds[name] for name in here), default=0.0)
    return [name for name in here if seconds[name] <= HOPELESS * least]


class Rivals:
    """Calls that are measured in turns.

    Args:
        calls: Name to a call without arguments.
    """

    def __init__(self, calls: Mapping[str, Callable[[], object]]) -> None:
        self._calls = dict(calls)
        self.seconds: dict[str, list[float]] = {name: [] for name in self._calls}

    def run_round(self) -> None:
        """Gives every call its turn."""
        for name, call in self._calls.items():
            self.seconds[name].append(timed_call(call))

    def run(self, rounds: int) -> Rivals:
        """Gives every call `rounds` turns."""
        for _ in range(rounds):
            self.run_round()
        return self

    def medians(self) -> dict[str, float]:
        """Median seconds of each call that was timed."""
        return {name: median(times) for name, times in self.seconds.items() if times}

    def speedup(self, name: str, baseline: str) -> float:
        """Median over the rounds of baseline's time divided by `name`'s in the same round."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        return median(theirs / ours for theirs, ours in pairs)


def rounds_within(budget_s: float, round_s: float, at_least: int = 5, at_most: int = 31) -> int:
    """Rounds that fit into a time budget, an odd number so that the median is one of them."""
    return min(max(int(budget_s / max(round_s, 1e-9)), at_least), at_most) | 1
