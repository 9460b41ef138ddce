"""torch's sparse tensors: its own conversions are the reference for what ours read."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import sparsekit as sk
from sparsekit import interop
from sparsekit.interop.torch_sparse import decode_cutlass

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pruned(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight * sk.mask(weight, "1:2" if dtype == torch.float32 else "2:4")


def semi_structured(weight: Tensor, kind: type = SparseSemiStructuredTensorCUTLASS) -> Tensor:
    """As on a GPU, from torch's own conversion on the CPU."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the class is a prototype
        return kind(weight.shape, packed, meta, None, None, None)  # type: ignore[no-any-return]


# --- semi-structured --------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_the_layout_is_the_one_torch_writes_and_reads(
    rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    weight = pruned((32 * rows, 32 * columns), dtype, seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = 0
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    dense, mask = decode_cutlass(packed, meta, tuple(weight.shape))  # type: ignore[arg-type]
    assert torch.equal(dense, weight)
    if dtype != torch.float32:  # whose halves torch moves as float16, which changes some of them
        assert torch.equal(dense, sparse_semi_structured_to_dense_cutlass(packed, meta))
    assert bool(mask[weight != 0].all())
    assert int(mask.sum()) == weight.numel() // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_choice_of_positions(dtype: torch.dtype) -> None:
    size = 2 if dtype == torch.float32 else 4
    masks = torch.cartesian_prod(*[torch.arange(2)] * size)
    masks = masks[masks.sum(1) == size // 2]
    groups = torch.randint(len(masks), (64, 128 // size))
    weight = (masks[groups].flatten(1) * (1 + torch.arange(64 * 128).view(64, 128))).to(dtype)
    packed = interop.from_torch_sparse(semi_structured(weight))
    assert torch.equal(packed.to_dense(), weight)
    assert str(packed.pattern) == ("1:2" if dtype == torch.float32 else "2:4")


def test_stored_zeros_keep_their_place() -> None:
    weight = torch.zeros(32, 64, dtype=torch.float16)
    tensor = semi_structured(weight)
    tensor.packed.fill_(1)  # type: ignore[attr-defined]
    assert int((interop.from_torch_sparse(tensor).to_dense() == 1).sum()) == 32 * 32
    mask = interop.read({"weight": semi_structured(weight)}).masks[""]
    assert int(mask.sum()) == 32 * 32


def test_metadata_that_is_no_choice_of_two() -> None:
    packed, meta = sparse_semi_structured_from_dense_cutlass(pruned((32, 64), torch.float16))
    good = decode_cutlass(packed, meta, (32, 64))[0]
    for code in (0b0000, 0b0101, 0b0001, 0b1010, 0b1111, 0b0010):
        bad = meta.clone()
        bad[3, 1] = (bad[3, 1] & 0x0FFF) | (code - 16 if code > 7 else code) << 12
        with pytest.raises(ValueError, match=f"is {code:04b}, which is no choice of 2 of 4"):
            decode_cutlass(packed, bad, (32, 64))
    packed, meta = sparse_semi_structured_from_dense_cutlass(good.float() * 0)
    meta[0, 0] = 0x4448  # 8 is a choice of 16-bit numbers, not of 32-bit ones
    with pytest.raises(ValueError, match="is 1000, which is no choice of 1 of 2"):
        decode_cutlass(packed, meta, (32, 64))


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=256, max_size=256), st.sampled_from(DTYPES))
def test_any_metadata_is_refused_or_fits(data: bytes, dtype: torch.dtype) -> None:
    k = 32 if dtype == torch.float32 else 64
    meta = torch.frombuffer(bytearray(data), dtype=torch.int16).view(32, 4)
    try:
        dense, mask = decode_cutlass(torch.ones(32, k // 2, dtype=dtype), meta, (32, k))
    except ValueError:
        return
    assert torch.equal(dense != 0, mask)
    assert (sk.NM(1, 2) if dtype == torch.float32 else sk.NM(2, 4)).fits(mask)


@pytest.mark.parametrize(
    ("packed", "meta", "shape"),
    [
        ((32, 32), (32, 4), (32, 128)),
        ((32, 32), (32, 2), (32, 64)),
        ((16, 32), (16, 4), (16, 64)),
        ((32, 8), (32, 1), (32, 16)),
        ((64, 16), (32, 4), (32, 64)),
        ((0, 32), (0, 4), (0, 64)),
    ],
)
def test_sizes_that_do_not_fit(
    packed: tuple[int, int], meta: tuple[int, int], shape: tuple[int, int]
) -> None:
    values, words = torch.ones(packed).half(), torch.full(meta, 0x4444).short()
    with pytest.raises(ValueError, match=r"a semi-structured tensor .* has values"):
        decode_cutlass(values, words, shape)


def test_semi_structured_tensors_that_cannot_be_read() -> None:
    weight = pruned((32, 64), torch.float16)
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    with pytest.raises(ValueError, match=r"got torch\.int8 and torch\.int32"):
        decode_cutlass(packed.to(torch.int8), meta.int(), (32, 64))
    with pytest.raises(NotImplementedError, match="cuSPARSELt does not document"):
        interop.from_torch_sparse(semi_structured(weight, SparseSemiStructuredTensorCUSPARSELT))
    flipped = SparseSemiStructuredTensorCUTLASS(weight.t().shape, None, None, packed, meta, None)
    with pytest.raises(ValueError, match="is a transposed one"):
        interop.from_torch_sparse(flipped)


@pytest.mark.parametrize(
    ("pattern", "dtype", "says"),
    [
        ("1:4", torch.float16, "expected a 2:4 matrix in torch.float16, got 1:4"),
        ("2:4", torch.float32, "expected a 1:2 matrix in torch.float32, got 2:4"),
        ("bsr16x16", torch.float16, "expected a 2:4 matrix in torch.float16, got bsr16x16"),
    ],
)
def test_weights_that_torch_has_no_tensor_for(pattern: str, dtype: torch.dtype, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        interop.to_torch_semi_structured(sk.pack(torch.randn(32, 64), pattern, dtype=dtype))


def test_semi_structured_tensors_are_made_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = sk.pack(pruned((32, 64), torch.float16))
    with pytest.raises(ValueError, match="makes these tensors on a GPU only, not on cpu"):
        interop.to_torch_semi_structured(packed, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="makes these tensors on a GPU only"):
        interop.to_torch_semi_structured(packed)


@pytest.mark.gpu
@pytest.mark.parametrize("cutlass", [True, False])
def test_semi_structured_tensors_on_a_gpu(cutlass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", cutlass)
    weight = pruned((128, 256), torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensor = interop.to_torch_semi_structured(sk.pack(weight))
    back = interop.from_torch_sparse(tensor)
    assert back.device.type == "cuda"
    assert torch.equal(back.to_dense().cpu(), weight)


# --- blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 8), (2, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bsr_there_and_back(block: tuple[int, int], dtype: torch.dtype) -> None:
    pattern = sk.BlockSparse(block, 0.75)
    weight = torch.randn(64, 96).to(dtype)
    weight *= sk.mask(weight, pattern)
    tensor = weight.to_sparse_bsr(block)
    packed = interop.from_torch_sparse(tensor)
    assert packed.pattern == pattern
    assert torch.equal(packed.to_dense(), weight)
    back = interop.to_torch_bsr(packed)
    assert back.layout == torch.sparse_bsr
    assert back.values().shape[1:] == block
    assert torch.equal(back.to_dense(), weight)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_unstructured_tensors(layout: torch.layout) -> None:
    weight = torch.randn(7, 13) * (torch.rand(7, 13) < 0.3)
    weight[2] = 0
    packed = interop.from_torch_sparse(weight.to_sparse(layout=layout))
    assert packed.pattern.block_shape == (1, 1)  # type: ignore[attr-defined]
    assert torch.equal(packed.to_dense(), weight)
    x = torch.randn(3, 13)
    torch.testing.assert_close(sk.linear(x, packed), x @ weight.t())


def test_stored_zeros_of_blocks_stay_and_coo_duplicates_add() -> None:
    stored = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    tensor = stored.to_sparse_csr()
    tensor.values()[0] = 0
    assert interop.read({"a.weight": tensor}).masks["a"].tolist() == [
        [False, True, False],
        [True, False, False],
    ]
    twice = torch.sparse_coo_tensor(
        torch.tensor([[0, 0], [1, 1]]), torch.ones(2), (2, 2), check_invariants=True
    )
    assert interop.from_torch_sparse(twice).to_dense().tolist() == [[0, 2], [0, 0]]


def bsr(crow: list[int], columns: list[int], values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_bsr_tensor(
        torch.tensor(crow), torch.tensor(columns), values, shape, check_invariants=False
    )


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(4, 4), "expected a semi-structured, BSR, CSR or COO tensor, got torch.strided"),
        (torch.ones(4, 4).to_sparse_csc(), "got torch.sparse_csc"),
        (torch.ones(2, 4, 4).to_sparse_csr(), r"expected \[n, k\], got \[2, 4, 4\]"),
        (torch.ones(4, 4).double().to_sparse_csr(), "values can be float32, .*, got torch.float64"),
        (torch.ones(4, 4).int().to_sparse_bsr((2, 2)), "got torch.int32"),
        (torch.ones(512, 512).to_sparse_bsr((256, 256)), "block_shape must be two numbers from 1"),
        (torch.full((4, 4), torch.nan).to_sparse_csr(), "a value is not finite"),
        (bsr([0, 1, 2], [0, 9], torch.ones(2, 2, 2), (4, 4)), "from_torch_sparse: "),
        (bsr([0, 1, 2], [0, -1], torch.ones(2, 2, 2), (4, 4)), "col_indices are out of range"),
        (bsr([0, 1, 2], [0, 1 << 40], torch.ones(2, 2, 2), (4, 4)), "col_indices are out of"),
        (bsr([0, 2, 2], [1, 0], torch.ones(2, 2, 2), (4, 4)), "from_torch_sparse: "),
        (bsr([0, 5, 2], [1, 0], torch.ones(2, 2, 2), (4, 4)), "from_torch_sparse: "),
        (bsr([0, 1, 2], [0, 1, 1], torch.ones(2, 2, 2), (4, 4)), "from_torch_sparse: "),
        (bsr([0, 1], [0], torch.ones(1, 2, 2), (4, 4)), "from_torch_sparse: "),
    ],
)
def test_tensors_that_cannot_be_read(tensor: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        interop.from_torch_sparse(tensor)


def test_weights_that_are_no_bsr_of_torch() -> None:
    for packed, says in (
        (sk.pack(torch.randn(8, 8), "2:4"), "expected a matrix of blocks, got 2:4"),
        (sk.pack(torch.randn(8, 8, 3, 3), "bsr4x4"), r"got bsr4x4@0.5 of shape \[8, 8, 3, 3\]"),
        (sk.pack(torch.randn(10, 8), "bsr4x4"), r"whole blocks, \[10, 8\] is no multiple of bsr"),
    ):
        with pytest.raises(ValueError, match=says):
            interop.to_torch_bsr(packed)
