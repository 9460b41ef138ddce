"""How long a call takes inside a model: after other work, with cold caches where that is so."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparsekit import _native

Call = Callable[[], Tensor]

_GPU_WARM_UP = 10


def clock(device: torch.device) -> Callable[[Call], float]:
    """A function that gives the seconds of one call whose tensors are on the device.

    On a CPU a parallel torch operation runs before the call, as it does inside a model, where the
    thread pools of torch and of this package take turns. On a GPU the L2 cache is overwritten
    before it, as by the other layers of a model, and events on the stream tell the time.
    """
    return _gpu_clock(device) if device.type == "cuda" else _cpu_clock()


def warm_up(call: Call, device: torch.device) -> None:
    """Calls whose times would count what happens once."""
    for _ in range(_GPU_WARM_UP if device.type == "cuda" else 1):
        call()


def _cpu_clock() -> Callable[[Call], float]:
    other = torch.ones(1 << 16)

    def seconds(call: Call) -> float:
        other.mul(1.0)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def _gpu_clock(device: torch.device) -> Callable[[Call], float]:
    flush = torch.empty(
        2 * _native.cuda_info(device.index)["l2_bytes"], dtype=torch.uint8, device=device
    )
    stream = torch.cuda.current_stream(device)

    def seconds(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the cache is being written, the host gets ahead: the call's own launch is not timed
        # unless it takes longer than that.
        flush.zero_()
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return seconds
