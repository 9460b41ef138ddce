"""What can run here, why, and what of it is the fastest: the kernel registry made readable."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sparsekit import _native, _ops, preferences
from sparsekit._native import Candidate, KernelInfo
from sparsekit.clock import Call, clock, warm_up
from sparsekit.examples import run_examples
from sparsekit.pack import PackedWeight, pack
from sparsekit.patterns import Pattern, PatternLike, parse_pattern
from sparsekit.preferences import Measured, Problem

ROWS = (1, 8, 64, 256)
"""The m that `tune` measures unless it is told others."""

# The cost model's choice stays unless another kernel is faster by more than the timing's noise.
_MARGIN = 1.02
_MIN_ROUNDS, _MAX_ROUNDS = 5, 101
# A kernel this much slower than the fastest after some rounds is not timed again.
_TRIALS, _HOPELESS = 2, 2.0


class KernelTable(tuple[KernelInfo, ...]):
    """All kernels of this build; `str()` is a table with the reason for each that cannot run."""

    def __str__(self) -> str:
        rows = [
            (kernel.name, "yes" if kernel.available else "no", kernel.reason) for kernel in self
        ]
        return table(("kernel", "runs here", "reason"), rows)


@dataclass(frozen=True)
class Explanation:
    """Every kernel's answer to one problem; `str()` is a table of those for its kind of device.

    Attributes:
        pattern: the weight's pattern.
        format: its byte layout.
        dtype: of the weight and the activations.
        m: rows of x.
        n: out_features.
        k: in_features.
        device: where weight and activations are.
        candidates: all kernels of the registry; at most one is `chosen`.
        op: "matmul" or "conv2d".
    """

    pattern: Pattern
    format: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    device: torch.device
    candidates: tuple[Candidate, ...]
    op: str = "matmul"

    @property
    def chosen(self) -> Candidate | None:
        """The kernel that will run, or None when none can."""
        return next((candidate for candidate in self.candidates if candidate.chosen), None)

    def __str__(self) -> str:
        # The choice first, then what could run, then what could not.
        here = [c for c in self.candidates if c.device == self.device.type]
        order = sorted(here, key=lambda c: (not c.chosen, not c.ok))
        rows = [
            (
                candidate.kernel,
                "chosen" if candidate.chosen else "can run" if candidate.ok else "cannot run",
                "" if candidate.cost_us is None else f"{candidate.cost_us:.1f}",
                candidate.reason,
            )
            for candidate in order
        ]
        head = (
            f"{self.op} m={self.m} n={self.n} k={self.k}, {self.pattern} in format "
            f"{self.format!r}, {self.dtype}, on {self.device}"
        )
        return f"{head}\n{table(('kernel', 'verdict', 'estimated µs', 'reason'), rows)}"


def kernels() -> KernelTable:
    """All kernels of this build, and for each whether this machine can run it and why not."""
    return KernelTable(_native.kernels())


def explain(
    weight: PackedWeight | PatternLike,
    *,
    m: int,
    n: int | None = None,
    k: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    op: str | None = None,
) -> Explanation:
    """Why which kernel runs a problem, and why the others do not.

    A convolution is a multiplication of n output channels (of one group), k kernel positions times
    channels, and m pixels of the output (of all images).

    Args:
        weight: a packed weight, or a pattern with `n` and `k` for one that `pack` would make here.
        m: rows of x (tokens, pixels).
        n: out_features; taken from a packed weight.
        k: in_features; taken from a packed weight.
        dtype: of weight and activations; taken from a packed weight, else float32.
        device: where weight and activations are; taken from a packed weight, else the CPU. On a
            machine without a GPU "cuda" gives the reason.
        op: "matmul" or "conv2d"; None: "conv2d" for a weight packed from filters larger than 1x1.
            A convolution with filters of 1x1, a stride of 1 and no padding is run as a matmul.

    Raises:
        ValueError: n or k is missing, or contradicts the packed weight; no device of this index; an
            unknown op, or "conv2d" for a packed matrix.
        NotImplementedError: no kernel on a GPU takes the pattern in any format.
    """
    if op not in (None, "matmul", "conv2d"):
        raise ValueError(f"explain: expected op to be 'matmul' or 'conv2d', got {op!r}")
    if isinstance(weight, PackedWeight):
        filters = weight.meta.filters
        n_own, k_own = weight.matrix_shape[0] // weight.meta.groups, weight.matrix_shape[1]
        own = (n_own, k_own, weight.dtype)
        for name, asked, has in zip(("n", "k", "dtype"), (n, k, dtype), own, strict=True):
            if asked is not None and asked != has:
                raise ValueError(f"explain: {name}={asked}, the packed weight has {name}={has}")
        pattern, format = weight.pattern, weight.format
        n, k, dtype = own
        device = weight.device if device is None else torch.device(device)
        if op is None:
            op = "conv2d" if filters is not None and filters.taps > 1 else "matmul"
        if op == "conv2d" and filters is None:
            raise ValueError("explain: op='conv2d', the packed weight is a matrix")
    else:
        if n is None or k is None:
            raise ValueError("explain: a pattern alone has no size; pass n= and k=, or a weight")
        pattern = parse_pattern(weight)
        dtype = torch.float32 if dtype is None else dtype
        device = torch.device("cpu" if device is None else device)
        op = "matmul" if op is None else op
        format = _native.default_format(pattern, dtype, _native.target_of(device), op)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"explain: expected a device of type cpu or cuda, got {device}")
    if m < 0 or n < 1 or k < 1:
        raise ValueError(f"explain: expected m >= 0, n >= 1 and k >= 1, got m={m}, n={n}, k={k}")
    if device.type == "cuda" and _native.cuda_device_count() > (device.index or 0):
        preferences.load(torch.device("cuda", device.index or 0))
    candidates = tuple(_native.explain(format, pattern, dtype, n, k, m, device, op))
    return Explanation(pattern, format, dtype, m, n, k, device, candidates, op)


@dataclass(frozen=True)
class Timing:
    """One kernel's time for one m: the median in microseconds, and the cost model's estimate."""

    kernel: str
    us: float
    estimated_us: float


@dataclass(frozen=True)
class TunedRows:
    """What `tune` found for one problem and one m.

    Attributes:
        m: rows of x.
        counts_for: the m, from and to, that it counts for.
        timings: of every kernel that can run, the fastest first.
        estimated: the kernel that the cost model would choose.
        chosen: the kernel that runs from now on.
    """

    m: int
    counts_for: tuple[int, int]
    timings: tuple[Timing, ...]
    estimated: str
    chosen: str

    @property
    def behind(self) -> float:
        """By which share the cost model's choice is slower than the chosen one; 0: the same."""
        us = {timing.kernel: timing.us for timing in self.timings}
        return us[self.estimated] / us[self.chosen] - 1


