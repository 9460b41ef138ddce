"""The byte formats: the library's bytes are those of ``layout_bytes.py``, which follows
``csrc/layout/README.md``, and the examples printed there are rendered from the library's bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layout_bytes import DTYPES, FORMATS, HEADER_BYTES, element_bits, fields_of, pack
from torch import Tensor

from sparsekit import NM, BlockSparse, _native, parse_pattern
from sparsekit.patterns import Pattern

README = Path(__file__).parent.parent / "csrc" / "layout" / "README.md"

PATTERNS = (
    *("1:2", "1:4", "2:4", "3:4", "3:8", "4:8", "5:16", "2:4v4", "1:4v8", "4:8v16", "7:16v4"),
    *("bsr1x1@0.5", "bsr1x1@0.9", "bsr1x4@0.5", "bsr1x80@0.5", "bsr2x1@0.8", "bsr6x3@0.5"),
    *("bsr4x1@0.5", "bsr8x8@0.5", "bsr16x1@0.75", "bsr16x16@0.5", "bsr48x2@0.3", "bsr64x64@0.3"),
    *("bsr32x16@0.5", "bsr16x128@0.5"),
)
SHAPES = ((1, 1), (5, 9), (17, 33), (50, 67), (3, 301))


# ---- the bytes are the library's -----------------------------------------------------------------


def dtypes_of(format: str, pattern: Pattern) -> list[torch.dtype]:
    """In which dtypes a format holds a pattern."""
    if format == "nm_quads":
        return [torch.float32] if pattern == parse_pattern("2:4") else []
    halves = [torch.bfloat16, torch.float16]
    if format == "nm_mma_sp":
        return halves if isinstance(pattern, NM) and (pattern.n, pattern.m) == (2, 4) else []
    if format == "bsr_mma":
        sides = (16, 32, 64, 128)
        fits = isinstance(pattern, BlockSparse) and {*pattern.block_shape} <= {*sides}
        return halves if fits else []
    return list(DTYPES) if FORMATS[format][1] == pattern.family else []


CASES = [
    (text, name) for text in PATTERNS for name in FORMATS if dtypes_of(name, parse_pattern(text))
]


def make_weight(
    pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """A weight and a mask that keeps a little less than the pattern allows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mask = pattern.mask(torch.rand(shape, generator=generator))
    return weight, mask & (torch.rand(shape, generator=generator) < 0.9)


def test_every_format_has_a_packer_here() -> None:
    assert {info.format for info in _native.kernels()} <= set(FORMATS)
    weight, mask = make_weight(parse_pattern("2:4"), (4, 4), torch.float32, 0)
    with pytest.raises(ValueError, match=f"expected one of {', '.join(FORMATS)}, got"):
        _native.pack(_native.compress(weight, mask, parse_pattern("2:4")), "unknown")


@pytest.mark.parametrize(("text", "format"), CASES, ids=[f"{t}-{f}" for t, f in CASES])
def test_bytes(text: str, format: str) -> None:
    pattern = parse_pattern(text)
    dtypes = dtypes_of(format, pattern)
    for seed, (dtype, shape) in enumerate((d, s) for d in dtypes for s in SHAPES):
        weight, mask = make_weight(pattern, shape, dtype, seed)
        canonical = _native.compress(weight, mask, pattern)
        packed = bytes(_native.pack(canonical, format).tolist())
        order = packed[fields_of(packed)["order_offset"] :]
        expected = pack(weight, mask, pattern, format, order)
        assert packed[:HEADER_BYTES] == expected[:HEADER_BYTES], (dtype, shape)
        assert packed == expected, (dtype, shape)


@pytest.mark.parametrize("text", PATTERNS)
def test_canonical_arrays_are_the_sections_of_the_canonical_format(text: str) -> None:
    pattern = parse_pattern(text)
    weight, mask = make_weight(pattern, (21, 37), torch.bfloat16, 1)
    canonical = _native.compress(weight, mask, pattern)
    _, _, packer = FORMATS[pattern.family]
    parts = packer(pattern, element_bits(weight), mask.tolist(), 2, b"")

    def raw(tensor: Tensor | None) -> bytes:
        return (
            b""
            if tensor is None
            else bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        )

    assert raw(canonical.values) == parts.values
    assert raw(canonical.indices) == parts.indices
    assert raw(canonical.crow_indices) == parts.order


# ---- the README's examples -----------------------------------------------------------------------

NM_EXAMPLE = ("2:4", [[5, 0, 0, 6, 0, 7, 8, 0], [0, 1, 2, 0, 3, 0, 0, 4]])
BSR_EXAMPLE = (
    "bsr6x2@0.33",
    [[3 * r + 1, 3 * r + 2, 0, 0, 3 * r + 3] for r in range(6)],
)
MMA_ENTRIES = {(0, 0): 1, (0, 1): 2, (8, 0): 3, (0, 8): 4, (9, 27): 5, (1, 34): 6, (40, 39): 7}
MMA_EXAMPLE = (
    "bsr16x32@0.5",
    [[MMA_ENTRIES.get((r, c), 0) for c in range(40)] for r in range(41)],
)


