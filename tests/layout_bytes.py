"""Every byte format packed once more, by slow and obvious code.

It follows ``csrc/layout/README.md`` and nothing else. One thing is the library's choice, which rows
of a 2:4 panel are partners: it is read from the library's bytes, checked, and what follows from it
is built here.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekit import NM, BlockSparse
from sparsekit.patterns import Pattern

HEADER_BYTES = 128
ALIGNMENT = 64
HEADER = struct.Struct("<4s i 6i i i q q q 3q q Q")
FIELDS = (
    *("magic", "format", "family", "kept", "group", "vector", "block_rows", "block_cols"),
    *("dtype", "panel_rows", "n", "k", "nnzb", "order_offset", "indices_offset", "values_offset"),
    *("bytes", "checksum"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def up(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@dataclass
class Arrays:
    """The canonical arrays as lists; a value is the bits of an element."""

    values: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    crow: list[int] = field(default_factory=list)


def element_bits(weight: Tensor) -> list[list[int]]:
    width = {2: (torch.int16, 0xFFFF), 4: (torch.int32, 0xFFFFFFFF)}[weight.element_size()]
    return [[bits & width[1] for bits in row] for row in weight.view(width[0]).tolist()]


def nm_positions(pattern: NM, kept: list[list[bool]], k: int) -> list[list[int]]:
    """Per vector of rows: the position in its group of each slot."""
    positions = []
    for row0 in range(0, len(kept), pattern.vector):
        row: list[int] = []
        for column0 in range(0, k, pattern.m):
            columns = range(column0, min(k, column0 + pattern.m))
            rows = range(row0, min(len(kept), row0 + pattern.vector))
            here = [c - column0 for c in columns if any(kept[r][c] for r in rows)]
            free = [p for p in range(pattern.m) if p not in here]
            row += sorted(here + free[: pattern.n - len(here)])
        positions.append(row)
    return positions


def nm_values(
    pattern: NM, bits: list[list[int]], kept: list[list[bool]], positions: list[list[int]]
) -> list[list[int]]:
    """Per row: the bits of each slot."""
    values = []
    for r, row in enumerate(bits):
        slots = []
        for slot, position in enumerate(positions[r // pattern.vector]):
            column = slot // pattern.n * pattern.m + position
            slots.append(row[column] if column < len(row) and kept[r][column] else 0)
        values.append(slots)
    return values


def bsr_blocks(
    pattern: BlockSparse, bits: list[list[int]], kept: list[list[bool]]
) -> tuple[list[int], list[int], list[list[list[int]]]]:
    """crow, block columns, and each block as rows of bits."""
    rows, cols = pattern.block_shape
    n, k = len(bits), len(bits[0])
    crow, columns, blocks = [0], [], []
    for row0 in range(0, n, rows):
        for column0 in range(0, k, cols):
            block = [
                [
                    bits[r][c] if r < n and c < k and kept[r][c] else 0
                    for c in range(column0, column0 + cols)
                ]
                for r in range(row0, row0 + rows)
            ]
            inside = [
                kept[r][c]
                for r in range(row0, min(n, row0 + rows))
                for c in range(column0, min(k, column0 + cols))
            ]
            if any(inside):
                columns.append(column0 // cols)
                blocks.append(block)
        crow.append(len(blocks))
    return crow, columns, blocks


def words(width: int, numbers: list[int]) -> bytes:
    return b"".join(number.to_bytes(width, "little") for number in numbers)


def index_bytes(positions: list[list[int]], bits: int) -> bytes:
    """Positions of each row, least significant bits first, each row on a byte of its own."""
    out = b""
    for row in positions:
        number = sum(position << bits * slot for slot, position in enumerate(row))
        out += number.to_bytes(up(len(row) * bits, 8), "little")
    return out


@dataclass
class Sections:
    """The sections of a buffer, and what the header says of them."""

    order: bytes
    indices: bytes
    values: bytes
    panel_rows: int = 1
    nnzb: int = 0
    order_last: bool = False
    values_alignment: int = ALIGNMENT


def sections_nm(
    pattern: Pattern, bits: list[list[int]], kept: list[list[bool]], size: int, chosen: bytes
) -> Sections:
    assert isinstance(pattern, NM)
    positions = nm_positions(pattern, kept, len(bits[0]))
    values = nm_values(pattern, bits, kept, positions)
    packed = index_bytes(positions, 2 if pattern.m <= 4 else 4)
    return Sections(b"", packed, b"".join(words(size, row) for row in values))


def order_section(positions: list[list[int]], chosen: bytes) -> bytes:
    """2:4 in f32: per panel and 64 columns, 8 pairs of rows; `chosen` says which."""
    out = b""
    slots = len(positions[0])
    for panel in range(up(len(positions), 16)):
        for slot0 in range(0, slots, 32):
            count = min(32, slots - slot0)
            columns: list[dict[int, int]] = []  # per row: column in the block -> slot in its group
            for r in range(16 * panel, 16 * panel + 16):
                row = positions[r][slot0 : slot0 + count] if r < len(positions) else [0, 1] * count
                columns.append({s // 2 * 4 + row[s]: s % 2 for s in range(count)})
            choice = chosen[len(out) : len(out) + 528]
            common = choice[0]
            block = bytes([common, *[0] * 7])
            rows_seen: list[int] = []
            for pair in range(8):
                rows = choice[8 + 65 * pair]
                a, b = rows % 16, rows // 16
                assert a < b, "the lower row comes first"
                rows_seen += [a, b]
                shared = sorted(columns[a].keys() & columns[b].keys())
                assert len(shared) >= common, "a pair has too few columns in common"
                shared = shared[len(shared) - common :]
                entries = [c << 2 | columns[a][c] << 1 | columns[b][c] for c in shared]
                left = [[c for c in sorted(columns[r]) if c not in shared] for r in (a, b)]
                for in_a, in_b in zip(*left, strict=True):
                    entries += [
                        in_a << 2 | columns[a][in_a] << 1,
                        in_b << 2 | columns[b][in_b] << 1,
                    ]
                block += bytes([rows, *entries]).ljust(65, b"\0")
            assert sorted(rows_seen) == list(range(16)), "each row has one partner"
            assert rows_seen[::2] == sorted(rows_seen[::2]), "pairs are in the order of their rows"
            out += block
    return out


def interleaved(
    pattern: NM,
    positions: list[list[int]],
    bits: list[list[int]],
    kept: list[list[bool]],
    size: int,
) -> tuple[bytes, bytes]:
    """Indices and values of nm_rows16."""
    rows = nm_values(pattern, bits, kept, positions)
    pairs = up(len(rows[0]), 2)
    index_words, values = [], []
    for panel in range(up(len(rows), 16)):

        def position(row: int, slot: int, panel: int = panel) -> int:
            row += 16 * panel
            inside = row < len(rows) and slot < len(rows[0])
            return positions[row // pattern.vector][slot] if inside else 0

        def value(row: int, slot: int, panel: int = panel) -> int:
            row += 16 * panel
            return rows[row][slot] if row < len(rows) and slot < len(rows[0]) else 0

        for pair in range(pairs):
            even, odd = 2 * pair, 2 * pair + 1
            if pattern.m <= 4:
                nibbles = [[position(r, even) | position(r, odd) << 2 for r in range(16)]]
            else:
                nibbles = [[position(r, slot) for r in range(16)] for slot in (even, odd)]
            for each in nibbles:
                index_words.append(sum(each[r] << (4 * (r // 2) + 32 * (r % 2)) for r in range(16)))
            if size == 4:
                values += [value(r, slot) for slot in (even, odd) for r in range(16)]
            else:
                values += [value(r, slot) for r in range(16) for slot in (even, odd)]
    return words(8, index_words), words(size, values)


def sections_nm_rows16(
    pattern: Pattern, bits: list[list[int]], kept: list[list[bool]], size: int, chosen: bytes
) -> Sections:
    assert isinstance(pattern, NM)
    positions = nm_positions(pattern, kept, len(bits[0]))
    order = b""
    if (pattern.n, pattern.m, pattern.vector, size) == (2, 4, 1, 4):
        order = order_section(positions, chosen)
    return Sections(
        order, *interleaved(pattern, positions, bits, kept, size), panel_rows=16, order_last=True
    )


# Which rows of a quad a step is for, as bits: the order of the steps in a list.
THREES, TWOS, ONES = (7, 11, 13, 14), (3, 12, 5, 10, 9, 6), (1, 2, 4, 8)


def check_quads(positions: list[list[int]], order: bytes) -> bytes:
    """The order section of nm_quads: any lists that multiply each kept column of each row once."""
    slots, at = len(positions[0]), 0
    for panel in range(up(len(positions), 16)):
        for slot0 in range(0, slots, 32):
            count = min(32, slots - slot0)
            rows_seen: list[int] = []
            lengths = set()
            for _ in range(4):
                rows_word, *steps = struct.unpack_from("<HBBBB2x", order, at)
                rows = [rows_word >> 4 * i & 15 for i in range(4)]
                rows_seen += rows
                lengths.add(tuple(steps))
                alls, threes, twos, ones = steps
                kinds = [15] * alls + [*THREES] * threes + [*TWOS] * twos + [*ONES] * ones
                place, covered = at + 8, set()
                for kind in kinds:
                    width, slot_bits = (2, 4) if kind.bit_count() > 2 else (1, 2)
                    entry = int.from_bytes(order[place : place + width], "little")
                    place += width
                    column, taking = entry >> slot_bits, [i for i in range(4) if kind >> i & 1]
                    for bit, i in enumerate(taking):
                        row = 16 * panel + rows[i]
                        slot = column // 4 * 2 + (entry >> bit & 1)
                        real = positions[row][slot0 + slot] if row < len(positions) else slot % 2
                        assert column % 4 == real, "the slot holds another column"
                        assert (i, column) not in covered, "a column comes twice"
                        covered.add((i, column))
                    assert entry >> len(taking) & (1 << slot_bits) - 1 >> len(taking) == 0
                assert len(covered) == 4 * count, "a kept column is missing"
                assert not any(order[place : at + 136]), "what is unused is zero"
                at += 136
            assert sorted(rows_seen) == list(range(16)), "each row is in one quad"
            assert len(lengths) == 1, "a block's lists have the same lengths"
    assert len(order) == up(at, 64) * 64
    return order[:at]


def sections_nm_quads(
    pattern: Pattern, bits: list[list[int]], kept: list[list[bool]], size: int, chosen: bytes
) -> Sections:
    assert isinstance(pattern, NM)
    positions = nm_positions(pattern, kept, len(bits[0]))
    return Sections(
        check_quads(positions, chosen),
        *interleaved(pattern, positions, bits, kept, size),
        panel_rows=16,
        order_last=True,
    )


def sections_bsr(
    pattern: Pattern, bits: list[list[int]], kept: list[list[bool]], size: int, chosen: bytes
) -> Sections:
    assert isinstance(pattern, BlockSparse)
    crow, columns, blocks = bsr_blocks(pattern, bits, kept)
    values = [element for block in blocks for row in block for element in row]
    return Sections(words(4, crow), words(4, columns), words(size, values), nnzb=len(blocks))


def sections_bsr_rows(
    pattern: Pattern, bits: list[list[int]], kept: list[list[bool]], size: int, chosen: bytes
) -> Sections:
    assert isinstance(pattern, BlockSparse)
    rows, cols = pattern.block_shape
    n, k = len(bits), len(bits[0])
    crow, columns, blocks = bsr_blocks(pattern, bits, kept)
    panel_rows = max(p for p in (16, 8, 4, 2, 1) if rows % p == 0)
    segment = up(k, cols)
    if panel_rows < 4:
        wish = 24 * n * k // max(1, len(blocks) * rows * cols)
        segment = 2 * up(min(max(wish, 64), 256), 2 * cols)
    order, indices, values = [0], [], []
    for segment0 in range(0, up(k, cols), segment):
        for first, end in itertools.pairwise(crow):
            here = [b for b in range(first, end) if 0 <= columns[b] - segment0 < segment]
            order.append(order[-1] + len(here))
            for b in here:
                indices.append(columns[b] - segment0 if panel_rows < 4 else columns[b] * cols)
            for row0 in range(0, rows, panel_rows):
                for block in (blocks[b] for b in here):
                    panel = block[row0 : row0 + panel_rows]
                    if size == 2 and cols % 2 == 0:
                        values += [
                            row[c + i] for c in range(0, cols, 2) for row in panel for i in (0, 1)
                        ]
                    else:
                        values += [row[c] for c in range(cols) for row in panel]
    index_bytes = words(1 if panel_rows < 4 else 4, indices)
    return Sections(words(4, order), index_bytes, words(size, values), panel_rows, len(blocks))


def mma_tile(element: Callable[[int, int], int]) -> list[int]:
    """Operand a of mma.m16n8k16, lane by lane; `element` gives the bits at a row and column."""
    return [
        element(lane // 4 + 8 * (e // 2 % 2), 2 * (lane % 4) + e % 2 + 8 * (e // 4))
        for lane in range(32)
        for e in range(8)
    ]


def sections_nm_mma_sp(
    pattern: Pattern, bits: list[list[int]], kept: list[list[bool]], size: int, chosen: bytes
) -> Sections:
    assert isinstance(pattern, NM)
    positions = nm_positions(pattern, kept, len(bits[0]))
    rows = nm_values(pattern, bits, kept, positions)

    def value(row: int, slot: int) -> int:
        return rows[row][slot] if row < len(rows) and slot < len(rows[0]) else 0

    def nibble(row: int, group: int) -> int:
        if row >= len(rows) or 2 * group >= len(rows[0]):
            return 0 | 1 << 2
        first, second = positions[row // pattern.vector][2 * group : 2 * group + 2]
        return first | second << 2

    units = b""
    for row0 in range(0, len(rows), 16):
        for column0 in range(0, len(bits[0]), 64):
            for step in (0, 1):
                slot0 = (column0 + 32 * step) // 2
                tile = mma_tile(lambda r, c, at=(row0, slot0): value(at[0] + r, at[1] + c))
                units += words(2, tile)
            for lane in range(32):
                group0 = (column0 + 16 * (lane % 4)) // 4
                halves = (row0 + lane // 4, 0), (row0 + lane // 4 + 8, 16)
                word = sum(
                    nibble(row, group0 + i) << shift + 4 * i
                    for row, shift in halves
                    for i in range(4)
                )
                units += words(4, [word])
    return Sections(b"", b"", units, panel_rows=16, values_alignment=128)


def sections_bsr_mma(
    pattern: Pattern, bits: list[list[int]], kept: list[list[bool]], size: int, chosen: bytes
) -> Sections:
    assert isinstance(pattern, BlockSparse)
    rows, cols = pattern.block_shape
    crow, block_columns, blocks = bsr_blocks(pattern, bits, kept)
    columns, values = [], b""
    for block_column, block in zip(block_columns, blocks, strict=True):
        for column0 in range(0, cols, 16):
            columns.append(block_column * cols + column0)
            for row0 in range(0, rows, 16):
                part = [row[column0 : column0 + 16] for row in block[row0 : row0 + 16]]
                values += words(2, mma_tile(lambda r, c, part=part: part[r][c]))
    first_slice = [blocks_before * cols // 16 for blocks_before in crow]
    first_stage = [0]
    for first, end in itertools.pairwise(first_slice):
        first_stage.append(first_stage[-1] + max(1, up(end - first, 4)))
    order = words(4, first_slice)
    order += bytes(-len(order) % ALIGNMENT) + words(4, first_stage)
    return Sections(
        *(order, words(4, columns), values),
        panel_rows=16,
        nnzb=len(blocks),
        values_alignment=128,
    )


Packer = Callable[[Pattern, list[list[int]], list[list[bool]], int, bytes], Sections]
FORMATS: dict[str, tuple[int, str, Packer]] = {
    "nm": (0, "nm", sections_nm),
    "bsr": (1, "bsr", sections_bsr),
    "nm_rows16": (2, "nm", sections_nm_rows16),
    "bsr_rows": (3, "bsr", sections_bsr_rows),
    "nm_quads": (4, "nm", sections_nm_quads),
    "nm_mma_sp": (5, "nm", sections_nm_mma_sp),
    "bsr_mma": (6, "bsr", sections_bsr_mma),
}


def checksum(fields: bytes) -> int:
    total = 0xCBF29CE484222325
    for (word,) in struct.iter_unpack("<Q", fields):
        total = (total ^ word) * 0x100000001B3 % 2**64
    return total


def pack(weight: Tensor, mask: Tensor, pattern: Pattern, format: str, chosen: bytes = b"") -> bytes:
    """The bytes of a format. `chosen`: an order section to take the partners from."""
    number, family, packer = FORMATS[format]
    assert pattern.family == family
    bits = element_bits(weight)
    parts = packer(pattern, bits, mask.tolist(), weight.element_size(), chosen)
    places = ["order", "indices", "values"]
    if parts.order_last:
        places = ["indices", "values", "order"]
    offsets, body = {}, b""
    for place in places:
        section = getattr(parts, place)
        if place == "values":
            body += bytes(-len(body) % parts.values_alignment)
        offsets[place] = HEADER_BYTES + len(body)
        body += section + bytes(-len(section) % ALIGNMENT)
    code = (0, 0, 0, 0, 0, 0)
    if isinstance(pattern, NM):
        code = (0, pattern.n, pattern.m, pattern.vector, 0, 0)
    elif isinstance(pattern, BlockSparse):
        code = (1, 0, 0, 0, *pattern.block_shape)
    fields = HEADER.pack(
        *(b"SKP1", number, *code, DTYPES.index(weight.dtype), parts.panel_rows, *weight.shape),
        *(parts.nnzb, offsets["order"], offsets["indices"], offsets["values"]),
        *(HEADER_BYTES + len(body), 0),
    )
    header = fields[:-8] + words(8, [checksum(fields[:-8])])
    return header + bytes(HEADER_BYTES - len(header)) + body


def fields_of(data: bytes) -> dict[str, int]:
    return dict(zip(FIELDS, HEADER.unpack_from(data), strict=True))