@dataclass(frozen=True)
class TuneReport:
    """What `tune` found; `str()` is a table for each problem.

    Attributes:
        problems: each problem, the device, and one entry for each m.
    """

    problems: tuple[tuple[Problem, torch.device, tuple[TunedRows, ...]], ...]

    def __str__(self) -> str:
        parts = [
            f"{problem}, on {device}\n{_tune_table(rows)}"
            for problem, device, rows in self.problems
        ]
        found = [(problem, one) for problem, _, rows in self.problems for one in rows]
        behind = [(problem, one) for problem, one in found if one.chosen != one.estimated]
        summary = f"the cost model chose the fastest in {len(found) - len(behind)} of {len(found)}"
        if behind:
            problem, worst = max(behind, key=lambda pair: pair[1].behind)
            where = f"n={problem.n} k={problem.k} m={worst.m}"
            summary += f"; it was behind by up to {worst.behind:.0%} ({where})"
        return "\n\n".join([*parts, summary + _unused()])


def _tune_table(found: Sequence[TunedRows]) -> str:
    head = ("m", "counts for m", "kernel", "measured µs", "estimated µs", "verdict")
    rows = []
    for one in found:
        first, last = one.counts_for
        where = (str(one.m), f"{first} to {last}")
        for timing in one.timings:
            verdict = "chosen" if timing.kernel == one.chosen else ""
            if timing.kernel == one.estimated:
                verdict = f"the cost model's choice, {one.behind:.0%} behind"
                if timing.kernel == one.chosen:
                    verdict = "chosen, by the cost model too"
            figures = (f"{timing.us:.1f}", f"{timing.estimated_us:.1f}")
            rows.append((*where, timing.kernel, *figures, verdict))
            where = ("", "")
    return table(head, rows)


