"""Filters as matrices, and what packs, masks and recognises them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekit as sk
from sparsekit import NM, BlockSparse, _native, parse_pattern
from sparsekit.filters import FilterShape, to_filters, to_matrix, to_tiles
from sparsekit.pack import PackedWeight, _pack_on_gpu

PATTERNS = ["2:4", "2:4v4", "4:16", "bsr16x16@0.75", "bsr4x2@0.5"]
# Shape of the weight, groups.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((32, 24, 3, 3), 1),
    ((16, 3, 2, 5), 1),
    ((64, 32, 1, 1), 1),
    ((32, 10, 1, 1), 2),
    ((64, 16, 3, 3), 4),
    ((32, 12, 5), 2),
    ((16, 7, 1), 1),
]
each_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# --- the matrix -------------------------------------------------------------------------------


def test_a_column_is_a_channel_of_a_tap() -> None:
    filters = weight_of((4, 5, 2, 3))
    matrix = to_matrix(filters, parse_pattern("2:4"))
    assert matrix.shape == (4, 6 * 8)
    for r in range(2):
        for s in range(3):
            first = (r * 3 + s) * 8
            assert torch.equal(matrix[:, first : first + 5], filters[:, :, r, s])
            assert not matrix[:, first + 5 : first + 8].any()


@pytest.mark.parametrize(
    ("channels", "kernel", "pattern", "tap"),
    [
        (3, (1, 1), "2:4", 3),
        (3, (3, 3), "2:4", 8),
        (8, (3, 3), "2:4", 8),
        (9, (1, 2), "2:4", 16),
        (9, (3, 3), "4:16", 16),
        (17, (3, 3), "4:16", 32),
        (16, (3, 3), "bsr16x16@0.5", 16),
        (16, (3, 3), "bsr16x64@0.5", 64),
        (16, (3, 3), "bsr16x12@0.5", 24),
    ],
)
def test_taps_are_padded_to_whole_tiles(
    channels: int, kernel: tuple[int, int], pattern: str, tap: int
) -> None:
    shape = FilterShape(16, channels, kernel)
    kind = parse_pattern(pattern)
    assert shape.tap(kind) == tap
    assert shape.matrix_shape(kind) == (16, kernel[0] * kernel[1] * tap)


@each_shape
@each_pattern
def test_to_filters_is_the_inverse(shape: tuple[int, ...], groups: int, pattern: str) -> None:
    filters = weight_of(shape)
    layout = FilterShape.of(filters, groups)
    assert layout.weight_shape == shape
    for tensor in (filters, filters > 0, filters.transpose(0, 1).contiguous().transpose(0, 1)):
        matrix = to_matrix(tensor, parse_pattern(pattern))
        assert matrix.dtype == tensor.dtype
        back = to_filters(matrix, layout)
        assert torch.equal(back, tensor)
        assert back.is_contiguous()


def test_shapes_that_are_none_are_refused() -> None:
    for arguments, says in (
        ((0, 3, (3, 3)), "expected sizes of at least 1"),
        ((4, 3, (3, -3)), "expected sizes of at least 1"),
        ((4, 3, (3, True)), "expected sizes of at least 1"),
        ((4, 3.0, (3, 3)), "expected sizes of at least 1"),
        ((4, 3, (3, 3), 0), "expected sizes of at least 1"),
        ((4, 3, (3, 3, 3)), "expected sizes of at least 1"),
        ((4, 3, (3, 3), 1, 1), "or 1 and a kernel of height 1"),
        ((4, 3, (1, 3), 1, 3), "expected 2 dimensions"),
        ((4, 3, (3, 3), 3), r"4 output channels are no multiple of groups=3"),
    ):
        with pytest.raises(ValueError, match=says):
            FilterShape(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[Cout, Cin, height, width\], got \[3, 4\]"):
        FilterShape.of(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="2:4v4 decides 4 rows together, a group has 6 output"):
        FilterShape(12, 3, (3, 3), 2).matrix_shape(NM(2, 4, vector=4))
    for matrix in (torch.zeros(3, 72), torch.zeros(4, 71), torch.zeros(4, 27)):
        with pytest.raises(ValueError, match="does not hold FilterShape"):
            to_filters(matrix, FilterShape(4, 5, (3, 3)))


# --- pack, mask, detect -----------------------------------------------------------------------


def fits(shape: tuple[int, ...], groups: int, pattern: str) -> bool:
    return groups == 1 or shape[0] // groups % parse_pattern(pattern).row_tile == 0


@each_shape
@each_pattern
def test_what_is_packed_comes_back(shape: tuple[int, ...], groups: int, pattern: str) -> None:
    if not fits(shape, groups, pattern):
        with pytest.raises(ValueError, match="rows together, a group has"):
            sk.pack(weight_of(shape), pattern, groups=groups)
        return
    for dtype in (torch.float32, torch.bfloat16):
        weight = weight_of(shape, dtype)
        mask = sk.mask(weight, pattern)
        assert mask.shape == weight.shape
        assert parse_pattern(pattern).fits(to_matrix(mask, parse_pattern(pattern)))
        expected = weight * mask
        for packed in (
            sk.pack(weight, pattern, groups=groups),
            sk.pack(weight, pattern, mask, groups=groups),
            sk.pack(expected, pattern, groups=groups, target="reference"),
        ):
            assert packed.shape == shape
            assert packed.matrix_shape == to_matrix(weight, packed.pattern).shape
            assert torch.equal(packed.to_dense(), expected)
            assert f"PackedWeight({list(shape)}" in repr(packed)


@each_shape
@each_pattern
def test_copies_and_pickles_are_the_same_bytes(
    shape: tuple[int, ...], groups: int, pattern: str
) -> None:
    if not fits(shape, groups, pattern):
        return
    packed = sk.pack(weight_of(shape), pattern, groups=groups)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other.meta == packed.meta
        assert torch.equal(other.data, packed.data)
    half = packed.to(torch.bfloat16)
    assert half.meta.filters == packed.meta.filters
    assert torch.equal(half.to_dense(), packed.to_dense().bfloat16())


def test_the_canonical_form_is_that_of_the_whole_matrix() -> None:
    """Groups of blocks have different lengths, and the bytes of each start on 128."""
    pattern = BlockSparse((8, 4), 0.75)
    weight = weight_of((32, 16, 3, 3))
    weight[:8] *= 10  # nearly all blocks are in the first group
    packed = sk.pack(weight, pattern, groups=4)
    assert packed.nbytes % (4 * 128) == 0
    parts = packed.data.view(4, -1)
    assert len({_native.packed_info(part).nnzb for part in parts}) > 1
    whole = sk.pack(weight, pattern).canonical()
    canonical = packed.canonical()
    for name in ("values", "indices", "crow_indices"):
        assert torch.equal(getattr(canonical, name), getattr(whole, name))
    assert canonical.shape == whole.shape
    headers = [_native.packed_header(part) for part in parts]
    assert packed.meta.header == tuple(number for header in headers for number in header)


def test_padding_is_never_kept_in_place_of_a_channel() -> None:
    for pattern in ("2:4", "2:4v4", "bsr1x1@0.75", "bsr16x8@0.5"):
        weight = weight_of((16, 5, 3, 3)).abs() + 1
        kind = parse_pattern(pattern)
        kept = int(sk.mask(weight, pattern).sum())
        matrix = to_tiles(weight, kind)
        # As many as if the score of the padding were the lowest there is.
        score = torch.where(matrix > 0, matrix, torch.full_like(matrix, -1e3))
        assert kept == int((kind.mask(score) & (matrix > 0)).sum())


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (64, 24, 3, 3), (48, 40, 5), (64, 64, 1, 1)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4v4", "bsr16x8@0.75", "bsr4x1@0.5"])
def test_detect_finds_the_pattern(shape: tuple[int, ...], pattern: str) -> None:
    weight = weight_of(shape)
    pruned = weight * sk.mask(weight, pattern)
    found = sk.detect(pruned)
    assert found is not None
    assert str(found).partition("@")[0] == pattern.partition("@")[0]
    assert torch.equal(sk.pack(pruned, found).to_dense(), pruned)


def test_detect_takes_no_padding_for_zeros() -> None:
    for shape in ((64, 3, 3, 3), (64, 1, 3, 3), (64, 5, 7), (32, 33, 2, 2)):
        weight = weight_of(shape)
        assert sk.detect(weight) is None
        half = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
        assert sk.detect(weight * half) is None
    blocks = weight_of((64, 16, 3, 3))
    blocks *= sk.mask(blocks, "bsr16x16@0.75")
    assert str(sk.detect(blocks)) == "bsr16x16@0.75"  # not as wide as a padded tap could be


def test_what_does_not_fit_is_refused() -> None:
    weight = weight_of((8, 4, 3, 3))
    with pytest.raises(ValueError, match="a matrix has no groups, got groups=2"):
        sk.pack(torch.eye(8), "2:4", groups=2)
    with pytest.raises(ValueError, match="8 output channels are no multiple of groups=3"):
        sk.pack(weight, "2:4", groups=3)
    with pytest.raises(ValueError, match=r"a depthwise convolution .* leave it dense"):
        sk.pack(weight[:, :1], "2:4", groups=8)
    with pytest.raises(ValueError, match=r"mask has shape \[8, 36\], the weight \[8, 4, 3, 3\]"):
        sk.pack(weight, "2:4", torch.ones(8, 36, dtype=torch.bool))
    with pytest.raises(ValueError, match="the mask does not fit 2:4: row 0, columns 0-3 keep 4"):
        sk.pack(weight, "2:4", torch.ones_like(weight, dtype=torch.bool))
    weight[2, 3, 1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the weight is nan at \[2, 3, 1, 0\] \(1 such values\)"):
        sk.pack(weight, "2:4")


def test_a_canonical_weight_of_other_filters_is_refused() -> None:
    canonical = sk.pack(weight_of((8, 4, 3, 3)), "2:4").canonical()
    with pytest.raises(ValueError, match=r"makes a matrix \[8, 48\], the canonical weight is"):
        PackedWeight.from_canonical(canonical, filters=FilterShape(8, 4, (3, 2)))


@pytest.mark.parametrize("vector", [1, 4])
def test_groups_are_packed_one_by_one_on_a_gpu(
    vector: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to the GPU's kernel, with the host's packer in its place."""

    def stand_in(weight: Tensor, mask: Tensor | None, pattern: NM) -> tuple[Tensor, Any]:
        kept = weight != 0 if mask is None else mask
        if mask is None and not pattern.fits(kept):
            kept = pattern.mask(weight.abs())
        data = _native.pack(_native.compress(weight, kept, pattern), _native.CUDA_FORMAT)
        return data, _native.packed_header(data)

    monkeypatch.setattr(_native, "pack_cuda", stand_in)
    pattern = NM(2, 4, vector)
    weight = weight_of((32, 12, 3, 3), torch.float16)
    filters = FilterShape.of(weight, 2)
    matrix = to_matrix(weight, pattern)
    packed = _pack_on_gpu(matrix, matrix, pattern, None, "auto", filters)
    with monkeypatch.context() as patch:
        patch.setattr(_native, "default_format", lambda *_: _native.CUDA_FORMAT)
        expected = sk.pack(weight, pattern, groups=2)
    assert packed.meta == expected.meta
    assert torch.equal(packed.data, expected.data)
    assert torch.equal(packed.to_dense(), weight * sk.mask(weight, pattern))


@pytest.mark.parametrize("channels", [4, 12, 16, 20])
def test_padding_does_not_count_among_the_blocks_that_are_kept(channels: int) -> None:
    weight = torch.randn(16, channels, 3, 3, generator=torch.Generator().manual_seed(channels))
    for chosen in (sk.mask(weight, "bsr4x4@0.5"), sk.pack(weight, "bsr4x4@0.5").to_dense() != 0):
        assert chosen.float().mean().item() == pytest.approx(0.5, abs=0.01)
