"""Every GPU kernel once on small odd problems, exact: something for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m bench.gpu_sample

Data is made and results are compared on the CPU, so that hardly a kernel but ours is watched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import sparsekit as sk
from sparsekit import _native, testing

_PATTERNS = ("2:4", *(f"bsr{side}x{side}@0.5" for side in (16, 32, 64, 128)), "bsr64x16@0.5")

# A single token, and tails in every direction; many columns for tiles that several blocks share.
PROBLEMS = ((1, 72, 1000), (37, 264, 328), (130, 136, 2056))
"""(m, n, k)"""


@dataclass(frozen=True)
class Sample:
    """A kernel and a problem for it."""

    kernel: _native.KernelInfo
    pattern: str
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.kernel.name} {self.pattern} m={self.m} {self.n}x{self.k}"


def samples(kernels: Sequence[_native.KernelInfo], device: torch.device) -> Iterator[Sample]:
    """Every kernel with each problem of `PROBLEMS` and each pattern that it takes."""
    dtypes = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
    for kernel in kernels:
        for text in _PATTERNS:
            pattern = sk.parse_pattern(text)
            if not kernel.format.startswith(pattern.family):
                continue
            for m, n, k in PROBLEMS:
                dtype = dtypes[kernel.dtype]
                answers = _native.explain(kernel.format, pattern, dtype, n, k, m, device)
                if any(answer.kernel == kernel.name and answer.ok for answer in answers):
                    yield Sample(kernel, text, m, n, k)


def run(sample: Sample, device: torch.device) -> None:
    """One launch with the whole epilogue.

    Raises:
        AssertionError: The result is wrong.
    """
    dtypes = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
    problem = testing.make_problem(
        sample.m, sample.n, sample.k, sample.pattern, dtypes[sample.kernel.dtype], integers=True
    )
    packed = sk.pack(problem.weight, sample.pattern, problem.mask, target="cuda").to(device)
    y = torch.ops.sparsekit.linear(
        problem.x.to(device),
        packed.data,
        sample.n,
        problem.bias.to(device),
        "relu",
        problem.residual.to(device),
        sample.kernel.name,
        packed.meta.header,
    )
    testing.assert_matmul_exact(
        y.cpu(), problem.x, problem.weight, problem.bias, "relu", problem.residual
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(given)
    if not torch.cuda.is_available():
        sys.exit("bench.gpu_sample: torch sees no GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = [kernel for kernel in sk.kernels() if kernel.device == "cuda" and kernel.available]
    if not kernels:
        sys.exit("bench.gpu_sample: no kernel runs on this GPU; `sparsekit doctor` says why")
    wrong, seen = 0, set()
    for sample in samples(kernels, device):
        seen.add(sample.kernel.name)
        try:
            run(sample, device)
            torch.cuda.synchronize()
        except AssertionError as error:
            wrong += 1
            print(f"{sample.name}: {error}")
    missed = [kernel.name for kernel in kernels if kernel.name not in seen]
    print(f"{len(seen)} kernels, {wrong} wrong results")
    if missed:
        print(f"no problem here for {', '.join(missed)}")
    if wrong or missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
