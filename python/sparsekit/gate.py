"""Never slower than dense: measure both on this machine, keep the verdict.

The dense side is the fastest of the ways that `sparsekit.workload` knows, each with bias and
activation. Dense and sparse are timed in turns on random inputs, so that a change of clock or a
busy neighbour hits both alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sparsekit import _native
from sparsekit.cache import CacheFile, default_path, machine_parts
from sparsekit.clock import clock, warm_up
from sparsekit.dispatch import table
from sparsekit.pack import pack
from sparsekit.patterns import PatternLike
from sparsekit.workload import LinearWorkload, Workload

MIN_SPEEDUP = 1.05
"""A sparse layer is kept from this ratio on: below it, the gain is within the timing's noise."""

_BUDGET_S = 0.25
# Where the figures contradict each other, as on a busy machine, it takes longer.
_NOISY_BUDGET_S = 1.0
_MIN_PAIRS, _MAX_PAIRS = 7, 101
_DENSE_TRIALS = 5
# Only a gross fault is looked for here (a wrong kernel); the tests hold the exact rule.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Verdict:
    """Dense against sparse for one layer shape.

    Attributes:
        dense_ms: median time of the fastest dense path, in milliseconds.
        sparse_ms: median time of the sparse kernel, in milliseconds.
        speedup: median over the pairs of dense time / sparse time.
        dense_path: which dense path was the fastest.
        kernel: the sparse kernel that ran.
        fault: "" or what is wrong with the sparse result.
    """

    dense_ms: float
    sparse_ms: float
    speedup: float
    dense_path: str
    kernel: str
    fault: str = ""

    @property
    def wins(self) -> bool:
        """Whether sparse is correct and at least `MIN_SPEEDUP` times as fast."""
        return not self.fault and self.speedup >= MIN_SPEEDUP


@torch.inference_mode()
def measure(workload: Workload) -> Verdict:
    """Time dense against sparse on random activations, on the device of the weight.

    Each call is timed as it would run inside a model (see `sparsekit.clock.clock`).

    Raises:
        NotImplementedError: no sparse kernel can run here.
    """
    device = workload.packed.device
    x = workload.input()
    sparse, dense = workload.sparse(x), workload.dense_paths(x)
    seconds = clock(device)
    for call in (sparse, *dense.values()):
        warm_up(call, device)

    fault = _fault(sparse(), dense["torch"]())
    trials = {
        name: median([seconds(call) for _ in range(_DENSE_TRIALS)]) for name, call in dense.items()
    }
    path = min(trials, key=trials.__getitem__)
    pairs: list[tuple[float, float]] = []
    spent = 0.0
    while len(pairs) < _MIN_PAIRS or (
        len(pairs) < _MAX_PAIRS and spent < (_NOISY_BUDGET_S if _is_undecided(pairs) else _BUDGET_S)
    ):
        if len(pairs) % 2:
            ours, theirs = seconds(sparse), seconds(dense[path])
        else:
            theirs, ours = seconds(dense[path]), seconds(sparse)
        pairs.append((theirs, ours))
        spent += theirs + ours
    return Verdict(
        dense_ms=median(theirs for theirs, _ in pairs) * 1e3,
        sparse_ms=median(ours for _, ours in pairs) * 1e3,
        speedup=median(theirs / ours for theirs, ours in pairs),
        dense_path=path,
        kernel=workload.kernel,
        fault=fault,
    )