def _unused() -> str:
    """Why what is measured does not count in this process, as the end of a line."""
    if not preferences.in_use():
        return "; SPARSEKIT_TUNED=0: estimates count in this process"
    forced = os.environ.get("SPARSEKIT_KERNEL")
    return f"; SPARSEKIT_KERNEL={forced} is set and comes first" if forced else ""


def tune(
    weight: PackedWeight | PatternLike | nn.Module,
    *,
    m: int | Sequence[int] | None = None,
    n: int | None = None,
    k: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    example_inputs: Any = None,
    threads: int | None = None,
    seconds: float = 0.25,
) -> TuneReport:
    """Measure which kernel is the fastest here, and use it from then on.

    Every kernel that can run is timed in turns with the others, on random activations; the medians
    decide, and the cost model's choice keeps its place unless another kernel is more than 2 %
    faster. The result replaces the cost model's choice in this process and in later ones
    (`sparsekit.preferences`), for this pattern, format, dtype, n, k, device and number of threads,
    and for m up to a factor of 4 away from one that was measured, each m with the nearest on a log
    scale. A later `tune` for the same m replaces it. Results of two kernels differ by rounding.

    Args:
        weight: a packed matrix; a pattern with `n` and `k`; or a model whose sparse linear layers
            are all tuned at the m that they see in `example_inputs`. Convolutions stay with the
            cost model's choice.
        m: rows of x, one or several; None means `ROWS`.
        n: out_features; taken from a packed weight.
        k: in_features; taken from a packed weight.
        dtype: of weight and activations; taken from a packed weight, else float32.
        device: where both are; taken from a packed weight, else the CPU.
        example_inputs: for a model: a tensor, a tuple of positional arguments or a dict of keyword
            arguments, or a list of these.
        threads: of torch while measuring, and what the result counts for; None leaves them.
        seconds: how long to time the kernels for each problem and m; some rounds are always done.

    Raises:
        ValueError: an argument that is missing or does not fit; a model without sparse linear
            layers.
        NotImplementedError: no kernel can run here.
    """
    if not seconds > 0 or (threads is not None and threads < 1):
        raise ValueError(
            f"tune: expected seconds > 0 and threads >= 1, got seconds={seconds}, threads={threads}"
        )
    todo: list[tuple[PackedWeight, list[int]]]
    if isinstance(weight, nn.Module):
        given = {"m": m, "n": n, "k": k, "dtype": dtype, "device": device}
        if extra := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"tune: a model has its own {extra[0]}; leave {extra[0]}= out")
        todo = _seen(weight, example_inputs)
    else:
        if example_inputs is not None:
            raise ValueError("tune: example_inputs= is for a model; pass m= for a weight")
        rows = sorted(set(ROWS if m is None else [m] if isinstance(m, int) else m))
        if not rows or rows[0] < 1:
            raise ValueError(f"tune: expected one m or several, each at least 1, got {m}")
        todo = [(_weight_to_tune(weight, n, k, dtype, device), rows)]
    with _threads(threads):
        work = sum(len(rows) for _, rows in todo)
        with tqdm(total=work, desc="tune", unit="shape", leave=False) as progress:
            return TuneReport(tuple(_tune(*pair, seconds, progress) for pair in todo))


