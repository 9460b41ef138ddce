"""Shared values and their codes: near the best there are, exact where they can be, checked."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsekit as sk
from sparsekit import _native, codebook
from sparsekit.codebook import Coding, Compression, Encoded, decode, encode

PATTERNS = ("2:4", "1:4", "2:4v4", "4:8", "8:16", "bsr16x16@0.75", "bsr4x8@0.5", "bsr1x1@0.9")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def canonical(
    pattern: str = "2:4",
    shape: tuple[int, int] = (64, 96),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> _native.Canonical:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return sk.pack(weight, pattern, dtype=dtype).canonical()


def decoded(c: _native.Canonical, e: Encoded) -> _native.Canonical:
    return decode(e, c.pattern, c.shape, c.dtype)


def encoded(c: _native.Canonical, *options: object) -> Encoded:
    out = encode(c, Compression(*options))  # type: ignore[arg-type]
    assert out is not None
    return out


def dense(c: _native.Canonical) -> Tensor:
    return _native.decompress(c)


# --- what sharing does to the values ----------------------------------------------------------


def best_error(values: list[float], clusters: int) -> float:
    """The least squared error of any clustering, by dynamic programming over all intervals."""
    x = torch.tensor(sorted(values), dtype=torch.float64)

    def cost(i: int, j: int) -> float:
        return float(((x[i:j] - x[i:j].mean()) ** 2).sum())

    best = [cost(0, j) if j else 0.0 for j in range(len(x) + 1)]
    for _ in range(clusters - 1):
        best = [
            min((best[i] + cost(i, j) for i in range(j)), default=0.0) for j in range(len(x) + 1)
        ]
    return best[-1]


def shared(values: Tensor, entries: int) -> Tensor:
    books = codebook._codebooks(values[None], entries).sort(1).values
    return books.gather(1, codebook._nearest(values[None], books).long())[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("entries", [4, 8])
def test_sharing_is_near_the_best_clustering(seed: int, entries: int) -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(seed))
    error = float(((shared(values, entries) - values) ** 2).sum())
    best = best_error(values.tolist(), entries)
    assert 0.999 * best <= error <= 1.35 * best


def test_a_few_large_weights_keep_their_size() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 0.01
    values[:3] = torch.tensor([1.0, -0.9, 0.5])
    assert torch.allclose(shared(values, 16)[:3].float(), values[:3], atol=0.06)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("per", codebook.SCOPES)
def test_each_value_becomes_the_nearest_entry_and_zero_stays_zero(pattern: str, per: str) -> None:
    c = canonical(pattern, (61, 203))  # padded rows, columns and groups
    c.values.view(-1)[::7] = 0
    _native.validate(c)
    e = encoded(c, 3, per)
    d = decoded(c, e)
    _native.validate(d)
    assert torch.equal(d.indices, c.indices)
    assert d.crow_indices is None or torch.equal(d.crow_indices, c.crow_indices)
    assert bool((d.values[c.values == 0] == 0).all())
    assert e.codebook.shape[1] <= 8
    books = e.codebook
    if per == "channel":
        books = books[codebook._rows(c.values, c.crow_indices)]
    distance = (books - c.values[..., None]).abs().amin(-1)
    torch.testing.assert_close((d.values - c.values).abs(), distance, atol=1e-6, rtol=0)


def test_a_codebook_for_each_row_is_closer() -> None:
    c = canonical(shape=(32, 512))
    c.values.mul_(torch.logspace(-2, 0, 32)[:, None])
    errors = [
        float((decoded(c, encoded(c, 4, per)).values - c.values).norm()) for per in codebook.SCOPES
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", codebook.SCOPES)
def test_what_was_shared_is_coded_without_loss(pattern: str, dtype: torch.dtype, per: str) -> None:
    c = canonical(pattern, (64, 512), dtype)
    once = decoded(c, encoded(c, 4, per, False))
    assert once.values.dtype == dtype
    for entropy in (True, False):
        assert torch.equal(decoded(once, encoded(once, 4, per, entropy)).values, once.values)


def test_a_channel_with_few_values_keeps_them_beside_one_with_many() -> None:
    c = canonical(shape=(8, 512))
    c.values[3] = torch.tensor([-1.5, 0.1, 0.0, 7.0]).repeat(64)
    d = decoded(c, encoded(c, 3, "channel"))
    assert torch.equal(d.values[3], c.values[3])
    assert not torch.equal(d.values[2], c.values[2])


def test_the_largest_and_the_smallest_numbers() -> None:
    c = canonical(shape=(16, 256))
    c.values[:, ::2] *= 3e38 / c.values.abs().max()
    c.values[:, 1::2] *= 1e-40
    d = decoded(c, encoded(c, 4))
    assert bool(d.values.isfinite().all())
    assert float((d.values.double() - c.values.double()).norm() / c.values.double().norm()) < 0.1
    # Neighbours, whose middle is one of them in float32, keep a code each.
    c.values.copy_(1 + torch.finfo(torch.float32).eps * torch.arange(4).repeat(16, 32))
    assert torch.equal(decoded(c, encoded(c, 2)).values, c.values)


def test_minus_zero_becomes_zero() -> None:
    c = canonical()
    c.values[0, 0] = -0.0
    assert not bool(decoded(c, encoded(c)).values[0, 0].signbit())


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 40),
    st.integers(1, 700),
    st.sampled_from(codebook.SCOPES),
    st.booleans(),
    st.integers(2, 8),
)
def test_positions_survive_any_shape(
    pattern: str, n: int, k: int, per: str, entropy: bool, bits: int
) -> None:
    c = canonical(pattern, (n, k))
    e = encode(c, Compression(bits, per, entropy))
    if e is None:
        return
    d = decoded(c, e)
    _native.validate(d)
    assert torch.equal(d.indices, c.indices)
    assert c.crow_indices is None or torch.equal(d.crow_indices, c.crow_indices)  # type: ignore[arg-type]
    assert bool((dense(d)[dense(c) == 0] == 0).all())
    assert e.nbytes < c.nbytes


def test_blocks_far_apart() -> None:
    weight = torch.zeros(64, 6000)
    weight[:, [0, 254, 255, 256, 510, 511, 4000, 5999]] = torch.randn(64, 8)
    c = sk.pack(weight, "bsr1x1@0.99", mask=weight != 0).canonical()
    d = decoded(c, encoded(c))
    assert torch.equal(d.indices, c.indices)
    assert torch.equal(d.crow_indices, c.crow_indices)  # type: ignore[arg-type]


def test_what_gets_no_smaller_is_left_alone() -> None:
    assert encode(canonical(shape=(2, 8)), Compression()) is None
    empty = sk.pack(torch.zeros(32, 32), "bsr16x16@1.0").canonical()
    assert encode(empty, Compression()) is None


def test_the_same_weight_gives_the_same_bytes() -> None:
    one, two = encoded(canonical()), encoded(canonical())
    assert one.coding == two.coding
    assert all(torch.equal(getattr(one, p), getattr(two, p)) for p in codebook.PARTS)


def test_codes_and_positions_take_hardly_more_than_their_entropy() -> None:
    c = canonical(shape=(512, 1024))
    e = encoded(c)
    assert (e.coding.codes, e.coding.positions) == ("huffman", "huffman")
    counts = codebook._read_codes(e, c.values.numel()).bincount().double()
    share = counts / counts.sum()
    entropy = float(-(share * share.log2()).sum()) * c.values.numel() / 8
    assert entropy < 0.95 * c.values.numel() * 5 / 8
    assert entropy <= len(e.codes) <= 1.02 * entropy
    # Of two groups in a byte there are 6 · 6 choices, of equal chance.
    assert len(e.positions) <= 1.02 * c.indices.numel() * torch.tensor(36.0).log2() / 8


def test_packed_codes_take_their_bits() -> None:
    c = canonical(shape=(64, 512))
    for bits in range(2, 9):
        e = encoded(c, bits, "tensor", False)
        assert len(e.codes) == 64 * 256 * bits // 8
        assert torch.equal(e.positions, c.indices.flatten())


# --- refusing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 8, got 1"),
        ({"bits": 9}, "got 9"),
        ({"bits": 4.0}, r"got 4\.0"),
        ({"bits": True}, "got True"),
        ({"per": "row"}, r"per must be one of \('tensor', 'channel'\), got 'row'"),
    ],
)
def test_compressions_that_are_none(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Compression(**options)  # type: ignore[arg-type]


def test_what_compression_takes() -> None:
    assert Compression.of(4) == Compression(4) == Compression.of(Compression(4))
    for wrong in ("5", 5.0, True):
        with pytest.raises(ValueError, match="expected a Compression, a number of bits or None"):
            Compression.of(wrong)  # type: ignore[arg-type]


def with_coding(e: Encoded, **changes: object) -> Encoded:
    return dataclasses.replace(e, coding=dataclasses.replace(e.coding, **changes))  # type: ignore[arg-type]


def stream(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "bsr4x8@0.5"])
def test_damaged_parts_are_refused(pattern: str, entropy: bool) -> None:
    c = canonical(pattern, (64, 512))
    e = encoded(c, 4, "tensor", entropy)
    book = e.codebook
    nan, short = book.clone(), book[:, :5].contiguous()
    nan[0, 15] = torch.nan
    cases = [
        (dataclasses.replace(e, codebook=nan), "codebook: a value is not finite"),
        (dataclasses.replace(e, codebook=short), r"codes: 1\d is beyond a codebook of 5 entries"),
        (dataclasses.replace(e, codebook=book[:, :0]), "codebook: expected 1 to 16 entries, got 0"),
        (dataclasses.replace(e, codebook=book.repeat(1, 2)), "1 to 16 entries, got 32"),
        (dataclasses.replace(e, codebook=book.half()), "codebook: expected torch.float32"),
        (dataclasses.replace(e, codebook=book.repeat(2, 1)), r"\[1, entries\], got .*\[2, 16\]"),
        (with_coding(e, per="channel"), r"codebook: expected torch.float32 \[64, entries\]"),
        (dataclasses.replace(e, codes=e.codes[:-9]), "codes: "),
        (dataclasses.replace(e, codes=torch.cat([e.codes, e.codes[:9]])), "codes: "),
        (dataclasses.replace(e, codes=e.codes[None]), "codes: expected uint8"),
        (dataclasses.replace(e, codes=e.codes.int()), "codes: expected uint8"),
        (dataclasses.replace(e, positions=e.positions[:-1]), "positions: "),
        (with_coding(e, position_bytes=e.coding.position_bytes + 1), "positions: "),
        (with_coding(e, position_bytes=e.coding.position_bytes - 1), "positions: "),
        (with_coding(e, position_bytes=1 << 40), "positions: "),
    ]
    if pattern != "2:4":
        cases += [
            (with_coding(e, nnzb=e.coding.nnzb - 1), "codes: "),
            (with_coding(e, nnzb=10**9), "blocks"),
        ]
    for bad, says in cases:
        with pytest.raises(ValueError, match=says):
            decoded(c, bad)


def positions_of(data: list[int], c: _native.Canonical) -> Encoded:
    e = encoded(c, 4, "tensor", False)
    e = with_coding(e, position_bytes=len(data))
    return dataclasses.replace(e, positions=stream(bytes(data)))


def test_damaged_block_positions_are_refused() -> None:
    c = canonical("bsr16x16@0.5", (32, 64))  # two block rows of four, four blocks in all
    assert len(c.indices) == 4
    good = positions_of([2, 2, 0, 1, 1, 0], c)
    assert decoded(c, good).indices.tolist() == [0, 2, 1, 2]
    for data, says in (
        ([2, 2, 0, 1, 1], "expected 6 numbers, got 5"),
        ([2, 2, 0, 1, 1, 0, 0], "expected 6 numbers, got 7"),
        ([2, 2, 0, 1, 1, 255], "expected 6 numbers, got 5"),
        ([2, 2, 0, 1, 1, 0, 255], "expected 6 numbers"),
        ([255] * 6, "expected 6 numbers, got 0"),
        ([], "expected 6 numbers, got 0"),
        ([2, 3, 0, 1, 1, 0], "the block rows have 5 blocks, not 4"),
        ([255, 255, 2, 2, 0, 1, 1, 0], "the block rows have 514 blocks, not 4"),
    ):
        with pytest.raises(ValueError, match=says):
            decoded(c, positions_of(data, c))
    # What is in order but out of range is found by the same check as in any file.
    with pytest.raises(ValueError, match="column"):
        _native.validate(decoded(c, positions_of([2, 2, 0, 1, 1, 9], c)))


def test_a_bomb_is_not_expanded() -> None:
    c = canonical(shape=(64, 4096))
    e = encoded(c, 4)
    zeros = zlib.compress(bytes(100_000_000), 9)
    assert 8 * len(zeros) > c.values.numel()  # so its length does not give it away
    with pytest.raises(ValueError, match=r"codes: \d+ bytes cannot hold \d+ codes"):
        decoded(c, dataclasses.replace(e, codes=stream(zeros[:1000])))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="codes: the stream goes on after 131072 bytes"):
            decoded(c, dataclasses.replace(e, codes=stream(zeros)))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_any_damage_of_a_stream_is_refused_or_harmless() -> None:
    c = canonical("bsr4x8@0.5", (32, 64))
    generator = torch.Generator().manual_seed(1)
    refused = 0
    for entropy, part in itertools.product((True, False), ("codes", "positions", "codebook")):
        e = encoded(c, 4, "tensor", entropy)
        for _ in range(60):
            tensor = getattr(e, part).clone()
            raw = tensor.view(torch.uint8).view(-1)
            place = int(torch.randint(len(raw), (1,), generator=generator))
            raw[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            try:
                d = decoded(c, dataclasses.replace(e, **{part: tensor}))
                _native.validate(d)
            except ValueError:
                refused += 1
            else:
                assert d.values.shape == c.values.shape
                assert bool(d.values.isfinite().all())
    assert refused > 100


def test_codings_of_files() -> None:
    coding = Coding(5, "tensor", "huffman", "packed", 3, 7)
    assert Coding.from_json(coding.to_json()) == coding
    assert str(coding) == "5 bits per tensor, huffman/packed"
    for change in (
        {"bits": 1},
        {"bits": "5"},
        {"per": "row"},
        {"codes": "lzma"},
        {"positions": None},
        {"nnzb": -1},
        {"nnzb": 1.5},
        {"nnzb": True},
        {"position_bytes": 1 << 60},
    ):
        with pytest.raises(ValueError, match=r"bits|per|streams|sizes"):
            Coding.from_json({**coding.to_json(), **change})
    with pytest.raises(KeyError):
        Coding.from_json({"bits": 5})
    with pytest.raises(TypeError):
        Coding.from_json(3)