def _is_undecided(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether the ratio of the medians and the median of the ratios disagree on the winner."""
    by_pairs = median(theirs / ours for theirs, ours in pairs)
    overall = median(theirs for theirs, _ in pairs) / median(ours for _, ours in pairs)
    return (by_pairs >= MIN_SPEEDUP) != (overall >= MIN_SPEEDUP)


def compare(
    pattern: PatternLike,
    n: int,
    k: int,
    m: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> str:
    """Dense against sparse for one weight shape, as a table; nothing is remembered.

    Args:
        pattern: of the weight.
        n: out_features.
        k: in_features.
        m: rows of x, one line of the table each.
        dtype: of weight and activations.
        device: where both are.
    """
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    packed = pack(weight, pattern)
    rows = []
    for count in tqdm(m, desc="bench", unit="shape", leave=False):
        verdict = measure(LinearWorkload(packed, count))
        rows.append(
            (
                str(count),
                verdict.dense_path,
                f"{verdict.dense_ms:.3f}",
                verdict.kernel,
                f"{verdict.sparse_ms:.3f}",
                f"{verdict.speedup:.2f}x",
                verdict.fault or ("sparse wins" if verdict.wins else "dense stays"),
            )
        )
    head = ("m", "fastest dense", "ms", "sparse kernel", "ms", "speed", "verdict")
    title = f"{packed.pattern} {str(dtype).removeprefix('torch.')}, n={n}, k={k}"
    where = f"{torch.get_num_threads()} threads"
    if packed.device.type == "cuda":
        where = str(_native.cuda_info(packed.device.index)["name"])
    return f"{title}, {where}\n{table(head, rows)}"


def _fault(ours: Tensor, theirs: Tensor) -> str:
    error = (ours.float() - theirs.float()).abs().max()
    scale = theirs.float().abs().max()
    if bool(error <= _TOLERANCE[ours.dtype] * scale):
        return ""
    return f"the sparse result differs from dense by {error.item():.3g} of {scale.item():.3g}"


class VerdictCache:
    """Verdicts per machine, library version, thread count and layer shape, kept in a JSON file.

    A file that cannot be read or written costs a warning (once) and nothing else: the verdicts
    are then measured again in the next process.

    Args:
        path: the file; None for `verdicts.json` in `$XDG_CACHE_HOME/sparsekit` (by default
            `~/.cache/sparsekit`).
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else default_path("verdicts.json")
        without = "layers are measured again in every process"
        self._file = CacheFile("verdict cache", 1, without, self.path)
        self._known = self._file.read(_verdicts)

    def judge(self, workload: Workload) -> Verdict:
        """The remembered verdict, or a new measurement (see `measure`)."""
        machine, key = machine_fingerprint(workload.packed.device), workload.key
        known = self._known.get(machine, {}).get(key)
        if known is not None:
            return known
        verdict = measure(workload)
        if not verdict.fault:  # a fault has to be looked at again, not believed for ever
            self._known.setdefault(machine, {})[key] = verdict
            self._write()
        return verdict

    def _write(self) -> None:
        # Other processes may have added verdicts since; theirs are kept.
        for machine, entries in self._file.read(_verdicts).items():
            self._known[machine] = {**entries, **self._known.get(machine, {})}
        self._file.write(
            {
                machine: {problem: asdict(verdict) for problem, verdict in entries.items()}
                for machine, entries in self._known.items()
            }
        )


def machine_fingerprint(device: torch.device | None = None) -> str:
    """What a verdict depends on beside the layer: the CPU and its instruction set, or the GPU;
    versions, and a kernel forced.

    Args:
        device: where the layer runs; None means the CPU.
    """
    parts = machine_parts(device)
    parts += [f"torch {torch.__version__}", f"sparsekit {_native.build_info()['version']}"]
    forced = os.environ.get("SPARSEKIT_KERNEL")
    return ", ".join([*parts, f"kernel {forced}"] if forced else parts)


def _verdicts(machines: dict[str, Any]) -> dict[str, dict[str, Verdict]]:
    return {
        machine: {problem: _verdict(entry) for problem, entry in entries.items()}
        for machine, entries in machines.items()
    }


def _verdict(entry: dict[str, Any]) -> Verdict:
    verdict = Verdict(**{field.name: entry[field.name] for field in fields(Verdict)})
    if not all(isinstance(getattr(verdict, name), float) for name in _NUMBERS):
        raise ValueError("a verdict's figures are no numbers")
    return verdict


_NUMBERS = ("dense_ms", "sparse_ms", "speedup")