def _weight_to_tune(
    weight: PackedWeight | PatternLike,
    n: int | None,
    k: int | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> PackedWeight:
    if isinstance(weight, PackedWeight) and weight.meta.filters is not None:
        raise ValueError(
            f"tune: the packed weight is a convolution's, {list(weight.shape)}; tune takes matrices"
        )
    # Checks all of them.
    asked = explain(weight, m=1, n=n, k=k, dtype=dtype, device=device)
    if isinstance(weight, PackedWeight):
        if asked.device != weight.device:
            raise ValueError(
                f"tune: device={asked.device}, the packed weight is on {weight.device}; move it "
                "with .to()"
            )
        return weight
    if asked.device.type == "cuda" and (missing := _native.cuda_unavailable_reason()):
        raise NotImplementedError(f"tune: {missing}")
    if asked.device.type == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("tune: this torch has no CUDA; install one that has")
    dense = torch.randn(asked.n, asked.k, generator=torch.Generator().manual_seed(0))
    return pack(dense.to(asked.device, asked.dtype), asked.pattern)


def _seen(model: nn.Module, example_inputs: Any) -> list[tuple[PackedWeight, list[int]]]:
    """One weight for each problem that the sparse layers pose, and the m that they see."""
    if example_inputs is None:
        raise ValueError("tune: a model needs example_inputs=, to know which m its layers see")
    found: dict[tuple[Problem, torch.device], tuple[PackedWeight, set[int]]] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        packed: PackedWeight = module.packed  # type: ignore[assignment]
        x = arguments[0] if arguments else named["x"]
        entry = found.setdefault((_problem(packed), packed.device), (packed, set()))
        if x.numel():
            entry[1].add(x.numel() // packed.matrix_shape[1])

    sparse = [module for module in model.modules() if _holds_matrix(module)]
    if not sparse:
        raise ValueError("tune: the model has no sparse linear layers; convert it first")
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in sparse]
    try:
        run_examples(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not any(rows for _, rows in found.values()):
        raise ValueError("tune: no sparse layer ran on the example inputs, or on empty ones only")
    return [(packed, sorted(rows)) for packed, rows in found.values() if rows]


def _holds_matrix(module: nn.Module) -> bool:
    packed = getattr(module, "packed", None)
    return isinstance(packed, PackedWeight) and packed.meta.filters is None


def _problem(packed: PackedWeight) -> Problem:
    return Problem.of(
        packed.format, packed.pattern, packed.dtype, *packed.matrix_shape, packed.device
    )


def _tune(
    packed: PackedWeight, rows: Sequence[int], seconds: float, progress: tqdm[Any]
) -> tuple[Problem, torch.device, tuple[TunedRows, ...]]:
    problem = _problem(packed)
    timed = {}
    for m in rows:
        timed[m] = _timings(packed, m, seconds)
        progress.update()
    measured = [_decide(m, timings) for m, timings in timed.items()]
    counts_for = preferences.remember(packed.device, problem, measured)
    found = (
        TunedRows(
            one.m,
            counts_for[one.m],
            tuple(sorted(timed[one.m], key=lambda timing: timing.us)),
            one.estimated,
            one.kernel,
        )
        for one in measured
    )
    return problem, packed.device, tuple(found)


def _decide(m: int, timings: Sequence[Timing]) -> Measured:
    best = min(timings, key=lambda timing: timing.us)
    estimated = min(timings, key=lambda timing: timing.estimated_us)  # of equals the first
    if estimated.us <= _MARGIN * best.us:
        best = estimated
    return Measured(m, best.kernel, best.us, estimated.kernel, estimated.us)


@torch.inference_mode()
def _timings(packed: PackedWeight, m: int, seconds: float) -> list[Timing]:
    """All kernels that can run, in the registry's order."""
    answer = explain(packed, m=m)
    estimates = {c.kernel: c.cost_us for c in answer.candidates if c.cost_us is not None}
    if not estimates:
        raise NotImplementedError(f"tune: no kernel can run {answer}")
    n, k = packed.matrix_shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
    x = x.to(packed.device, packed.dtype)
    header = None if packed.device.type == "cpu" else packed.meta.header

    def call_of(kernel: str) -> Call:
        return lambda: _ops.linear_direct(x, packed.data, n, kernel_id=kernel, header=header)

    calls = {kernel: call_of(kernel) for kernel in estimates}
    for call in calls.values():
        warm_up(call, packed.device)
    medians = _medians(calls, packed.device, seconds)
    return [Timing(name, medians[name] * 1e6, estimates[name]) for name in calls]


def _medians(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Median time of each call, timed in turns so that a busy neighbour hits all alike."""
    time_of = clock(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    running = list(calls)
    spent = 0.0
    for turn in range(_MAX_ROUNDS):
        if turn >= _MIN_ROUNDS and spent >= seconds:
            break
        if turn == _TRIALS:
            best = min(min(times[name]) for name in calls)
            running = [name for name in calls if min(times[name]) <= _HOPELESS * best]
        first = turn % len(running)
        for name in running[first:] + running[:first]:
            times[name].append(time_of(calls[name]))
            spent += times[name][-1]
    return {name: median(own) for name, own in times.items()}


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tuned() -> str:
    """What `tune` has stored, for this machine and others, as tables."""
    here = preferences.machine_of()
    parts = []
    for machine, problems in preferences.stored().items():
        rows = [
            (
                str(problem),
                f"{first} to {last}",
                one.kernel,
                f"{one.us:.1f} at m={m}",
                "the same" if one.kernel == one.estimated else f"{one.estimated_us:.1f} µs",
            )
            for problem, measured in problems.items()
            for m, (first, last) in preferences.ranges(measured).items()
            for one in (measured[m],)
        ]
        head = ("problem", "m", "kernel", "measured µs", "the cost model's choice")
        where = "this CPU: " if machine == here else ""
        parts.append(f"{where}{machine}\n{table(head, rows)}")
    return "\n\n".join(parts) or "nothing is tuned; sparsekit tune measures"


def doctor() -> str:
    """This machine as the package sees it: CPU, threads, torch, build, GPU, and what will run."""
    cpu = _native.cpu_info()
    sizes = ", ".join(
        f"{name} {cpu[key] / 1024:,.0f} KiB"
        for name, key in (("L1d", "l1d_bytes"), ("L2", "l2_bytes"), ("L3", "l3_bytes"))
        if cpu.get(key)
    )
    isa = str(cpu["isa"])
    if cpu["isa_detected"] != isa:
        isa += f" (SPARSEKIT_ISA; the CPU has {cpu['isa_detected']})"
    facts = [
        ("CPU", str(cpu["model"]).strip()),
        ("instruction set in use", isa),
        ("features", str(cpu["features"])),
        ("caches", sizes or "unknown"),
        ("cores, torch threads", f"{cpu['cores']}, {torch.get_num_threads()} ({cpu['threading']})"),
        ("torch", torch.__version__),
        *_gpus(),
        ("tuned kernels", _loaded()),
        ("TensorRT plugin", str(_native.tensorrt_plugin() or "none: built without TensorRT")),
        *((f"build: {key}", value) for key, value in _native.build_info().items()),
    ]
    facts += [
        (f"{variable} is set", value)
        for variable in ("SPARSEKIT_KERNEL", "SPARSEKIT_ISA", "SPARSEKIT_TUNED")
        if (value := os.environ.get(variable))
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    lines += ["", "what will run for n=4096, k=1024:", _choices("cpu")]
    if _native.cuda_device_count():
        lines += ["", "on the GPU:", _choices("cuda:0")]
    return "\n".join(lines)


def _loaded() -> str:
    for index in range(_native.cuda_device_count()):
        preferences.load(torch.device("cuda", index))
    return f"{_native.preference_count()} ranges of m loaded{_unused()}"


def _choices(device: str) -> str:
    rows = []
    for spelling in ("2:4", "2:4v4", "bsr16x16@0.75"):
        for dtype in _native.DTYPES:
            names = [_choice(spelling, m, dtype, device) for m in (1, 256)]
            rows.append((spelling, str(dtype).removeprefix("torch."), *names))
    return table(("pattern", "dtype", "m=1", "m=256"), rows)


def _choice(spelling: str, m: int, dtype: torch.dtype, device: str) -> str:
    try:
        chosen = explain(spelling, m=m, n=4096, k=1024, dtype=dtype, device=device).chosen
    except NotImplementedError:
        chosen = None
    return chosen.kernel if chosen else "nothing"


def _gpus() -> list[tuple[str, str]]:
    """What the library sees, and torch where that differs."""
    count = _native.cuda_device_count()
    if count == 0:
        return [("GPU", f"none: {_native.cuda_unavailable_reason()}")]
    facts = []
    for index in range(count):
        gpu = _native.cuda_info(index)
        major, minor = gpu["capability"]
        bandwidth = f", {gpu['bandwidth'] / 1e9:,.0f} GB/s" if gpu["bandwidth"] else ""
        facts.append(
            (
                f"GPU {index}",
                f"{gpu['name']}, compute capability {major}.{minor}, {gpu['sm_count']} SMs, "
                f"{gpu['memory_bytes'] / 2**30:,.0f} GiB{bandwidth}",
            )
        )
    driver, runtime = (
        _native.cuda_version(gpu[f"{part}_version"]) for part in ("driver", "runtime")
    )
    facts.append(("CUDA", f"driver for {driver}, runtime {runtime} built in"))
    if not torch.cuda.is_available():
        facts.append(("torch and GPUs", "this torch has no CUDA; install one that has"))
    return facts


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns as plain text, two spaces apart."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
