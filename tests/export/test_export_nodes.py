"""The nodes' attributes and the bytes of their weights: docs/onnx.md, in both directions."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from export_cases import DTYPES, PATTERNS, packed, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsekit as sk
from sparsekit import _native
from sparsekit.export.nodes import CONV2D, LINEAR, SparseNode, Window
from sparsekit.export.weights import decode, encode


def written(
    pattern: str = "2:4",
    dtype: torch.dtype = torch.float16,
    shape: tuple[int, int] = (48, 36),
    bias: bool = True,
    weights: str = "canonical",
) -> tuple[SparseNode, Tensor]:
    canonical = packed(*shape, pattern, dtype).canonical()
    numbers = randn(shape[0], dtype=dtype, seed=1) if bias else None
    return encode(canonical, numbers, "gelu", False, None, weights)


def written_conv(pattern: str, groups: int = 1, weights: str = "canonical", bias: bool = True):
    weight = sk.pack(randn(64, 24, 3, 3, dtype=torch.float16), pattern, groups=groups)
    window = Window(24, (3, 3), (2, 1), (1, 2), (0, 1, 2, 3), groups)
    numbers = randn(64, dtype=torch.float16, seed=1) if bias else None
    return encode(weight.canonical(), numbers, None, True, window, weights)


def parsed(node: SparseNode, **changes: Any) -> SparseNode:
    attributes = node.attributes() | changes
    for name in [name for name, value in changes.items() if value is ...]:
        del attributes[name]
    return SparseNode.parse(node.op_type, attributes)


def assert_decodes(node: SparseNode, weight: Tensor) -> None:
    assert parsed(node) == node
    canonical, bias = decode(node, weight)
    again, other = encode(
        canonical,
        bias,
        node.activation,
        node.residual_first,
        node.window,
        "canonical" if node.format == "canonical" else "cuda",
    )
    assert again == node
    assert torch.equal(other, weight)


# --- bytes ------------------------------------------------------------------------------------


def test_a_canonical_weight_to_the_byte() -> None:
    # The example of csrc/layout/README.md.
    weight = torch.tensor([[5.0, 0, 0, 6, 0, 7, 8, 0], [0, 1, 2, 0, 3, 0, 0, 4]])
    bias = torch.tensor([1.5, -2.0])
    node, words = encode(sk.pack(weight).canonical(), bias, "silu", True, None)
    assert node.attributes() == {
        "n": 2,
        "k": 8,
        "pattern": (0, 2, 4, 1, 0, 0),
        "nnzb": 0,
        "dtype": 0,
        "format": "canonical",
        "has_bias": 1,
        "activation": 4,
        "residual_first": 1,
        "plugin_version": "1",
        "plugin_namespace": "sparsekit",
    }
    values = struct.pack("<8f", 5, 6, 7, 8, 1, 2, 3, 4)
    indices = bytes([0x9C, 0xC9]) + bytes(14)
    assert words.numpy().tobytes() == values + indices + struct.pack("<2f", 1.5, -2)


def test_blocks_to_the_byte() -> None:
    weight = torch.zeros(4, 6)
    weight[:2, 2:4] = torch.tensor([[1.0, 2], [3, 4]])
    weight[2:, :2] = torch.tensor([[5.0, 6], [7, 8]])
    weight[2:, 4:] = torch.tensor([[9.0, 10], [11, 12]])
    canonical = sk.pack(weight, "bsr2x2@0.5", dtype=torch.float16).canonical()
    node, words = encode(canonical, None, None, False, None)
    assert (node.attributes()["pattern"], node.nnzb) == ((1, 0, 0, 0, 2, 2), 3)
    sections = (
        struct.pack("<12e", *range(1, 13)) + bytes(8),
        struct.pack("<3i", 1, 0, 2) + bytes(4),
        struct.pack("<3i", 0, 1, 3),
    )
    assert words.numpy().tobytes() == b"".join(sections)


def test_the_end_is_rounded_up_to_whole_words() -> None:
    node, words = encode(
        packed(3, 4, dtype=torch.float16).canonical(),
        torch.tensor([1, 2, 3], dtype=torch.float16),
        None,
        False,
        None,
    )
    # Values 12 bytes, at 16 the indices, 3 bytes, at 32 the bias, 6 bytes.
    assert words.numel() == node.weight_size() == 10
    assert words.numpy().tobytes()[32:] == struct.pack("<3e", 1, 2, 3) + bytes(2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_encoded_is_decoded(pattern: str, dtype: torch.dtype, bias: bool) -> None:
    assert_decodes(*written(pattern, dtype, bias=bias))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "bsr16x16@0.5"])
def test_convolutions(pattern: str, groups: int) -> None:
    assert_decodes(*written_conv(pattern, groups))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "bsr16x16@0.5", "bsr16x16@1.0"])
def test_packed_for_gpus(pattern: str, groups: int, bias: bool) -> None:
    node, weight = written_conv(pattern, groups, "cuda", bias)
    assert node.format == ("bsr_mma" if pattern.startswith("bsr") else "nm_mma_sp")
    assert_decodes(node, weight)
    canonical, _ = decode(node, weight)
    ours = sk.PackedWeight.from_canonical(canonical, "cuda", filters=node.filters)
    assert torch.equal(weight.view(torch.uint8)[: ours.nbytes], ours.data)
    assert (node.weight_size() is None) == (groups > 1 and pattern.startswith("bsr"))


def test_a_packed_matrix_ends_with_its_bias() -> None:
    for pattern in ("2:4", "bsr16x16@0.75"):
        assert_decodes(*written(pattern, torch.bfloat16, (35, 50), weights="cuda"))


# --- what is refused --------------------------------------------------------------------------


WRONG_ATTRIBUTES = [
    ({"n": ...}, "has no attribute 'n'"),
    ({"format": ...}, "has no attribute 'format'"),
    ({"transposed": 1}, "has an attribute 'transposed', which version 1 does not know"),
    ({"n": 0}, "has n=0, expected an integer from 1 to 2147483647"),
    ({"k": 2**31}, "has k=2147483648, expected an integer from 1"),
    ({"n": 1.0}, "has n=1.0, expected an integer"),
    ({"n": True}, "has n=True, expected an integer"),
    ({"nnzb": -1}, "has nnzb=-1, expected an integer from 0"),
    ({"nnzb": 1}, "nnzb=1, expected 0 for 2:4"),
    ({"pattern": (0, 2, 4)}, "has pattern=(0, 2, 4), expected 6 integers"),
    ({"pattern": 4}, "has pattern=4, expected 6 integers"),
    ({"pattern": (0, 2, 4, 1, 0, 1)}, "expected (0, N, M, vector, 0, 0) or"),
    ({"pattern": (0, 4, 4, 1, 0, 0)}, "NM: n must be between 1 and m-1=3, got 4"),
    ({"pattern": (1, 0, 0, 0, 0, 16)}, "with sides of 1 to 128"),
    ({"pattern": (1, 0, 0, 0, 129, 16)}, "with sides of 1 to 128"),
    ({"pattern": (2, 0, 0, 0, 16, 16)}, "expected (0, N, M, vector, 0, 0) or"),
    ({"pattern": (1, 0, 0, 0, 16, 16), "nnzb": 10}, "has nnzb=10, the weight has 9 blocks"),
    ({"dtype": 3}, "has dtype=3, expected one of [0, 1, 2]"),
    ({"activation": 6}, "has activation=6, expected one of [0, 1, 2, 3, 4, 5]"),
    ({"has_bias": 2}, "has has_bias=2, expected one of [0, 1]"),
    ({"residual_first": 2}, "has residual_first=2, expected one of [0, 1]"),
    ({"format": "nm_rows16"}, "has format='nm_rows16', expected one of ('canonical', 'nm_mma_sp'"),
    ({"format": 1}, "has format=1, expected one of"),
    ({"plugin_version": "2"}, "has plugin_version='2', expected '1'"),
    ({"plugin_namespace": ""}, "has plugin_namespace='', expected 'sparsekit'"),
    ({"format": "bsr_mma"}, "format bsr_mma does not hold the pattern 2:4 in f16"),
    ({"n": 2**31 - 1, "k": 2**31 - 1}, "expected at most 2^48 elements"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_ATTRIBUTES)
def test_wrong_attributes(changes: dict[str, Any], message: str) -> None:
    node, _ = written()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parsed(node, **changes)
    assert str(caught.value).startswith(LINEAR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": (0, 1)}, "has strides=(0, 1), expected 2 integers from 1"),
        ({"pads": (0, 0, -1, 0)}, "expected 4 integers from 0"),
        ({"dilations": 1}, "has dilations=1, expected 2 integers"),
        ({"group": ...}, "has no attribute 'group'"),
        ({"group": 3}, "64 output channels are no multiple of groups=3"),
        ({"channels": 25}, "the filters make a matrix [64, 288], n and k say [64, 216]"),
        ({"channels": 2**31 - 1, "kernel_shape": (2**31 - 1, 2**31 - 1)}, "the filters make a"),
    ],
)
def test_wrong_attributes_of_a_convolution(changes: dict[str, Any], message: str) -> None:
    node, _ = written_conv("2:4")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parsed(node, **changes)
    assert str(caught.value).startswith(CONV2D)


def test_another_op_type() -> None:
    node, _ = written()
    with pytest.raises(ValueError, match="expected a node SparseLinear or SparseConv2d, got 'Gem"):
        SparseNode.parse("Gemm", node.attributes())


def test_a_number_that_an_int32_cannot_hold() -> None:
    node, _ = written_conv("2:4")
    assert node.window is not None
    wide = replace(node, window=replace(node.window, pads=(0, 0, 2**31, 0)))
    with pytest.raises(ValueError, match=r"SparseConv2d: pads is .*integers below 2\*\*31"):
        wide.attributes()


def test_a_weight_of_another_type_or_length() -> None:
    node, weight = written()
    with pytest.raises(ValueError, match=r"expected weight as int32 \[words\], got uint8 \[\d+\]"):
        decode(node, weight.view(torch.uint8))
    with pytest.raises(ValueError, match=r"expected weight as int32 \[words\], got int32 \[1, "):
        decode(node, weight[None])
    for wrong in (weight[:-1], torch.cat([weight, weight[:1]]), weight[:0]):
        with pytest.raises(
            ValueError, match=rf"takes {len(weight)} int32 numbers, got {len(wrong)}"
        ):
            decode(node, wrong)


def test_a_gigantic_weight_is_refused_before_it_is_made() -> None:
    node, weight = written()
    huge = parsed(node, n=2**24 - 1, k=2**24)
    with pytest.raises(ValueError, match="int32 numbers, got"):
        decode(huge, weight)


def damaged(node: SparseNode, weight: Tensor, byte: int, value: int) -> None:
    changed = weight.clone()
    changed.view(torch.uint8)[byte] = value
    decode(node, changed)


def test_hostile_positions() -> None:
    node, weight = written()
    start = 48 * 18 * 2  # of the indices, behind the values
    with pytest.raises(ValueError, match="SparseLinear: the weight is damaged: indices"):
        damaged(node, weight, start, 0b1111)


def test_hostile_block_columns() -> None:
    node, weight = written("bsr16x16@0.5")
    start = node.nnzb * 512
    with pytest.raises(ValueError, match="the weight is damaged: col_indices: block column 77"):
        damaged(node, weight, start, 77)
    with pytest.raises(ValueError, match="SparseLinear: the weight is damaged: crow_indices"):
        damaged(node, weight, start + -(-node.nnzb * 4 // 16) * 16 + 4, 200)


def test_a_value_that_is_not_finite() -> None:
    node, weight = written()
    with pytest.raises(ValueError, match="the weight is damaged: a value is not finite"):
        damaged(node, weight, 1, 0x7C)


PACKED_DAMAGE = [
    ("2:4", 0, "not a buffer written by sk_pack"),
    ("2:4", 48, "the header is damaged"),
    ("2:4", 128 + 1024, "indices: positions in row 0, group 0"),
    ("2:4", 129, "a value is not finite"),
    ("bsr16x16@0.5", 128, "crow_indices: expected"),
    ("bsr16x16@0.5", 192, "its bytes are not those that packing makes"),
]


@pytest.mark.parametrize(("pattern", "byte", "message"), PACKED_DAMAGE)
def test_hostile_packed_bytes(pattern: str, byte: int, message: str) -> None:
    for node, weight in (
        written(pattern, weights="cuda"),
        written_conv(pattern, 2, "cuda"),
    ):
        old = int(weight.view(torch.uint8)[byte])
        with pytest.raises(ValueError, match="the weight is damaged: .*" + message):
            damaged(node, weight, byte, 0x7F if "finite" in message else old ^ 0xFF)


def test_packed_bytes_of_another_weight() -> None:
    _, other = written("2:4", torch.bfloat16, weights="cuda")
    node, _ = written("2:4", torch.float16, weights="cuda")
    with pytest.raises(ValueError, match=r"it holds \('nm_mma_sp', .*bfloat16.*, the node says .*"):
        decode(node, other)


def test_packed_groups_that_do_not_add_up() -> None:
    node, weight = written_conv("bsr16x16@0.5", 2, "cuda")
    with pytest.raises(ValueError, match=f"it holds {node.nnzb} blocks, the node says 1"):
        decode(replace(node, nnzb=1), weight)
    with pytest.raises(ValueError, match="are no 2 groups of equal length"):
        decode(node, weight[:-1])
    parts = weight[:-32].view(2, -1)
    longer = torch.nn.functional.pad(parts, (0, 32)).flatten()
    with pytest.raises(ValueError, match="its bytes are not those that packing"):
        decode(node, torch.cat([longer, weight[-32:]]))
    with pytest.raises(ValueError, match="are no 2 groups"):
        decode(node, weight[:0])


# --- anything ---------------------------------------------------------------------------------

SMALL = st.integers(-1, 70)
NUMBER = st.one_of(SMALL, st.sampled_from([2**31 - 1, 2**31, 2**62, -(2**62)]))


@st.composite
def any_attributes(draw: Any) -> tuple[str, dict[str, Any]]:
    """A good node with some attributes replaced by anything."""
    groups = draw(st.sampled_from([1, 2]))
    pattern = draw(st.sampled_from(["2:4", "2:4v4", "bsr16x16@0.5", "bsr1x1@0.5"]))
    weights = draw(st.sampled_from(["canonical", "cuda"])) if pattern != "bsr1x1@0.5" else None
    kind = draw(st.booleans())
    weights = weights or "canonical"
    node, _ = written_conv(pattern, groups, weights) if kind else written(pattern, weights=weights)
    attributes = dict(node.attributes())
    for name in draw(st.lists(st.sampled_from(sorted(attributes)), max_size=3)):
        attributes[name] = draw(
            st.one_of(
                NUMBER,
                st.lists(NUMBER, max_size=6),
                st.sampled_from(["canonical", "nm_mma_sp", "bsr_mma", "1", ""]),
                st.none(),
            )
        )
    return node.op_type, attributes


@settings(max_examples=300, deadline=None)
@given(any_attributes(), st.data())
def test_any_attributes_with_any_bytes(node: tuple[str, dict[str, Any]], data: st.DataObject):
    try:
        parsed_node = SparseNode.parse(*node)
        size = parsed_node.weight_size() or 64
        if size < 1 << 16:
            content = data.draw(st.binary(min_size=4, max_size=64))
            words = (content * (size * 4 // len(content) + 1))[: size * 4]
            canonical, _ = decode(
                parsed_node, torch.frombuffer(bytearray(words), dtype=torch.int32)
            )
            _native.validate(canonical)
        assert all(value <= 2**31 - 1 for value in (*parsed_node.shape, parsed_node.nnzb))
    except ValueError:
        pass


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([("2:4", "canonical"), ("bsr16x16@0.5", "canonical"), ("2:4", "cuda")]),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4),
)
def test_a_weight_with_any_bytes_changed(
    case: tuple[str, str], changes: list[tuple[int, int]]
) -> None:
    node, weight = written(case[0], weights=case[1])
    raw = weight.view(torch.uint8)
    for place, value in changes:
        raw[place % len(raw)] = value
    try:
        canonical, _ = decode(node, weight)
    except ValueError:
        return
    _native.validate(canonical)
    sk.PackedWeight.from_canonical(canonical)
