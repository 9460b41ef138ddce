"""Packing and unpacking 2:4 on a GPU: the bytes are those of the host."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from cuda_cases import GPU, KERNELS
from torch import Tensor
from torch.nn import functional

import sparsekit as sk
from sparsekit import NM, _native, _ops
from sparsekit.pack import PackedMeta, _pack_on_gpu
from sparsekit.testing import make_problem

DTYPES = [torch.bfloat16, torch.float16]
VECTORS = [1, 4, 8, 16]
# One tile, its edges, and several thread blocks down and across.
SHAPES = [(16, 64), (1, 1), (5, 3), (17, 66), (33, 127), (40, 584), (300, 1032)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_vector = pytest.mark.parametrize("vector", VECTORS)


def packed_on_host(weight: Tensor, mask: Tensor, pattern: NM) -> tuple[Tensor, tuple[int, ...]]:
    """What the GPU should write."""
    canonical = _native.compress(weight.cpu(), mask.cpu(), pattern)
    data = _native.pack(canonical, _native.CUDA_FORMAT)
    return data, _native.packed_header(data)


def chosen(weight: Tensor, pattern: NM) -> Tensor:
    non_zero = weight != 0
    return non_zero if pattern.fits(non_zero) else sk.mask(weight, pattern)


def random_weight(n: int, k: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)
    weight[::3, ::5] = 0
    weight[1::3, ::7] = -0.0
    return weight


# --- without a GPU ----------------------------------------------------------------------------


def test_the_format_is_that_of_the_registry() -> None:
    if not KERNELS:
        pytest.skip("this build has no CUDA kernels")
    for dtype in (torch.float16, torch.bfloat16):
        assert _native.default_format(NM(2, 4), dtype, "cuda") == _native.CUDA_FORMAT


@pytest.mark.parametrize("from_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [False, True])
@each_vector
def test_the_mask_is_that_of_the_host(
    vector: int, given: bool, from_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to the GPU's kernel, with the host's packer in its place."""

    def stand_in(weight: Tensor, mask: Tensor | None, pattern: NM) -> tuple[Tensor, Any]:
        assert mask is not None or pattern.vector == 1
        return packed_on_host(weight, chosen(weight, pattern) if mask is None else mask, pattern)

    monkeypatch.setattr(_native, "pack_cuda", stand_in)
    pattern = NM(2, 4, vector)
    dense = random_weight(33, 70, from_dtype)
    dense[0, :4] = torch.tensor([1, 1.0005, 1.001, 1.0015])  # equal in bfloat16
    pruned = make_problem(1, 33, 70, pattern, from_dtype).weight
    for weight in (dense, pruned):
        mask = pattern.mask(-weight.abs()) if given else chosen(weight, pattern)
        converted = weight.bfloat16()
        packed = _pack_on_gpu(weight, converted, pattern, mask if given else None, "auto")
        data, header = packed_on_host(converted, mask, pattern)
        assert torch.equal(packed.data, data)
        assert packed.meta == PackedMeta(
            "nm_mma_sp", pattern, torch.bfloat16, (33, 70), "auto", header
        )


class Stream:
    cuda_stream = 7


