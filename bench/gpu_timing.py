"""Times of calls on a GPU, without the time that Python takes to start them.

A path's calls are captured into a CUDA graph, one after the other, until it takes some
milliseconds; a turn replays it once, between two events, and the time of a call is the turn's over
the number of calls. So a kernel counts with what it costs in a model that is captured: its own
time and the gap to the next kernel. A path that cannot be captured has its calls queued behind a
kernel that waits until Python has started all of them; its result says so.

L2 holds no weights when a call begins: the calls of a turn go round copies of the weight, which
together are several times as large as L2, and each turn starts after a buffer of twice L2's size
was written. The activations are the same in every call, so few tokens stay in L2, as they do in a
model, where the layer before has just written them. All paths are treated alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Tensor]

TURN_S = 2e-3
"""What a turn takes at least, unless `MOST_CALLS` are less."""

MOST_CALLS = 512
# Of a path that cannot be captured: each call may start several kernels, and the queue has an end.
_MOST_QUEUED = 64

# With copies of this many times its size going round, even a cache that replaces lines at random
# keeps about one in a hundred until its turn comes.
OVERFLOW = 5

# Before the first event, so that the host has started everything when it passes.
_HEAD_START_S = 3e-4
_CLOCK_HZ = 2e9


@dataclass(frozen=True)
class Path:
    """One way to compute a case.

    Attributes:
        make: Gives a call that has a copy of the weight of its own.
        weight_bytes: Size of such a copy.
    """

    make: Callable[[], Call]
    weight_bytes: int


def calls_and_copies(call_s: float, weight_bytes: int, l2_bytes: int, most: int) -> tuple[int, int]:
    """How many calls make a turn, and how many copies of the weight they go round.

    Args:
        call_s: Seconds of one call, roughly.
        weight_bytes: Of one copy.
        l2_bytes: Size of L2.
        most: Calls of a turn at most.
    """
    calls = min(max(math.ceil(TURN_S / max(call_s, 1e-7)), 1), most)
    overflowing = max(1, math.ceil(OVERFLOW * l2_bytes / max(weight_bytes, 1)))
    # A turn of fewer calls needs no more copies: between turns L2 is flushed.
    copies = min(calls, overflowing)
    return math.ceil(calls / copies) * copies, copies


class Stopwatch:
    """Events on the current stream.

    Args:
        l2_bytes: Size of L2.
    """

    def __init__(self, l2_bytes: int) -> None:
        self.l2_bytes = l2_bytes
        self._buffer = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def seconds(self, run: Callable[[], object], head_start_s: float = _HEAD_START_S) -> float:
        """Seconds that the GPU takes for what `run` starts, L2 flushed before.

        Args:
            run: Starts kernels on the current stream.
            head_start_s: At least what `run` itself takes.
        """
        self._buffer.fill_(1)
        torch.cuda._sleep(int(head_start_s * _CLOCK_HZ))
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def queued(calls: Sequence[Call], watch: Stopwatch) -> float:
    """Seconds of some calls one after the other, started while the GPU waits."""
    start = time.perf_counter()
    _run(calls)  # once to warm up and to see how long starting them takes
    host_s = time.perf_counter() - start
    torch.cuda.synchronize()
    return watch.seconds(lambda: _run(calls), 1.5 * host_s + _HEAD_START_S)


class Turns:
    """A path as `bench.timing` wants its rivals: it times its own turns.

    Args:
        path: What to time.
        watch: The events.
        check: Raises when what a replayed graph computed is wrong.
        capture: Whether to try a graph.

    Attributes:
        captured: Whether the calls are in a graph.
        reason: Why not, when that was tried.
    """

    def __init__(
        self,
        path: Path,
        watch: Stopwatch,
        check: Callable[[Tensor], None] | None = None,
        capture: bool = True,
    ) -> None:
        self._watch = watch
        first = path.make()
        for _ in range(3):
            first()
        call_s = queued([first] * 3, watch) / 3
        most = MOST_CALLS if capture else _MOST_QUEUED
        count, copies = calls_and_copies(call_s, path.weight_bytes, watch.l2_bytes, most)
        different = [first, *(path.make() for _ in range(copies - 1))]
        _run(different)
        self._calls = [different[i % copies] for i in range(count)]
        self._graph: torch.cuda.CUDAGraph | None = None
        self.reason = ""
        if capture:
            try:
                self._graph, result = _captured(self._calls)
            except RuntimeError as error:
                self.reason = first_line(error)
                self._calls = self._calls[:_MOST_QUEUED]
            else:
                self._graph.replay()
                if check:
                    check(result)

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def turn(self) -> list[float]:
        """Seconds of a call, as one turn measures it."""
        if self._graph is None:
            total = queued(self._calls, self._watch)
        else:
            total = self._watch.seconds(self._graph.replay)
        return [total / len(self._calls)]

    def __call__(self) -> list[float]:
        return self.turn()


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of some calls, and the result of the last."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads, such as torch.compile's, may do what a capturing thread may not.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            _run(calls[:-1])
            result = calls[-1]()
    except RuntimeError:
        # The context leaves its own stream behind when the capture cannot be ended.
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        raise
    return graph, result


def copy_path(nbytes: int, device: torch.device) -> Path:
    """A copy within the GPU's memory, for its bandwidth: `nbytes` are read and as many written."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Path(lambda: lambda: target.copy_(source), nbytes)


def first_line(error: BaseException) -> str:
    """What an exception says, as one line of a table."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