def example(which: tuple[str, list[list[int]]], dtype: torch.dtype, format: str) -> bytes:
    """The library's bytes for a small matrix whose zeros are pruned."""
    weight = torch.tensor(which[1], dtype=dtype)
    canonical = _native.compress(weight, weight != 0, parse_pattern(which[0]))
    return bytes(_native.pack(canonical, format).tolist())


def numbers(data: bytes, offset: int, count: int, dtype: torch.dtype) -> list[int]:
    raw = bytearray(data[offset : offset + count * dtype.itemsize])
    return [int(v) for v in torch.frombuffer(raw, dtype=dtype).tolist()]


def lines_of(values: list[int], width: int, cell: int = 2) -> list[str]:
    rows = [values[at : at + width] for at in range(0, len(values), width)]
    return [" ".join(f"{v or '.':>{cell}}" for v in row) for row in rows]


def render_header() -> list[str]:
    data = example(NM_EXAMPLE, torch.float32, "nm")
    lines = []
    at = 0
    for name, value in fields_of(data).items():
        size = 4 if at < 40 else 8
        if name == "magic":
            shown = "'SKP1'"
        elif name == "checksum":
            shown = f"0x{value:016x}"
        else:
            shown = str(value)
        lines.append(f"{at:3}  {size}  {name:<15} {shown}")
        at += size
    return lines


def render_nm() -> list[str]:
    data = example(NM_EXAMPLE, torch.float32, "nm")
    head = fields_of(data)
    indices = data[head["indices_offset"] :][:2]
    values = lines_of(numbers(data, head["values_offset"], 8, torch.float32), 4)
    return [
        f"byte {head['indices_offset']}  indices  row 0  {indices[:1].hex(' ')}",
        f"                   row 1  {indices[1:].hex(' ')}",
        f"byte {head['values_offset']}  values   row 0  {values[0]}",
        f"                   row 1  {values[1]}",
        f"byte {head['bytes']}  end",
    ]


def render_order() -> list[str]:
    data = example(NM_EXAMPLE, torch.float32, "nm_rows16")
    head = fields_of(data)
    block = data[head["order_offset"] :][:528]
    common = block[0]
    lines = [f"byte {head['order_offset']}  order  S = {common}"]
    for pair in range(3):
        at = 8 + 65 * pair
        rows, entries = block[at], block[at + 1 : at + 1 + 8 - common]
        both, alone = entries[:common].hex(" "), entries[common:].hex(" ")
        pair_of = f"rows {rows % 16:2}, {rows // 16:2}"
        lines.append(f"  + {at:3}  {pair_of}   both  {both}   alone  {alone}".rstrip())
    return [*lines, "  ...", f"byte {head['bytes']}  end"]


def render_quads() -> list[str]:
    data = example(NM_EXAMPLE, torch.float32, "nm_quads")
    head = fields_of(data)
    at = head["order_offset"]
    lines = []
    for quad in range(4):
        rows, alls, threes, twos, ones = struct.unpack_from("<HBBBB", data, at + 136 * quad)
        numbers = " ".join(f"{rows >> 4 * i & 15:2}" for i in range(4))
        place = f"byte {at}  order" if quad == 0 else f"    + {136 * quad:3}      "
        sizes = 2 * alls, 8 * threes, 6 * twos, 4 * ones
        entries, start = [], at + 136 * quad + 8
        for size in sizes:
            entries.append(data[start : start + size].hex(" "))
            start += size
        lines.append(f"{place}  rows {numbers}  times {alls} {threes} {twos} {ones}")
        lines += [
            f"                   {name:<6} {text}"
            for name, text in zip(("all", "threes", "twos", "ones"), entries, strict=True)
            if text and quad == 0
        ]
    return [*lines, f"byte {head['bytes']}  end"]


def render_nm_rows16(dtype: torch.dtype) -> list[str]:
    data = example(NM_EXAMPLE, dtype, "nm_rows16")
    head = fields_of(data)
    lines = []
    for pair, (word,) in enumerate(struct.iter_unpack("<Q", data[head["indices_offset"] :][:16])):
        place = f"byte {head['indices_offset']}  indices" if pair == 0 else " " * 17
        lines.append(f"{place}  pair {pair}  {word:016x}")
    rows = lines_of(
        numbers(data, head["values_offset"], 64, dtype), 16 if dtype.itemsize == 4 else 32
    )
    for at, row in enumerate(rows):
        place = f"byte {head['values_offset']}  values " if at == 0 else " " * 17
        label = f"slot {at}" if dtype.itemsize == 4 else f"pair {at}"
        lines.append(f"{place}  {label}  {row}")
    end = head["order_offset"]  # what follows is render_order's
    return [*lines, f"byte {end}  {'order' if dtype.itemsize == 4 else 'end'}"]


