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
from sparsekit.filters import FilterShape

_PATTERNS = ("2:4", *(f"bsr{side}x{side}@0.5" for side in (16, 32, 64, 128)), "bsr64x16@0.5")

# A single token, and tails in every direction; many columns for tiles that several blocks share.
PROBLEMS = ((1, 72, 1000), (37, 264, 328), (130, 136, 2056))
"""(m, n, k)"""

# 3x3 with a border: taps that are padded, and tiles that several blocks share.
IMAGES = ((1, 20, 7, 5, 72), (2, 136, 9, 8, 264))
"""(images, Cin, height, width, Cout)"""


@dataclass(frozen=True)
class Sample:
    """A kernel and a problem for it."""

    kernel: _native.KernelInfo
    pattern: str
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kernel.name} {self.pattern} {'x'.join(map(str, self.sizes))}"


def samples(kernels: Sequence[_native.KernelInfo], device: torch.device) -> Iterator[Sample]:
    """Every kernel with each problem of its operation and each pattern that it takes."""
    dtypes = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
    for kernel in kernels:
        for text in _PATTERNS:
            pattern = sk.parse_pattern(text)
            if not kernel.format.startswith(pattern.family):
                continue
            problems: tuple[tuple[int, ...], ...] = PROBLEMS
            if kernel.op == "conv2d":
                problems = IMAGES
            for sizes in problems:
                m, n, k = sizes if kernel.op == "matmul" else _product(sizes, pattern)
                dtype = dtypes[kernel.dtype]
                answers = _native.explain(
                    kernel.format, pattern, dtype, n, k, m, device, op=kernel.op
                )
                if any(answer.kernel == kernel.name and answer.ok for answer in answers):
                    yield Sample(kernel, text, sizes)


def _product(sizes: tuple[int, ...], pattern: sk.Pattern) -> tuple[int, int, int]:
    """(m, n, k) of a convolution of `IMAGES`."""
    images, channels, height, width, outputs = sizes
    n, k = FilterShape(outputs, channels, (3, 3)).matrix_shape(pattern)
    return images * height * width, n, k


def run(sample: Sample, device: torch.device) -> None:
    """One launch with the whole epilogue.

    Raises:
        AssertionError: The result is wrong.
    """
    if sample.kernel.op == "conv2d":
        _run_conv2d(sample, device)
    else:
        _run_matmul(sample, device)


def _run_matmul(sample: Sample, device: torch.device) -> None:
    dtypes = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
    m, n, k = sample.sizes
    problem = testing.make_problem(
        m, n, k, sample.pattern, dtypes[sample.kernel.dtype], integers=True
    )
    packed = sk.pack(problem.weight, sample.pattern, problem.mask, target=_target(device))
    packed = packed.to(device)
    y = torch.ops.sparsekit.linear(
        problem.x.to(device),
        packed.data,
        n,
        problem.bias.to(device),
        "relu",
        problem.residual.to(device),
        sample.kernel.name,
        packed.meta.header,
    )
    testing.assert_matmul_exact(
        y.cpu(), problem.x, problem.weight, problem.bias, "relu", problem.residual
    )


def _run_conv2d(sample: Sample, device: torch.device) -> None:
    dtypes = {name: dtype for dtype, name in _native.DTYPE_NAMES.items()}
    images, channels, height, width, outputs = sample.sizes
    problem = testing.make_conv_problem(
        (images, channels, height, width),
        outputs,
        (3, 3),
        sample.pattern,
        dtypes[sample.kernel.dtype],
        padding=(1, 1, 1, 1),
        integers=True,
    )
    packed = sk.pack(problem.weight, sample.pattern, problem.mask, target=_target(device))
    packed = packed.to(device)
    epilogue = (problem.bias, "relu", problem.residual, True)
    y = torch.ops.sparsekit.conv2d(
        problem.x.to(device),
        packed.data,
        outputs,
        [3, 3],
        [1, 1],
        [1, 1, 1, 1],
        [1, 1],
        1,
        packed.matrix_shape[1] // 9,
        problem.bias.to(device),
        "relu",
        problem.residual.to(device),
        True,
        sample.kernel.name,
        packed.meta.header if device.type == "cuda" else None,
    )
    testing.assert_conv2d_exact(y.cpu(), problem, *epilogue)


def _target(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "reference"


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
