"""Which kernel was measured to be the fastest: kept in a file, told to the native choice.

`sparsekit.tune` measures. What it found counts from then on, in this process and, for the same CPU
or GPU, in every later one, which reads the file once for each device that it uses. With
`SPARSEKIT_TUNED=0` in the environment the cost model decides, whatever was measured.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch

from sparsekit import _native
from sparsekit.cache import CacheFile, default_path, machine_parts, warn_once
from sparsekit.patterns import Pattern, parse_pattern

REACH = 4
"""A measurement counts for m up to this factor away, and no farther than half the way, on a log
scale, to the next m that was measured."""

_MAX_M = 2**31 - 1
_DTYPES_BACK = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
_CPU = torch.device("cpu")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Problem:
    """What a measurement is for: everything but m and the device.

    Attributes:
        format: byte layout of the weight.
        pattern: its spelling; of blocks without their share of zeros, which does not count.
        dtype: "f32", "bf16" or "f16".
        n: out_features.
        k: in_features.
        threads: on a CPU; 0 on a GPU.
    """

    format: str
    pattern: str
    dtype: str
    n: int
    k: int
    threads: int

    @classmethod
    def of(
        cls,
        format: str,
        pattern: Pattern,
        dtype: torch.dtype,
        n: int,
        k: int,
        device: torch.device,
    ) -> Problem:
        """The problem that a call with torch's present number of threads poses."""
        spelling = str(pattern).partition("@")[0]
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        return cls(format, spelling, _native.DTYPE_NAMES[dtype], n, k, threads)

    def __str__(self) -> str:
        text = f"{self.pattern} {self.dtype} n={self.n} k={self.k} as {self.format}"
        if not self.threads:
            return text
        return f"{text}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Measured:
    """The fastest kernel for one m.

    Attributes:
        m: rows of x.
        kernel: its name.
        us: its median time in microseconds.
        estimated: the kernel that the cost model would choose.
        estimated_us: the median time of that one.
    """

    m: int
    kernel: str
    us: float
    estimated: str
    estimated_us: float


Measurements = dict[Problem, dict[int, Measured]]


def in_use() -> bool:
    """Whether what was measured counts in this process."""
    return os.environ.get("SPARSEKIT_TUNED") != "0"


def ranges(rows: Iterable[int]) -> dict[int, tuple[int, int]]:
    """The m, from and to, that each m measured counts for (see `REACH`)."""
    known = sorted(rows)
    before = [0, *(math.isqrt(a * b) for a, b in itertools.pairwise(known))]
    after = [*before[1:], _MAX_M]
    return {
        m: (max(low + 1, -(-m // REACH)), min(high, m * REACH))
        for m, low, high in zip(known, before, after, strict=True)
    }


@functools.cache
def load(device: torch.device) -> None:
    """Let the measurements that are stored for a device count; the first call alone does."""
    known = stored() if in_use() else {}
    # A wrong SPARSEKIT_ISA has no CPU to name; the first kernel that is asked for says so.
    with contextlib.suppress(ValueError):
        _install(device, known.get(machine_of(device), {}) if known else {})


def remember(
    device: torch.device, problem: Problem, measured: Sequence[Measured]
) -> dict[int, tuple[int, int]]:
    """Store measurements and let them count.

    Args:
        device: where they were made.
        problem: what they are of; older ones for another m stay.
        measured: one for each m.

    Returns:
        The range of m that each m stored for the problem counts for now.
    """
    load(device)  # what is older comes first
    known = stored()
    rows = known.setdefault(machine_of(device), {}).setdefault(problem, {})
    rows.update({one.m: one for one in measured})
    _file().write({name: _entries(problems) for name, problems in known.items()})
    if in_use():
        _install(device, {problem: rows})
    return ranges(rows)


def stored() -> dict[str, Measurements]:
    """All measurements in the file, per machine."""
    return _file().read(_parse)


def clear() -> None:
    """Forget all measurements, of every machine.

    Raises:
        OSError: the file cannot be removed.
    """
    _file().path.unlink(missing_ok=True)
    _native.clear_preferences()


def _file() -> CacheFile:
    path = default_path("tuned.json")
    return CacheFile("file of tuned kernels", 1, "what is tuned counts in one process alone", path)


def machine_of(device: torch.device = _CPU) -> str:
    """Under which name a device's measurements are stored."""
    return ", ".join([*machine_parts(device), f"sparsekit {_native.build_info()['version']}"])


def _install(device: torch.device, problems: Mapping[Problem, Mapping[int, Measured]]) -> None:
    known = {kernel.name for kernel in _native.kernels()}  # another build may have had others
    preferences = [
        _native.Preference(
            problem.format,
            parse_pattern(problem.pattern),
            _DTYPES_BACK[problem.dtype],
            problem.n,
            problem.k,
            problem.threads,
            device,
            *around,
            rows[m].kernel,
        )
        for problem, rows in problems.items()
        for m, around in ranges(rows).items()
        if rows[m].kernel in known
    ]
    try:
        _native.prefer_kernel(preferences)
    except (ValueError, TypeError) as error:
        warn_once(f"the tuned kernels are ignored: {error}; run sparsekit tune --clear")


def _entries(problems: Measurements) -> list[dict[str, Any]]:
    return [
        {"problem": asdict(problem), "measured": [asdict(one) for one in rows.values()]}
        for problem, rows in problems.items()
    ]


def _parse(machines: dict[str, Any]) -> dict[str, Measurements]:
    content: dict[str, Measurements] = {}
    for name, entries in machines.items():
        problems = content.setdefault(name, {})
        for entry in entries:
            problem = _read(Problem, entry["problem"])
            parse_pattern(problem.pattern)
            if problem.dtype not in _DTYPES_BACK:
                raise ValueError("unknown dtype")
            rows = problems.setdefault(problem, {})
            for one in entry["measured"]:
                measured = _read(Measured, one)
                if not 1 <= measured.m <= _MAX_M:
                    raise ValueError("m is out of range")
                rows[measured.m] = measured
    return content


def _read(cls: type[_T], entry: dict[str, Any]) -> _T:
    values = {field.name: entry[field.name] for field in fields(cls)}  # type: ignore[arg-type]
    for field in fields(cls):  # type: ignore[arg-type]
        if type(values[field.name]).__name__ != field.type:
            raise TypeError(f"{field.name} is no {field.type}")
    return cls(**values)
