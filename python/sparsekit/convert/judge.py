"""Dense against sparse for one layer, over everything the examples showed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor, nn

from sparsekit.clock import clock, warm_up
from sparsekit.convert.candidates import Call, Candidate
from sparsekit.gate import MIN_SPEEDUP, Verdict, VerdictCache
from sparsekit.nn import SparseConv1d, SparseConv2d, SparseLinear
from sparsekit.nn.memory_format import put_channels_last
from sparsekit.pack import PackedWeight
from sparsekit.workload import ConvWorkload, LinearWorkload, Workload, kernel_for

_SPARSE: dict[type[nn.Module], Any] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
}
_CONVERSIONS = 9

MIN_CONV_SAVING_MS = 0.05
"""A sparse convolution on a CPU has to save so much in each call: in a loop its Python takes 20 to
40 microseconds, in a network, where other layers drive it out of the caches, 80 to 190."""


@dataclass(frozen=True)
class Judgement:
    """What the gate says of a layer; the times are those of all calls together."""

    kernel: str
    lost: bool
    reason: str
    dense_ms: float | None = None
    sparse_ms: float | None = None
    speedup: float | None = None
    nchw_ms: float | None = None


@dataclass
class _Case:
    """One workload of a layer, and how often it came."""

    call: Call
    workload: Workload
    count: int = 0


def make_sparse(candidate: Candidate, activation: str | None) -> Any:
    """The sparse layer that may take a candidate's place.

    Raises:
        NotImplementedError: there is no format for its weight here.
    """
    kind = _SPARSE[type(candidate.module)]
    return kind.from_dense(candidate.module, candidate.pattern, candidate.mask, activation)


def judge(
    candidate: Candidate,
    packed: PackedWeight,
    activation: str | None,
    verdicts: VerdictCache | None,
) -> Judgement:
    """Whether a layer becomes sparse.

    Args:
        candidate: with the calls that the examples showed.
        packed: its weight.
        activation: what the sparse layer would apply.
        verdicts: None takes every layer.

    Raises:
        NotImplementedError: no sparse kernel can run here.
    """
    bias = candidate.module.bias
    cases = _cases(candidate, packed, None if bias is None else bias.detach(), activation)
    largest = max(cases, key=lambda case: case.call.m, default=None)
    kernel = largest.workload.kernel if largest else kernel_for(packed, 1)
    from_nchw = [case for case in cases if not case.call.channels_last]
    if verdicts is None:
        note = (
            f"; x comes as {from_nchw[0].call.layout}, each call converts it" if from_nchw else ""
        )
        return Judgement(kernel, False, "not measured (gate='always')" + note)
    if not cases:
        return Judgement(kernel, True, "it ran on empty inputs only")
    timed = [verdicts.judge(case.workload) for case in cases]
    dense_ms = sum(each.dense_ms * case.count for each, case in zip(timed, cases, strict=True))
    sparse_ms = sum(each.sparse_ms * case.count for each, case in zip(timed, cases, strict=True))
    # Where there is one shape, the paired ratio is steadier than the ratio of two medians.
    speedup = timed[0].speedup if len(timed) == 1 else dense_ms / sparse_ms
    reason, lost = _reason(cases, timed, speedup)
    calls = sum(case.count for case in cases)
    if not lost and candidate.is_conv and packed.device.type == "cpu":
        saved = (dense_ms - sparse_ms) / calls
        if saved < MIN_CONV_SAVING_MS:
            reason += f", which saves {saved:.3f} ms a call, less than {MIN_CONV_SAVING_MS}"
            lost = True
    nchw_ms = None
    if from_nchw:
        nchw_ms = sum(_conversion_ms(case) for case in from_nchw)
        layout = from_nchw[0].call.layout
        reason += f"; x comes as {layout}: converting it takes {nchw_ms:.3f} ms of that"
    return Judgement(kernel, lost, reason, dense_ms, sparse_ms, speedup, nchw_ms)


def _cases(
    candidate: Candidate, packed: PackedWeight, bias: Tensor | None, activation: str | None
) -> list[_Case]:
    found: dict[Hashable, _Case] = {}
    for call, count in candidate.calls.items():
        if call.m == 0:
            continue
        workload = _workload(candidate.module, packed, call, bias, activation)
        # Leading dimensions make no difference to a linear layer.
        key = call if candidate.is_conv else call.m
        found.setdefault(key, _Case(call, workload)).count += count
    return list(found.values())


def _workload(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d,
    packed: PackedWeight,
    call: Call,
    bias: Tensor | None,
    activation: str | None,
) -> Workload:
    if isinstance(layer, nn.Linear):
        return LinearWorkload(packed, call.m, bias, activation)
    one_image = len(call.shape) == len(layer.kernel_size) + 1
    return ConvWorkload(
        packed,
        (1, *call.shape) if one_image else call.shape,
        layer.stride,
        layer.padding if layer.padding_mode == "zeros" else 0,
        layer.dilation,
        bias,
        activation,
        call.channels_last,
    )


def _conversion_ms(case: _Case) -> float:
    """What bringing the channels of x side by side takes."""
    device, x = case.workload.packed.device, case.workload.input()
    call: Callable[[], Tensor] = lambda: put_channels_last(x, case.call.dims)  # noqa: E731
    seconds = clock(device)
    warm_up(call, device)
    return median(seconds(call) for _ in range(_CONVERSIONS)) * 1e3 * case.count


def _reason(cases: list[_Case], timed: list[Verdict], speedup: float) -> tuple[str, bool]:
    for verdict in timed:
        if verdict.fault:
            return verdict.fault, True
    paths = "/".join(sorted({verdict.dense_path for verdict in timed}))
    if speedup < MIN_SPEEDUP:
        return f"{speedup:.2f}x of dense ({paths}), less than {MIN_SPEEDUP}x", True
    slowest = min(range(len(timed)), key=lambda index: timed[index].speedup)
    if timed[slowest].speedup < 1.0:
        where, ratio = cases[slowest].call, timed[slowest].speedup
        return f"slower than dense at {where} ({ratio:.2f}x)", True
    return f"{speedup:.2f}x of dense ({paths})", False