def render_bsr(format: str, dtype: torch.dtype) -> list[str]:
    data = example(BSR_EXAMPLE, dtype, format)
    head = fields_of(data)
    crow = lines_of(numbers(data, head["order_offset"], 2, torch.int32), 2)
    narrow = format == "bsr_rows"
    order = "order" if narrow else "crow "
    index_dtype = torch.uint8 if narrow else torch.int32
    columns = [str(v) for v in numbers(data, head["indices_offset"], 2, index_dtype)]
    values = numbers(data, head["values_offset"], 24, dtype)
    lines = [
        f"byte {head['order_offset']}  {order}    {crow[0].replace('.', '0')}",
        f"byte {head['indices_offset']}  indices  {' '.join(f'{c:>2}' for c in columns)}",
    ]
    panels = head["block_rows"] // head["panel_rows"] if narrow else 1
    width = len(values) // panels // 2
    for at, row in enumerate(lines_of(values, width)):
        place = f"byte {head['values_offset']}  values " if at == 0 else " " * 17
        label = f"panel {at // 2}  block {at % 2}" if narrow else f"block {at}"
        lines.append(f"{place}  {label}  {row}")
    return [*lines, f"byte {head['bytes']}  end"]


def lanes_of(data: bytes, offset: int, dtype: torch.dtype) -> list[str]:
    """The lanes of a tile that hold anything."""
    rows = lines_of(numbers(data, offset, 256, dtype), 8)
    return [f"lane {lane:2}  {row}" for lane, row in enumerate(rows) if set(row) != {" ", "."}]


def render_nm_mma_sp() -> list[str]:
    data = example(NM_EXAMPLE, torch.bfloat16, "nm_mma_sp")
    head = fields_of(data)
    at = head["values_offset"]
    lines = []
    for step in (0, 1):
        place = f"byte {at + 512 * step:<4}  step {step}"
        held = lanes_of(data, at + 512 * step, torch.bfloat16) or ["zeros"]
        lines += [f"{place if i == 0 else ' ' * len(place)}  {row}" for i, row in enumerate(held)]
    metadata = struct.unpack_from("<32I", data, at + 1024)
    place = f"byte {at + 1024:<4}  metadata"
    for lane in range(8):
        lines.append(
            f"{place if lane == 0 else ' ' * len(place)}  lane {lane:2}  {metadata[lane]:08x}"
        )
    assert set(metadata[8:]) == {0x44444444}
    return [*lines, f"{' ' * len(place)}  ...      44444444", f"byte {head['bytes']}  end"]


def render_bsr_mma() -> list[str]:
    data = example(MMA_EXAMPLE, torch.bfloat16, "bsr_mma")
    head = fields_of(data)
    first_slice = struct.unpack_from("<4i", data, head["order_offset"])
    first_stage = struct.unpack_from("<4i", data, head["order_offset"] + 64)
    columns = struct.unpack_from(f"<{first_slice[-1]}i", data, head["indices_offset"])

    def spaced(row: tuple[int, ...]) -> str:
        return " ".join(f"{number:2}" for number in row)

    lines = [
        f"byte {head['order_offset']}  slices   {spaced(first_slice)}",
        f"byte {head['order_offset'] + 64}  stages   {spaced(first_stage)}",
        f"byte {head['indices_offset']}  columns  {spaced(columns)}",
    ]
    for slice in range(first_slice[-1]):
        place = f"byte {head['values_offset']}  values " if slice == 0 else " " * 17
        at = head["values_offset"] + 512 * slice
        held = lanes_of(data, at, torch.bfloat16) or ["zeros"]
        for i, row in enumerate(held):
            label = f"slice {slice}" if i == 0 else " " * 7
            lines.append(f"{place if i == 0 else ' ' * 17}  {label}  {row}")
    return [*lines, f"byte {head['bytes']}  end"]


EXAMPLES: dict[str, Callable[[], list[str]]] = {
    "header": render_header,
    "nm": render_nm,
    "bsr": lambda: render_bsr("bsr", torch.float32),
    "nm_rows16 f32": lambda: render_nm_rows16(torch.float32),
    "nm_rows16 order": render_order,
    "nm_quads order": render_quads,
    "nm_rows16 bf16": lambda: render_nm_rows16(torch.bfloat16),
    "nm_mma_sp": render_nm_mma_sp,
    "bsr_mma": render_bsr_mma,
    "bsr_rows f32": lambda: render_bsr("bsr_rows", torch.float32),
    "bsr_rows bf16": lambda: render_bsr("bsr_rows", torch.bfloat16),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_readme_example(name: str) -> None:
    """What the README prints under the marker is what the library writes."""
    _, _, rest = README.read_text().partition(f"<!-- example: {name} -->\n\n```text\n")
    printed = rest.partition("\n```")[0].split("\n")
    assert printed == [line.rstrip() for line in EXAMPLES[name]()]


def test_readme_has_no_other_examples() -> None:
    text = README.read_text()
    assert text.count("<!-- example: ") == len(EXAMPLES)
    for format, (number, _, _) in FORMATS.items():
        assert f"| {number} | `{format}` |" in text
