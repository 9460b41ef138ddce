"""What a user could run on a GPU instead of sparsekit, each prepared as well as that path allows.

A builder takes `weight [n, k]`, pruned, and `x [m, k]`, both on the GPU, and returns a `Path` whose
calls give `y [m, n]`. What it raises is the reason why the peer is missing from a row.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.baselines import Unavailable
from bench.gpu_cases import Job
from bench.gpu_timing import Call, Path, Stopwatch, queued

Builder = Callable[[Tensor, Tensor], Path]


def peers(job: Job, watch: Stopwatch, compiler: Compiler) -> dict[str, Builder]:
    """The peers of a case by name."""
    found: dict[str, Builder] = {"cuBLAS": _blas("cublas"), "cuBLASLt": _blas("cublaslt")}
    if job.compiled:
        found["torch.compile"] = compiler.build
    if job.pattern.family == "nm":
        found["cuSPARSELt"] = lambda weight, x: _cusparselt(weight, x, watch)
        found["torch CUTLASS"] = _cutlass
    else:
        side = (job.pattern.row_tile, job.pattern.k_tile)
        found["torch BSR"] = lambda weight, x: _bsr(weight, x, side, watch)
    return found


# ---- dense ---------------------------------------------------------------------------------------


def _dense_path(weight: Tensor, x: Tensor, linear: Callable[[Tensor, Tensor], Tensor]) -> Path:
    def make() -> Call:
        copy = weight.clone()
        return lambda: linear(x, copy)

    return Path(make, weight.nbytes)


def _blas(library: str) -> Builder:
    """`F.linear`: torch takes cuBLAS for it, or cuBLASLt where that is preferred."""

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        torch.backends.cuda.preferred_blas_library(library)
        return functional.linear(x, weight)

    return lambda weight, x: _dense_path(weight, x, linear)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight)


class Compiler:
    """`torch.compile`, which tries cuBLAS and many Triton kernels, as long as there is time for it.

    Args:
        budget_s: Seconds that all cases together may take to compile.
    """

    def __init__(self, budget_s: float) -> None:
        self._left_s = budget_s

    def build(self, weight: Tensor, x: Tensor) -> Path:
        if self._left_s <= 0:
            raise Unavailable("no time left to compile")
        start = time.perf_counter()
        torch.backends.cuda.preferred_blas_library("cublas")
        torch._dynamo.reset()  # or it gives up after a few shapes
        # Graphs are made here, for every path alike.
        compiled = torch.compile(_linear, mode="max-autotune-no-cudagraphs", dynamic=False)
        try:
            compiled(x, weight)
            torch.cuda.synchronize()
        finally:
            self._left_s -= time.perf_counter() - start
        return _dense_path(weight, x, compiled)


# ---- 2:4 -----------------------------------------------------------------------------------------


def padded(x: Tensor, multiple: int) -> Tensor:
    """x with rows of zeros up to a multiple, outside of the timed calls; x itself if it is one."""
    missing = -x.shape[0] % multiple
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


def fastest(
    options: Sequence[Mapping[str, Any]],
    call: Callable[..., Tensor],
    watch: Stopwatch,
) -> Mapping[str, Any]:
    """The keyword arguments with which a call takes the least time.

    Raises:
        Exception: None of them works; that of the last.
    """
    best: tuple[float, Mapping[str, Any]] | None = None
    failure: Exception = ValueError("no options")
    for option in options:
        try:
            call(**option)
            torch.cuda.synchronize()
            calls = [partial(call, **option)] * 3
            seconds = min(queued(calls, watch) for _ in range(2))
        except Exception as error:
            failure = error
            torch.cuda.synchronize()  # raises where the GPU itself failed
            continue
        if best is None or seconds < best[0]:
            best = seconds, option
    if best is None:
        raise failure
    return best[1]


# cuSPARSELt takes multiples of 8 columns of 16-bit elements.
_CSLT_ROWS = 8


def _cusparselt(weight: Tensor, x: Tensor, watch: Stopwatch) -> Path:
    """With what its own search finds, once with and once without splitting k."""
    packed = torch._cslt_compress(weight)
    tokens, m = padded(x, _CSLT_ROWS).t(), x.shape[0]

    def multiply(weight: Tensor, **how: Any) -> Tensor:
        return torch._cslt_sparse_mm(weight, tokens, transpose_result=True, **how)[:m]

    options: list[dict[str, int]] = [{}]
    with suppress(RuntimeError):
        found = torch._cslt_sparse_mm_search(packed, tokens, transpose_result=True)
        options.append({"alg_id": found})
    with suppress(RuntimeError, AttributeError):
        library: Any = torch._C._cusparselt
        found = library.mm_search(packed, tokens, None, None, None, True)
        names = ("alg_id", "split_k", "split_k_mode")
        options.append(dict(zip(names, map(int, found), strict=False)))
    how = fastest(options, partial(multiply, packed), watch)

    def make() -> Call:
        copy = packed.clone()
        return lambda: multiply(copy, **how)

    return Path(make, packed.nbytes)


def _cutlass(weight: Tensor, x: Tensor) -> Path:
    """torch's other 2:4, whose kernels are those of compute capability 8.x."""
    sparse = torch.sparse.SparseSemiStructuredTensorCUTLASS
    tokens, m = padded(x, _CSLT_ROWS), x.shape[0]

    def make() -> Call:
        copy = sparse.from_dense(weight)
        return lambda: functional.linear(tokens, copy)[:m]

    return Path(make, weight.numel() * 9 // 8)


# ---- blocks --------------------------------------------------------------------------------------

# Triton multiplies 16 columns and more.
_BSR_TOKENS = 16


def bsr_options(tokens: int, block: tuple[int, int]) -> Iterator[dict[str, int]]:
    """Parameters of torch's Triton kernel worth trying: it brings tuned ones for the A100 alone.

    Args:
        tokens: Padded.
        block: Rows and columns of a block.
    """
    # What it takes on other GPUs.
    yield {
        "SPLIT_N": max(tokens // block[0], 1),
        "GROUP_SIZE_ROW": 4,
        "num_stages": 1,
        "num_warps": 4,
    }
    large = min(block) >= 64
    widths = (64, 128) if tokens >= 64 else (tokens,)
    warps = (4, 8) if large and tokens >= 64 else (4,)
    for width, stages, count in itertools.product(widths, (2, 4), warps):
        if tokens % width == 0:
            yield {
                "SPLIT_N": tokens // width,
                "GROUP_SIZE_ROW": 4,
                "num_stages": stages,
                "num_warps": count,
            }


# By block, dtype and whether there are many tokens: the tokens of a tile and the parameters that
# were the fastest on the first such case. Trying out is mostly compiling, a second for each.
_tuned: dict[tuple[tuple[int, int], torch.dtype, bool], tuple[int, dict[str, int]]] = {}


def _bsr(weight: Tensor, x: Tensor, block: tuple[int, int], watch: Stopwatch) -> Path:
    """`bsr_dense_addmm`, what `F.linear` calls for a BSR weight, with the best parameters."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    n, m = weight.shape[0], x.shape[0]
    tokens = padded(x, _BSR_TOKENS)
    count = tokens.shape[0]
    sparse = weight.to_sparse_bsr(block)

    def multiply(weight: Tensor, meta: Mapping[str, int]) -> Tensor:
        y = x.new_empty(count, n)
        # y.t() is also the summand, which beta=0 keeps from being read.
        bsr_dense_addmm(y.t(), weight, tokens.t(), beta=0, out=y.t(), meta=dict(meta))
        return y[:m]

    key = (block, weight.dtype, count >= 64)
    if key not in _tuned:
        options = [{"meta": meta} for meta in bsr_options(count, block)]
        found = fastest(options, partial(multiply, sparse), watch)["meta"]
        _tuned[key] = count // found["SPLIT_N"], found
    width, found = _tuned[key]
    meta = {**found, "SPLIT_N": max(1, count // width)}

    def make() -> Call:
        copy = torch.sparse_bsr_tensor(
            sparse.crow_indices().clone(),
            sparse.col_indices().clone(),
            sparse.values().clone(),
            size=weight.shape,
        )
        return lambda: multiply(copy, meta)

    return Path(make, sparse.values().nbytes)


def versions() -> dict[str, str]:
    """Of the libraries that multiply here."""
    found = {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    with suppress(metadata.PackageNotFoundError):
        found["Triton"] = metadata.version("triton")
    cusparselt = torch.backends.cusparselt.version()
    if cusparselt is not None:
        found["cuSPARSELt"] = str(cusparselt)
    return found