@each_dtype
def test_the_native_code_gets_every_argument(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the GPU: the tensors are on the host, which nothing but the GPU can refuse."""
    expected, refusal = ValueError, "got host memory; copy it there"
    if not _native.cuda_device_count():
        expected, refusal = NotImplementedError, re.escape(_native.cuda_unavailable_reason())
    calls: list[tuple[Any, ...]] = []
    native_pack, native_unpack = _native._C.pack_cuda, _native._C.unpack_cuda

    def record(*arguments: Any) -> tuple[int, ...]:
        calls.append(arguments)
        return tuple(range(13))

    monkeypatch.setattr(_native._C, "pack_cuda", record)
    monkeypatch.setattr(_native._C, "unpack_cuda", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    address = 1 << 40  # aligned as a GPU's memory, and nobody's
    weight = random_weight(33, 80, dtype)[:, 3:73]
    mask = torch.zeros(33, 70, dtype=torch.bool)
    for given in (mask, None):
        data, header = _native.pack_cuda(weight, given, NM(2, 4))
        *head, keep, mask_at, mask_stride, packed, nbytes, misfit, device, stream = calls.pop()
        assert header == tuple(range(13))
        _, dtype_code, n, k, weight_at, stride = head
        assert (n, k, weight_at, stride) == (33, 70, weight.data_ptr(), 80)
        assert (keep, mask_at, mask_stride) == (
            (1, 0, 0) if given is None else (0, mask.data_ptr(), 70)
        )
        assert (packed, nbytes) == (data.data_ptr(), data.numel())
        assert (device, stream) == (weight.device.index, 7)
        with pytest.raises(expected, match=refusal):
            native_pack(*head, keep, mask_at, mask_stride, address, nbytes, misfit, 0, stream)

    data, header = packed_on_host(weight, chosen(weight, NM(2, 4)), NM(2, 4))
    dense = _native.unpack_cuda(data, header, (33, 70), dtype)
    assert (dense.shape, dense.dtype) == ((33, 70), dtype)
    packed, nbytes, *middle, device, stream = calls.pop()
    assert (packed, nbytes, device) == (data.data_ptr(), data.numel(), data.device.index)
    assert middle == [header, 33, 70, dtype_code, dense.data_ptr(), 70]
    with pytest.raises(expected, match=refusal):
        native_unpack(address, nbytes, *middle, 0, stream)


def test_rows_are_copied_only_where_they_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def record(*arguments: Any) -> tuple[int, ...]:
        seen.append((arguments[4], arguments[5]))
        return (0,) * 13

    monkeypatch.setattr(_native._C, "pack_cuda", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    whole = torch.zeros(64, 64).half()
    for weight, copied in (
        (whole, False),
        (whole[:, :9], False),
        (whole[::2, 1:], False),
        (whole.t(), True),
        (whole[:, ::2], True),
        (whole[:1].expand(8, 64), True),
        (whole.view(-1).as_strided((8, 16), (4, 1)), True),
    ):
        _native.pack_cuda(weight, None, NM(2, 4))
        address, stride = seen.pop()
        assert (address != weight.data_ptr()) == copied
        assert stride == (weight.shape[1] if copied else weight.stride(0))


def test_to_dense_unpacks_where_the_format_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_problem(1, 33, 70, "2:4", torch.bfloat16).weight
    data, header = packed_on_host(weight, weight != 0, NM(2, 4))
    result = torch.ones(33, 70)

    def unpack(*arguments: Any) -> Tensor:
        assert arguments == (data, header, (33, 70), torch.bfloat16)
        return result

    monkeypatch.setattr(_native, "unpack_cuda", unpack)
    assert _ops._to_dense_cuda(data, 33, 70, torch.bfloat16, header) is result
    with pytest.raises(ValueError, match="to_dense: a packed weight on a GPU needs its header"):
        _ops._to_dense_cuda(data, 33, 70, torch.bfloat16)
    with pytest.raises(ValueError, match="the header is damaged"):
        _ops._to_dense_cuda(data, 33, 70, torch.bfloat16, [*header[:5], 1, *header[6:]])
    with pytest.raises(ValueError, match="the buffer is cut at"):
        _ops._to_dense_cuda(data[:-1], 33, 70, torch.bfloat16, header)


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def on_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's way fails."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the weight went to the host")

    for name in ("compress", "pack", "unpack", "decompress"):
        monkeypatch.setattr(_native, name, refuse)


def assert_packed(packed: sk.PackedWeight, weight: Tensor, mask: Tensor, pattern: NM) -> None:
    """The bytes of the host, and the way back."""
    data, header = packed_on_host(weight, mask, pattern)
    assert packed.device == GPU
    assert packed.meta == PackedMeta(
        "nm_mma_sp", pattern, weight.dtype, (weight.shape[0], weight.shape[1]), "auto", header
    )
    assert torch.equal(packed.data.cpu(), data)
    kept = torch.where(mask.cpu(), weight.cpu(), torch.zeros((), dtype=weight.dtype))
    op = torch.ops.sparsekit.to_dense(packed.data, *packed.shape, packed.dtype, header)
    for dense in (packed.to_dense(), op):
        assert dense.device == GPU
        # Bits: a zero that was kept has its sign.
        assert torch.equal(dense.cpu().view(torch.int16), kept.view(torch.int16))


@pytest.mark.gpu
@each_dtype
@each_vector
@pytest.mark.parametrize("shape", SHAPES)
def test_given_masks(shape: tuple[int, int], vector: int, dtype: torch.dtype) -> None:
    pattern = NM(2, 4, vector)
    weight = random_weight(*shape, dtype)
    mask = sk.mask(torch.rand(shape, generator=torch.Generator().manual_seed(1)), pattern)
    mask[::2, ::3] = False
    there = weight.to(GPU)
    assert_packed(sk.pack(there, pattern, mask.to(GPU)), weight, mask, pattern)
    assert_packed(sk.pack(there, pattern, mask), weight, mask, pattern)  # a mask on the host


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_magnitudes_and_ties(shape: tuple[int, int], dtype: torch.dtype) -> None:
    pattern = NM(2, 4)
    few = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for weight in (random_weight(*shape, dtype), few):
        mask = chosen(weight, pattern)
        assert_packed(sk.pack(weight.to(GPU), pattern), weight, mask, pattern)


@pytest.mark.gpu
@each_dtype
@each_vector
@pytest.mark.parametrize("shape", SHAPES)
def test_pruned_weights_pack_without_change(
    shape: tuple[int, int], vector: int, dtype: torch.dtype
) -> None:
    pattern = NM(2, 4, vector)
    weight = make_problem(1, *shape, pattern, dtype).weight
    weight = torch.where(weight == 0, -weight, weight)  # -0.0 counts as zero
    packed = sk.pack(weight.to(GPU), pattern)
    assert_packed(packed, weight, weight != 0, pattern)
    assert torch.equal(packed.to_dense().cpu(), weight)


@pytest.mark.gpu
@each_vector
def test_a_dense_weight_of_vectors_and_of_another_dtype(vector: int) -> None:
    pattern = NM(2, 4, vector)
    whole = torch.randint(-9, 10, (33, 70), generator=torch.Generator().manual_seed(3)).float()
    for weight, dtype in itertools.product((whole.bfloat16(), whole, whole.double()), DTYPES):
        packed = sk.pack(weight.to(GPU), pattern, dtype=dtype)
        assert_packed(packed, weight.to(dtype), chosen(weight, pattern), pattern)
    equal = torch.tensor([[1, 1.0005, 1.001, 1.0015]])  # in bfloat16; the choice is by float32
    packed = sk.pack(equal.to(GPU), pattern, dtype=torch.bfloat16)
    assert_packed(packed, equal.bfloat16(), equal > 1.0007, pattern)


@pytest.mark.gpu
def test_weights_of_any_strides() -> None:
    pattern = NM(2, 4)
    whole = random_weight(160, 160, torch.bfloat16)
    there = whole.to(GPU)
    for cut in (
        lambda w: w[:, 8:136],  # whole vectors a row
        lambda w: w[:, 3:131],
        lambda w: w[::2, :77],
        lambda w: w.t(),
        lambda w: w[:, ::2],
        lambda w: w[:1].expand(9, 160),
        lambda w: w[:, :1],
        lambda w: w[5:6, 7:8],
    ):
        weight = cut(whole)
        assert_packed(sk.pack(cut(there), pattern), weight, chosen(weight, pattern), pattern)
        mask = pattern.mask(-weight.abs())
        for left, right in ((0, 0), (3, 5), (8, 8)):
            strided = functional.pad(mask.to(GPU), (left, right))[:, left : left + mask.shape[1]]
            assert_packed(sk.pack(cut(there), pattern, strided), weight, mask, pattern)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu_only")
@pytest.mark.parametrize("target", ["auto", "cuda"])
def test_nothing_goes_to_the_host(target: str) -> None:
    weight = random_weight(64, 96, torch.bfloat16).to(GPU).requires_grad_()
    mask = sk.mask(weight, "2:4")
    for packed in (
        sk.pack(weight, "2:4", target=target),
        sk.pack(weight, "2:4", mask, target=target),
        sk.pack(weight, "2:4v8", target=target),
        sk.pack(weight.float(), "2:4", dtype=torch.float16, target=target),
    ):
        assert packed.meta.target == target
        assert packed.format == "nm_mma_sp"
        assert not packed.to_dense().requires_grad


@pytest.mark.gpu
def test_other_formats_are_packed_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_native, "pack_cuda")
    weight = random_weight(64, 96, torch.bfloat16).to(GPU)
    for pattern, target in (("2:4", "cpu"), ("2:4", "reference"), ("bsr32x32@0.5", "auto")):
        packed = sk.pack(weight, pattern, target=target)
        assert packed.device == GPU
        assert packed.format != "nm_mma_sp"
        kept = torch.where(sk.mask(weight, pattern), weight, torch.zeros_like(weight))
        assert torch.equal(packed.to_dense(), kept)


@pytest.mark.gpu
@each_vector
def test_a_mask_that_does_not_fit_is_refused_as_on_the_host(vector: int) -> None:
    pattern = NM(2, 4, vector)
    for n, k, places in (
        (33, 70, [(32, 60), (32, 61), (32, 63)]),
        (33, 71, [(17, 68), (17, 69), (17, 70)]),  # a group that k cuts
        (70, 600, [(40, 592), (40, 593), (40, 595), (65, 1), (65, 2), (65, 3)]),
        (1, 3, [(0, 0), (0, 1), (0, 2)]),
    ):
        weight = torch.ones(n, k + 1, dtype=torch.float16)[:, :k]
        mask = torch.zeros(n, k, dtype=torch.bool)
        for row, column in places:
            mask[row, column] = True
        for pack in (_native.compress, _native.pack_cuda):
            on_gpu = pack is _native.pack_cuda
            arguments = (weight.to(GPU), mask.to(GPU)) if on_gpu else (weight, mask)
            with pytest.raises(ValueError, match="mask: does not fit") as caught:
                pack(*arguments, pattern)
            if not on_gpu:
                expected = str(caught.value)
        assert str(caught.value) == expected
        with pytest.raises(ValueError, match=f"pack: the mask does not fit {pattern}"):
            sk.pack(weight.to(GPU), pattern, mask.to(GPU))
    # The device works on.
    assert sk.pack(weight.to(GPU), "2:4").shape == (1, 3)


@pytest.mark.gpu
def test_mistakes_are_refused() -> None:
    weight = torch.ones(6, 9, dtype=torch.bfloat16, device=GPU)
    weight[4, 7] = weight[5, 0] = float("nan")
    with pytest.raises(ValueError, match=r"is nan at row 4, column 7 \(2 such values\)"):
        sk.pack(weight)
    with pytest.raises(ValueError, match=r"without a mask a GPU packs 2:4, got 2:4v4"):
        _native.pack_cuda(torch.ones_like(weight), None, NM(2, 4, 4))
    packed = sk.pack(torch.ones_like(weight))
    header = packed.meta.header
    with pytest.raises(ValueError, match="dense has n=6, k=10 in bf16, the packed weight n=6, k=9"):
        torch.ops.sparsekit.to_dense(packed.data, 6, 10, torch.bfloat16, header)
    with pytest.raises(ValueError, match="dense has n=6, k=9 in f16"):
        torch.ops.sparsekit.to_dense(packed.data, 6, 9, torch.float16, header)
    with pytest.raises(ValueError, match="needs its header"):
        torch.ops.sparsekit.to_dense(packed.data, 6, 9, torch.bfloat16)


@pytest.mark.gpu
def test_another_stream() -> None:
    stream = torch.cuda.Stream()
    weight = torch.zeros(2048, 2048, dtype=torch.float16, device=GPU)
    source = random_weight(2048, 2048, torch.float16)
    there = source.to(GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what comes next waits for this, on this stream alone
        weight.copy_(there)
        packed = sk.pack(weight, "2:4")
        dense = packed.to_dense()
    stream.synchronize()
    kept = torch.where(sk.mask(source, "2:4"), source, torch.zeros_like(source))
    assert torch.equal(dense.cpu(), kept)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("pattern", ["2:4", "2:4v4"])
def test_the_backward_pass_is_that_of_the_dense_weight(pattern: str, dtype: torch.dtype) -> None:
    for m, n, k in ((1, 1, 1), (6, 33, 70), (64, 128, 256)):
        problem = make_problem(m, n, k, pattern, dtype, device=GPU)
        packed = sk.pack(problem.weight, pattern)
        x = problem.x.clone().requires_grad_()
        upstream = torch.randn(m, n, dtype=dtype, device=GPU)
        sk.linear(x, packed).backward(upstream)
        assert x.grad is not None
        assert torch.equal(x.grad, upstream @ problem.weight)


@pytest.mark.gpu
def test_the_backward_pass_is_captured_in_a_graph() -> None:
    problem = make_problem(8, 64, 72, "2:4", torch.float16, integers=True, device=GPU)
    packed = sk.pack(problem.weight, "2:4")
    x = problem.x.clone().requires_grad_()
    upstream = torch.ones(8, 64, dtype=torch.float16, device=GPU)

    def step() -> Tensor:
        (grad,) = torch.autograd.grad(sk.linear(x, packed, activation="relu"), x, upstream)
        return grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = step()
    for seed in range(3):
        other = make_problem(8, 64, 72, "2:4", torch.float16, integers=True, seed=seed, device=GPU)
        with torch.no_grad():
            x.copy_(other.x)
        graph.replay()
        active = (x.detach() @ problem.weight.t()) > 0
        assert torch.equal(grad, (upstream * active) @ problem.weight)
