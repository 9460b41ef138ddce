"""Dense against sparse for one layer, over everything the examples showed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sparsekit.convert.candidates import Candidate
from sparsekit.gate import MIN_SPEEDUP, Verdict, VerdictCache, kernel_for
from sparsekit.nn import SparseLinear


@dataclass(frozen=True)
class Judgement:
    """What the gate says of a layer."""

    kernel: str
    dense_ms: float | None
    sparse_ms: float | None
    speedup: float | None
    lost: bool
    reason: str
    nchw_ms: float | None = None


def judge(
    candidate: Candidate,
    sparse: SparseLinear,
    activation: str | None,
    verdicts: VerdictCache | None,
) -> Judgement:
    packed = sparse.packed
    seen: Counter[int] = Counter()
    for call, count in candidate.calls.items():
        if call.m > 0:
            seen[call.m] += count
    kernel = kernel_for(packed, max(seen, default=1))
    if verdicts is None:
        return Judgement(kernel, None, None, None, False, "not measured (gate='always')")
    if not seen:
        return Judgement(kernel, None, None, None, True, "it ran on empty inputs only")
    bias = candidate.module.bias
    bias = None if bias is None else bias.detach()
    timed = {m: verdicts.judge(packed, m, bias, activation) for m in seen}
    dense_ms = sum(timed[m].dense_ms * count for m, count in seen.items())
    sparse_ms = sum(timed[m].sparse_ms * count for m, count in seen.items())
    # Where there is one shape, the paired ratio is steadier than the ratio of two medians.
    paired = next(iter(timed.values())).speedup
    speedup = paired if len(timed) == 1 else dense_ms / sparse_ms
    reason, lost = _verdict_reason(timed, speedup)
    return Judgement(kernel, dense_ms, sparse_ms, speedup, lost, reason)


def _verdict_reason(timed: Mapping[int, Verdict], speedup: float) -> tuple[str, bool]:
    for verdict in timed.values():
        if verdict.fault:
            return verdict.fault, True
    paths = "/".join(sorted({verdict.dense_path for verdict in timed.values()}))
    if speedup < MIN_SPEEDUP:
        return f"{speedup:.2f}x of dense ({paths}), less than {MIN_SPEEDUP}x", True
    slowest = min(timed, key=lambda m: timed[m].speedup)
    if timed[slowest].speedup < 1.0:
        return f"slower than dense at m={slowest} ({timed[slowest].speedup:.2f}x)", True
    return f"{speedup:.2f}x of dense ({paths})", False
