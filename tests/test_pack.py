"""PackedWeight: packing without loss, masks, copies, and every refusal."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import sparsekit as sk
from sparsekit import _native
from sparsekit.testing import make_problem

PATTERNS = ["1:4", "2:4", "4:8", "2:4v4", "4:8v16", "bsr1x4@0.5", "bsr16x16@0.75", "bsr64x64@0.5"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("target", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pruned_weight_packs_without_change(
    pattern: str, dtype: torch.dtype, target: str
) -> None:
    for n, k in ((1, 1), (33, 70), (128, 96)):
        weight = make_problem(1, n, k, pattern, dtype).weight
        packed = sk.pack(weight, pattern, target=target)
        assert torch.equal(packed.to_dense(), weight)
        assert packed.shape == (n, k)
        assert packed.dtype == dtype
        assert packed.pattern == sk.parse_pattern(pattern)
        assert packed.nbytes == packed.data.numel()
        assert packed.data.dtype == torch.uint8
        assert packed.data.untyped_storage().nbytes() == packed.nbytes


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_dense_weight_keeps_its_largest_magnitudes(pattern: str) -> None:
    weight = torch.randn(40, 72, generator=torch.Generator().manual_seed(0))
    packed = sk.pack(weight, pattern)
    expected = torch.where(sk.mask(weight, pattern), weight, torch.zeros_like(weight))
    assert torch.equal(packed.to_dense(), expected)


def test_a_mask_overrides_the_magnitudes() -> None:
    weight = torch.arange(1.0, 9.0).view(1, 8)
    mask = torch.tensor([[True, True, False, False, True, False, False, False]])
    packed = sk.pack(weight, "2:4", mask)
    assert packed.to_dense().tolist() == [[1, 2, 0, 0, 5, 0, 0, 0]]


def test_a_weight_with_fewer_values_than_allowed_is_unchanged() -> None:
    weight = torch.zeros(8, 64)
    weight[3, 5] = 2.0
    for pattern in PATTERNS:
        assert torch.equal(sk.pack(weight, pattern).to_dense(), weight)
        assert torch.equal(sk.pack(torch.zeros(8, 64), pattern).to_dense(), torch.zeros(8, 64))


def test_negative_zero_counts_as_zero() -> None:
    weight = torch.tensor([[-0.0, 1.0, 2.0, -0.0]])
    dense = sk.pack(weight, "2:4").to_dense()
    assert torch.equal(dense, torch.tensor([[0.0, 1.0, 2.0, 0.0]]))


def test_rows_that_share_a_vector_keep_their_own_zeros() -> None:
    weight = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [3, 4, 0, 0]])
    assert torch.equal(sk.pack(weight, "2:4v4").to_dense(), weight)


def test_dtype_converts_after_choosing() -> None:
    weight = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    packed = sk.pack(weight, "2:4", dtype=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    expected = torch.where(sk.mask(weight, "2:4"), weight, torch.zeros_like(weight))
    assert torch.equal(packed.to_dense(), expected.bfloat16())


def test_weights_may_have_any_strides_and_require_grad() -> None:
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    packed = sk.pack(weight.t(), "2:4")
    assert torch.equal(packed.to_dense(), sk.pack(weight.t().contiguous(), "2:4").to_dense())
    assert not packed.to_dense().requires_grad


def test_to_converts_values() -> None:
    packed = sk.pack(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), "2:4v4")
    half = packed.to(torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half.to_dense(), packed.to_dense().half())
    assert packed.to(torch.float32) is packed
    assert packed.to("cpu") is packed
    assert packed.to("meta").device.type == "meta"
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        packed.to(torch.float64)
    with pytest.raises(ValueError, match=r"a value overflows in torch\.float16.*is 1e\+06"):
        sk.pack(torch.full((1, 4), 1e6), "2:4").to(torch.float16)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_copies_and_pickles_hold_the_canonical_form(pattern: str) -> None:
    weight = make_problem(1, 33, 70, pattern).weight
    packed = sk.pack(weight, pattern)
    for other in (copy.deepcopy(packed), copy.copy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other.to_dense(), weight)
        assert other.meta == packed.meta
        assert other.data.data_ptr() != packed.data.data_ptr()
    dumped = pickle.dumps(packed)
    assert packed.data.numpy().tobytes() not in dumped
    assert packed.canonical().values.numpy().tobytes() in dumped


def test_a_pickle_is_packed_for_the_machine_that_loads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make_problem(1, 33, 70, "2:4").weight
    dumped = pickle.dumps(sk.pack(weight, "2:4"))
    monkeypatch.setattr(_native, "default_format", lambda *_: "nm")
    loaded = pickle.loads(dumped)
    assert loaded.format == "nm"
    assert torch.equal(loaded.to_dense(), weight)


def test_torch_save_works() -> None:
    packed = sk.pack(torch.eye(8), "2:4")
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded.to_dense(), torch.eye(8))


def test_repr() -> None:
    text = repr(sk.pack(torch.eye(8), "2:4", target="reference"))
    assert text.startswith("PackedWeight([8, 8], pattern=2:4, dtype=torch.float32, format='nm', ")


@pytest.mark.parametrize("function", [sk.pack, sk.detect, lambda weight: sk.mask(weight, "2:4")])
def test_wrong_weights_are_refused(function: object) -> None:
    assert callable(function)
    cases = [
        (torch.zeros(4), r"shape \[n, k\] or \[Cout, .*, got \[4\]"),
        (torch.zeros(2, 2, 2, 2, 2), r"height, width\], got \[2, 2, 2, 2, 2\]"),
        (torch.zeros(0, 4), r"the weight is empty, its shape is \[0, 4\]"),
        (torch.zeros(4, 0), r"the weight is empty"),
        (torch.zeros(4, 4, dtype=torch.int64), r"floating-point weight, got torch\.int64"),
        ([[1.0]], r"expected a dense tensor as the weight, got list"),
        (torch.eye(4).to_sparse(), r"expected a dense tensor as the weight, got torch\.sparse_coo"),
    ]
    for weight, says in cases:
        with pytest.raises(ValueError, match=says):
            function(weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_named(bad: float, dtype: torch.dtype) -> None:
    weight = torch.ones(6, 9, dtype=dtype)
    weight[4, 7] = weight[5, 0] = bad
    with pytest.raises(ValueError, match=rf"is {bad} at row 4, column 7 \(2 such values\)"):
        sk.pack(weight)


def test_a_sum_that_overflows_is_no_fault() -> None:
    weight = torch.full((4, 4), 3e38)
    assert torch.equal(sk.pack(weight, "2:4").to_dense().count_nonzero(), torch.tensor(8))


def test_a_value_that_overflows_in_the_packed_dtype_is_refused() -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = 1e6
    with pytest.raises(ValueError, match=r"to torch\.float16: the weight is inf at row 1"):
        sk.pack(weight, "2:4", dtype=torch.float16)


def test_wrong_dtypes_and_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        sk.pack(torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="target must be one of"):
        sk.pack(torch.eye(4), target="gpu")


def test_wrong_masks_are_refused() -> None:
    weight = torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"a bool mask \(True = kept\), got torch\.float32"):
        sk.pack(weight, "2:4", torch.ones(4, 8))
    with pytest.raises(ValueError, match=r"mask has shape \[8, 4\], the weight \[4, 8\]"):
        sk.pack(weight, "2:4", torch.ones(8, 4, dtype=torch.bool))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[2, 4:7] = True
    with pytest.raises(
        ValueError, match=r"does not fit 2:4: row 2, columns 4-7 keep 3 of 4.*sparsekit\.mask"
    ):
        sk.pack(weight, "2:4", mask)
    with pytest.raises(ValueError, match=r"does not fit bsr2x2@1\.0: 2 of 8 blocks"):
        sk.pack(weight, sk.BlockSparse((2, 2), 1.0), mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_detect_recognises_what_was_packed(pattern: str) -> None:
    weight = sk.pack(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), pattern)
    found = sk.detect(weight.to_dense())
    assert found is not None
    assert str(found).partition("@")[0] == pattern.partition("@")[0]
