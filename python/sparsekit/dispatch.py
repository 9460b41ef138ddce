"""What can run here, and why: the kernel registry made readable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsekit import _native
from sparsekit._native import Candidate, KernelInfo
from sparsekit.pack import PackedWeight
from sparsekit.patterns import Pattern, PatternLike, parse_pattern


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
    """

    pattern: Pattern
    format: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    device: torch.device
    candidates: tuple[Candidate, ...]

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
            f"matmul m={self.m} n={self.n} k={self.k}, {self.pattern} in format {self.format!r}, "
            f"{self.dtype}, on {self.device}"
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
) -> Explanation:
    """Why which kernel runs a problem, and why the others do not.

    Args:
        weight: a packed weight, or a pattern with `n` and `k` for one that `pack` would make here.
        m: rows of x (tokens, pixels).
        n: out_features; taken from a packed weight.
        k: in_features; taken from a packed weight.
        dtype: of weight and activations; taken from a packed weight, else float32.
        device: where weight and activations are; taken from a packed weight, else the CPU. On a
            machine without a GPU "cuda" gives the reason.

    Raises:
        ValueError: n or k is missing, or contradicts the packed weight; no device of this index.
        NotImplementedError: no kernel on a GPU takes the pattern in any format.
    """
    if isinstance(weight, PackedWeight):
        own = (*weight.shape, weight.dtype)
        for name, asked, has in zip(("n", "k", "dtype"), (n, k, dtype), own, strict=True):
            if asked is not None and asked != has:
                raise ValueError(f"explain: {name}={asked}, the packed weight has {name}={has}")
        pattern, format = weight.pattern, weight.format
        (n, k), dtype = weight.shape, weight.dtype
        device = weight.device if device is None else torch.device(device)
    else:
        if n is None or k is None:
            raise ValueError("explain: a pattern alone has no size; pass n= and k=, or a weight")
        pattern = parse_pattern(weight)
        dtype = torch.float32 if dtype is None else dtype
        device = torch.device("cpu" if device is None else device)
        format = _native.default_format(pattern, dtype, _native.target_of(device))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"explain: expected a device of type cpu or cuda, got {device}")
    if m < 0 or n < 1 or k < 1:
        raise ValueError(f"explain: expected m >= 0, n >= 1 and k >= 1, got m={m}, n={n}, k={k}")
    candidates = tuple(_native.explain(format, pattern, dtype, n, k, m, device))
    return Explanation(pattern, format, dtype, m, n, k, device, candidates)


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
        *((f"build: {key}", value) for key, value in _native.build_info().items()),
    ]
    facts += [
        (f"{variable} is set", value)
        for variable in ("SPARSEKIT_KERNEL", "SPARSEKIT_ISA")
        if (value := os.environ.get(variable))
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    lines += ["", "what will run for n=4096, k=1024:", _choices("cpu")]
    if _native.cuda_device_count():
        lines += ["", "on the GPU:", _choices("cuda:0")]
    return "\n".join(lines)


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
