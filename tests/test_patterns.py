"""Patterns: masks, what fits, spellings, choosing modules, recognising."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from sparsekit import NM, BlockSparse, Pattern, parse_pattern
from sparsekit.patterns import (
    at_density,
    detect_pattern,
    match,
    require_match,
    resolve_pattern,
    select_modules,
)

SPELLINGS = [
    "1:2",
    "1:4",
    "2:4",
    "4:8",
    "5:16",
    "2:4v4",
    "1:4v8",
    "4:8v16",
    "bsr1x4@0.5",
    "bsr4x1@0.25",
    "bsr16x16@0.75",
    "bsr12x20@0.4",
    "bsr64x64@0.9",
    "bsr1x1@0.8",
]
SHAPES = [(1, 1), (3, 5), (16, 64), (37, 101), (130, 67)]


def best_by_hand(score: Tensor, pattern: NM) -> Tensor:
    """The N:M mask, group by group."""
    n, k = score.shape
    mask = torch.zeros(n, k, dtype=torch.bool)
    for row, column in itertools.product(range(0, n, pattern.vector), range(0, k, pattern.m)):
        group = score[row : row + pattern.vector, column : column + pattern.m].sum(0)
        order = sorted(range(len(group)), key=lambda i: (-group[i].item(), i))
        for i in order[: pattern.n]:
            mask[row : row + pattern.vector, column + i] = True
    return mask


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_and_repr_are_read_back(spelling: str) -> None:
    pattern = parse_pattern(spelling)
    assert str(pattern) == spelling
    assert eval(repr(pattern)) == pattern
    assert hash(eval(repr(pattern))) == hash(pattern)
    assert parse_pattern(pattern) is pattern


def test_block_spelling_without_sparsity_is_half() -> None:
    assert parse_pattern("bsr16x8") == BlockSparse((16, 8), 0.5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("2;4", "expected a Pattern or a spelling such as '2:4'"),
        ("2:4v", "spelling"),
        ("", "spelling"),
        (4, "got 4"),
        ("4:4", "n must be between 1 and m-1=3"),
        ("0:4", "n must be"),
        ("2:5", r"m must be one of \(2, 4, 8, 16\), got 5"),
        ("2:4v3", r"vector must be one of \(1, 4, 8, 16\), got 3"),
        ("bsr0x4", "block_shape must be two numbers from 1 to 128"),
        ("bsr4x129@0.5", "block_shape"),
        ("bsr4x4@1.5", "sparsity must be from 0 to 1, got 1.5"),
        ("bsr4x4@1.5.2", "'1.5.2' is no number"),
    ],
)
def test_wrong_patterns_are_refused(wrong: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_pattern(wrong)


def test_sparsity_and_tiles() -> None:
    assert (NM(1, 4).sparsity, NM(2, 4, 4).row_tile, NM(2, 4, 4).k_tile) == (0.75, 4, 4)
    block = BlockSparse((8, 32), 0.9)
    assert (block.sparsity, block.row_tile, block.k_tile) == (0.9, 8, 32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if ":" in s])
def test_nm_mask_is_the_best_of_each_group(spelling: str, shape: tuple[int, int]) -> None:
    pattern = parse_pattern(spelling)
    assert isinstance(pattern, NM)
    # Whole numbers: sums are exact and ties are frequent.
    score = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0)).float()
    mask = pattern.mask(score)
    assert torch.equal(mask, best_by_hand(score, pattern))
    assert pattern.fits(mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if "bsr" in s])
def test_block_mask_keeps_the_best_blocks(spelling: str, shape: tuple[int, int]) -> None:
    pattern = parse_pattern(spelling)
    assert isinstance(pattern, BlockSparse)
    height, width = pattern.block_shape
    score = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)).float()
    mask = pattern.mask(score)
    sums = {}
    for row, column in itertools.product(range(0, shape[0], height), range(0, shape[1], width)):
        block = mask[row : row + height, column : column + width]
        assert block.all() or not block.any()
        total = score[row : row + height, column : column + width].sum().item()
        sums[row, column] = (-total, row, column, bool(block.all()))
    kept = [entry[3] for entry in sorted(sums.values())]
    assert kept == sorted(kept, reverse=True)
    expected = max(1, round((1 - pattern.sparsity) * len(kept)))
    assert sum(kept) == expected == pattern.blocks_kept(*shape)
    assert pattern.fits(mask)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(spelling: str, dtype: torch.dtype) -> None:
    score = torch.arange(40 * 48).view(40, 48).remainder(7).to(dtype)
    pattern = parse_pattern(spelling)
    assert torch.equal(pattern.mask(score), pattern.mask(score.float()))


@pytest.mark.parametrize("spelling", ["2:4v4", "4:8v16", "bsr16x16@0.75"])
def test_large_scores_are_done_in_slabs_without_a_seam(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = torch.rand(133, 100, generator=torch.Generator().manual_seed(0))
    whole = parse_pattern(spelling).mask(score)
    monkeypatch.setattr("sparsekit.patterns._SLAB", 1000)
    assert torch.equal(parse_pattern(spelling).mask(score), whole)


def test_infinite_scores_are_kept_or_dropped() -> None:
    score = torch.tensor([[-torch.inf, 1.0, torch.inf, 2.0, -torch.inf, -torch.inf]])
    assert NM(2, 4).mask(score).tolist() == [[False, False, True, True, True, True]]


@pytest.mark.parametrize("pattern", [NM(2, 4), BlockSparse((2, 2))])
def test_wrong_scores_and_masks_are_refused(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match=r"expected a score of shape \[n, k\], got \[4\]"):
        pattern.mask(torch.zeros(4))
    with pytest.raises(ValueError, match=r"expected a floating-point score, got torch\.int64"):
        pattern.mask(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="the score holds NaN"):
        pattern.mask(torch.full((4, 4), torch.nan))
    with pytest.raises(ValueError, match="expected a bool tensor"):
        pattern.first_violation(torch.ones(4, 4))


def test_first_violation_says_where() -> None:
    mask = torch.zeros(8, 14, dtype=torch.bool)
    mask[5, 8:11] = True
    mask[7, 0:4] = True
    assert (
        NM(2, 4).first_violation(mask) == "row 5, columns 8-11 keep 3 of 4, at most 2 are allowed"
    )
    assert (
        NM(2, 4, vector=4).first_violation(mask)
        == "rows 4-7, columns 0-3 together keep 4 of 4, at most 2 are allowed"
    )
    assert NM(3, 4, vector=1).first_violation(mask) == (
        "row 7, columns 0-3 keep 4 of 4, at most 3 are allowed"
    )
    edge = torch.zeros(1, 6, dtype=torch.bool)
    edge[0, 4:] = True
    assert NM(1, 4).first_violation(edge) == "row 0, columns 4-5 keep 2 of 2, at most 1 are allowed"


def test_first_violation_of_blocks_counts_them() -> None:
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[0, 0] = mask[1, 5] = mask[4, 4] = True
    assert BlockSparse((2, 2), sparsity=2 / 3).first_violation(mask) is None
    assert BlockSparse((2, 2), sparsity=0.8).first_violation(mask) == (
        "3 of 9 blocks of 2x2 are kept, at most 2 are allowed; the first one too many is at "
        "row 4, columns 4-5"
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_cover_is_whole_vectors_and_blocks(spelling: str) -> None:
    pattern = parse_pattern(spelling)
    mask = torch.zeros(37, 101, dtype=torch.bool)
    mask[5, 7] = mask[36, 100] = True
    cover = pattern.cover(mask)
    height, width = pattern.row_tile, 1 if isinstance(pattern, NM) else pattern.k_tile
    expected = torch.zeros_like(mask)
    for row, column in ((5, 7), (36, 100)):
        top, left = row // height * height, column // width * width
        expected[top : top + height, left : left + width] = True
    assert torch.equal(cover, expected)
    assert torch.equal(pattern.cover(cover), cover)


@settings(max_examples=60, deadline=None)
@given(
    spelling=st.sampled_from(SPELLINGS),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_a_mask_fits_its_pattern_and_one_more_does_not(
    spelling: str, n: int, k: int, seed: int
) -> None:
    pattern = parse_pattern(spelling)
    score = torch.rand(n, k, generator=torch.Generator().manual_seed(seed))
    mask = pattern.mask(score)
    assert pattern.fits(mask)
    assert mask.shape == (n, k)
    if isinstance(pattern, NM):
        full = min(k, pattern.m)
        assert int(mask[0, :full].sum()) == min(pattern.n, full)
        if full > pattern.n:
            mask[0, :full] = True
            assert not pattern.fits(mask)
    elif not mask.all():
        row, column = mask.logical_not().nonzero()[0].tolist()
        mask[row, column] = True
        assert not pattern.fits(mask)


# --- choosing modules -------------------------------------------------------------------------


def test_match() -> None:
    assert match("encoder.0.dense", "encoder.*.dense")
    assert not match("encoder.0.dense2", "encoder.*.dense")
    assert match("encoder.0.attn.q", r"re:.*attn.*")
    assert not match("encoder.10", r"re:encoder\.1")
    assert not match("Fc", "fc")
    with pytest.raises(ValueError, match=r"'re:\(' is no regular expression"):
        match("fc", "re:(")


def test_resolve_pattern_takes_the_first_match() -> None:
    mapping = {"*.fc1": "2:4", "head": None, "re:.*fc.": BlockSparse((16, 16), 0.75)}
    assert resolve_pattern("a.fc1", mapping) == NM(2, 4)
    assert resolve_pattern("a.fc2", mapping) == BlockSparse((16, 16), 0.75)
    assert resolve_pattern("head", mapping) is None
    assert resolve_pattern("other", mapping) is None
    assert resolve_pattern("anything", "1:4") == NM(1, 4)


def model() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    return nn.ModuleDict({"body": block, "again": block[0], "head": nn.Linear(4, 2)})


def test_select_modules() -> None:
    def names(targets: str | list[str] | None, ignore: str | list[str] | None) -> list[str]:
        return [name for name, _ in select_modules(model(), targets, ignore, (nn.Linear,))]

    assert names(None, None) == ["body.0", "body.2", "head"]
    assert names("body.*", None) == ["body.0", "body.2"]
    assert names(["body.*", "head"], ["re:.*2", "nothing.*"]) == ["body.0", "head"]
    with pytest.raises(ValueError, match=r"targets: 'boddy\.\*' matches no layer; the layers are"):
        names("boddy.*", None)


def test_require_match_lists_some_names() -> None:
    with pytest.raises(ValueError, match="the layers are 'l0', 'l1', 'l2', 'l3', 'l4' and 3 more"):
        require_match(["x"], [f"l{i}" for i in range(8)], "targets")
    with pytest.raises(ValueError, match="the layers are none"):
        require_match(["x"], [], "targets")


# --- recognising ------------------------------------------------------------------------------

DETECTED = [
    "2:8",
    "5:16",
    "3:16v4",
    "1:8v16",
    "1:4",
    "2:4",
    "4:8",
    "2:4v4",
    "1:4v8",
    "2:4v16",
    "4:8v4",
    "bsr64x64@0.75",
    "bsr32x8@0.75",
    "bsr16x16@0.75",
    "bsr16x1@0.5",
    "bsr4x1@0.75",
    "bsr1x4@0.5",
]


def pruned(spelling: str, n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    return weight * parse_pattern(spelling).mask(torch.rand(n, k, generator=generator))


@pytest.mark.parametrize("shape", [(256, 512), (301, 517)])
@pytest.mark.parametrize("spelling", DETECTED)
def test_detect_finds_the_pattern(spelling: str, shape: tuple[int, int]) -> None:
    weight = pruned(spelling, *shape)
    asked, found = parse_pattern(spelling), detect_pattern(weight)
    if isinstance(asked, NM):
        assert found == asked
    else:
        assert isinstance(found, BlockSparse)
        assert isinstance(asked, BlockSparse)
        assert found.block_shape == asked.block_shape
        assert found.blocks_kept(*shape) == asked.blocks_kept(*shape)
        # What is found packs the weight without pruning it further.
        assert found.fits(weight != 0)


def test_detect_ignores_zeros_by_chance_inside_blocks() -> None:
    weight = pruned("bsr16x16@0.75", 256, 512)
    weight[weight.nonzero()[::500].unbind(1)] = 0
    assert detect_pattern(weight) == BlockSparse((16, 16), 0.75)


def test_detect_counts_negative_zero_as_zero() -> None:
    weight = pruned("2:4", 64, 64)
    assert detect_pattern(torch.where(weight == 0, -0.0, weight)) == NM(2, 4)


def test_detect_finds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(128, 128, generator=generator)
    assert detect_pattern(dense) is None
    assert detect_pattern(torch.zeros(0, 4)) is None
    few_rows = dense.clone()
    few_rows[:40] = 0
    assert detect_pattern(few_rows) is None
    unstructured = dense * (torch.rand(128, 128, generator=generator) > 0.5)
    assert detect_pattern(unstructured) is None
    with pytest.raises(ValueError, match=r"expected a weight of shape \[n, k\], got \[2, 2, 2\]"):
        detect_pattern(torch.zeros(2, 2, 2))


def test_detect_takes_the_usual_spelling_of_equal_patterns() -> None:
    assert detect_pattern(pruned("1:2", 64, 64)) == NM(2, 4)
    assert detect_pattern(pruned("8:16", 256, 64)) == NM(8, 16)


def test_detect_accepts_a_usual_pattern_with_zeros_to_spare() -> None:
    weight = pruned("2:4", 64, 64)
    weight *= torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) > 0.3
    assert detect_pattern(weight) == NM(2, 4)


def test_detect_of_all_zeros_is_a_block_pattern() -> None:
    found = detect_pattern(torch.zeros(64, 64))
    assert found is not None
    assert math.isclose(found.sparsity, 1.0)
    assert found.fits(torch.zeros(64, 64, dtype=torch.bool))


@pytest.mark.parametrize(
    ("spelling", "density", "expected"),
    [
        ("2:4", 0.25, "1:4"),
        ("2:4", 0.0, "1:4"),
        ("2:4v4", 0.625, "3:4v4"),
        ("4:8", 0.99, None),
        ("2:4", 1.0, None),
        ("bsr4x4@0.5", 0.3, "bsr4x4@0.7"),
        ("bsr4x4@0.5", 1.0, None),
    ],
)
def test_a_pattern_at_another_density(spelling, density, expected):
    found = at_density(parse_pattern(spelling), density)
    assert (None if found is None else str(found)) == expected


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_a_density_outside_0_to_1_is_refused(density):
    with pytest.raises(ValueError, match="density must be from 0 to 1"):
        at_density(NM(2, 4), density)
