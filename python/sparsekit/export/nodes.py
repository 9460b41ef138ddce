"""The attributes of the nodes `SparseLinear` and `SparseConv2d`.

This and `sparsekit.export.weights` are all that knows their definition, docs/onnx.md. Nothing in
either needs ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsekit import _native
from sparsekit.filters import FilterShape
from sparsekit.patterns import MAX_BLOCK, NM, BlockSparse, Pattern

DOMAIN = "sparsekit"
VERSION = 1
LINEAR, CONV2D = "SparseLinear", "SparseConv2d"
QUICK = "SparseLinearQuick"  # see quick.py
CANONICAL = "canonical"
FORMATS = (CANONICAL, "nm_mma_sp", "bsr_mma", "nm", "bsr")
MAX_INT = 2**31 - 1

_DTYPES = {code: dtype for dtype, code in _native.DTYPES.items()}
_ACTIVATIONS = {code: name for name, code in _native.ACTIVATIONS.items()}
_STRINGS = {"plugin_version": str(VERSION), "plugin_namespace": DOMAIN}
# Name of each attribute, how many integers it is (0: one that is no list) and the least of them.
_INTS = {
    "n": (0, 1),
    "k": (0, 1),
    "pattern": (6, 0),
    "nnzb": (0, 0),
    "dtype": (0, 0),
    "has_bias": (0, 0),
    "activation": (0, 0),
    "residual_first": (0, 0),
}
_CONV_INTS = {
    "channels": (0, 1),
    "kernel_shape": (2, 1),
    "strides": (2, 1),
    "dilations": (2, 1),
    "pads": (4, 0),
    "group": (0, 1),
}
SECTION_ALIGNMENT, GROUP_ALIGNMENT = 16, 128

LINEAR_ATTRIBUTES: dict[str, type] = {
    **{name: tuple if count else int for name, (count, _) in _INTS.items()},
    "format": str,
    **dict.fromkeys(_STRINGS, str),
}
CONV_ATTRIBUTES: dict[str, type] = LINEAR_ATTRIBUTES | {
    name: tuple if count else int for name, (count, _) in _CONV_INTS.items()
}
"""Names of the attributes, all of them required, with the kind of value."""

Attributes = dict[str, int | tuple[int, ...] | str]


@dataclass(frozen=True)
class Window:
    """The attributes of a convolution; pairs are (height, width), pads top, left, bottom, right."""

    channels: int
    kernel_shape: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    group: int


@dataclass(frozen=True)
class SparseNode:
    """What the attributes of a node say.

    Attributes:
        shape: (n, k) of the matrix.
        pattern: of the weight.
        nnzb: kept blocks; 0 for N:M.
        dtype: of x, y, residual, values and bias.
        format: one of `FORMATS`.
        has_bias: whether the weight ends with one.
        activation: its name, or None.
        residual_first: whether the residual is added before the activation.
        window: of a convolution; else None.
    """

    shape: tuple[int, int]
    pattern: Pattern
    nnzb: int
    dtype: torch.dtype
    format: str
    has_bias: bool
    activation: str | None
    residual_first: bool
    window: Window | None = None

    @property
    def op_type(self) -> str:
        """Name of the node."""
        return LINEAR if self.window is None else CONV2D

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a matrix."""
        return 1 if self.window is None else self.window.group

    @property
    def filters(self) -> FilterShape | None:
        """Of a convolution, whose matrix the weight is; else None."""
        w = self.window
        if w is None:
            return None
        return FilterShape(self.shape[0], w.channels, w.kernel_shape, w.group)

    def attributes(self) -> Attributes:
        """The attributes to write, all of them.

        Raises:
            ValueError: a number that an int32 cannot hold.
        """
        attributes: Attributes = {
            "n": self.shape[0],
            "k": self.shape[1],
            "pattern": _native.encode_pattern(self.pattern),
            "nnzb": self.nnzb,
            "dtype": _native.DTYPES[self.dtype],
            "format": self.format,
            "has_bias": int(self.has_bias),
            "activation": _native.ACTIVATIONS[self.activation],
            "residual_first": int(self.residual_first),
            **_STRINGS,
        }
        if self.window is not None:
            attributes |= {name: getattr(self.window, name) for name in _CONV_INTS}
        for name, value in attributes.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(n, int) and n > MAX_INT for n in numbers):
                raise ValueError(
                    f"{self.op_type}: {name} is {value}; readers take integers below 2**31"
                )
        return attributes

    @classmethod
    def parse(cls, op_type: str, attributes: Mapping[str, Any]) -> SparseNode:
        """Read the attributes of a node.

        Args:
            op_type: `SparseLinear` or `SparseConv2d`.
            attributes: integers, sequences of integers, and strings.

        Raises:
            ValueError: another op type; an attribute that is missing, unknown or wrong; sizes that
                do not fit each other.
        """
        if op_type not in (LINEAR, CONV2D):
            raise ValueError(f"expected a node {LINEAR} or {CONV2D}, got {op_type!r}")
        read = _Reader(op_type, attributes)
        n, k = read.number("n"), read.number("k")
        pattern = read.pattern((n, k))
        window = None
        if op_type == CONV2D:
            window = Window(**{name: read.value(name) for name in _CONV_INTS})
        node = cls(
            shape=(n, k),
            pattern=pattern,
            nnzb=read.number("nnzb"),
            dtype=read.code("dtype", _DTYPES),
            format=read.choice("format", FORMATS),
            has_bias=read.code("has_bias", {0: False, 1: True}),
            activation=read.code("activation", _ACTIVATIONS),
            residual_first=read.code("residual_first", {0: False, 1: True}),
            window=window,
        )
        try:
            node._check_sizes()
        except ValueError as error:
            raise read.error(f"has sizes that do not fit: {error}") from None
        return node

    def _check_sizes(self) -> None:
        if self.nnzb and isinstance(self.pattern, NM):
            raise ValueError(f"nnzb={self.nnzb}, expected 0 for {self.pattern}")
        filters = self.filters
        if filters is not None and filters.matrix_shape(self.pattern) != self.shape:
            expected = list(filters.matrix_shape(self.pattern))
            raise ValueError(
                f"the filters make a matrix {expected}, n and k say {list(self.shape)}"
            )
        self.weight_size()

    def weight_size(self) -> int | None:
        """How many int32 numbers the weight is; None where only its bytes say.

        Raises:
            ValueError: there is no such weight.
        """
        sizes = _native.canonical_sizes(self.pattern, self.dtype, self.shape, self.nnzb)
        if self.format == CANONICAL:
            end = 0
            for size in sizes if isinstance(self.pattern, BlockSparse) else sizes[:2]:
                end = round_up(end, SECTION_ALIGNMENT) + size
            return self._words(end)
        (n, k), groups = self.shape, self.groups
        if groups > 1 and isinstance(self.pattern, BlockSparse):
            return None
        part = _native.format_bytes(
            self.format, self.pattern, self.dtype, (n // groups, k), self.nnzb
        )
        return self._words(part if groups == 1 else groups * round_up(part, GROUP_ALIGNMENT))

    def _words(self, weight_bytes: int) -> int:
        if self.has_bias:
            weight_bytes = round_up(weight_bytes, SECTION_ALIGNMENT) + self.bias_bytes()
        return round_up(weight_bytes, 4) // 4

    def bias_bytes(self) -> int:
        """Bytes of the bias; 0 where there is none."""
        return self.shape[0] * self.dtype.itemsize if self.has_bias else 0


class _Reader:
    """Attributes by name, each checked by itself."""

    def __init__(self, op_type: str, attributes: Mapping[str, Any]) -> None:
        self.op_type = op_type
        self.attributes = attributes
        self.ints = _INTS if op_type == LINEAR else {**_INTS, **_CONV_INTS}
        names = (LINEAR_ATTRIBUTES if op_type == LINEAR else CONV_ATTRIBUTES).keys()
        for name in sorted(names - attributes.keys()):
            raise self.error(f"has no attribute {name!r}")
        for name in sorted(attributes.keys() - names):
            raise self.error(f"has an attribute {name!r}, which version {VERSION} does not know")
        for name, expected in _STRINGS.items():
            self.choice(name, (expected,))

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.op_type}: the node {text}")

    def value(self, name: str) -> Any:
        """An integer or a tuple of them, in range."""
        count, least = self.ints[name]
        value = self.attributes[name]
        numbers = list(value) if count and isinstance(value, Sequence) else [value]
        if len(numbers) != (count or 1) or any(
            type(n) is not int or not least <= n <= MAX_INT for n in numbers
        ):
            what = f"{count} integers" if count else "an integer"
            raise self.error(f"has {name}={value!r}, expected {what} from {least} to {MAX_INT}")
        return tuple(numbers) if count else numbers[0]

    def number(self, name: str) -> int:
        number: int = self.value(name)
        return number

    def code(self, name: str, meanings: Mapping[int, Any]) -> Any:
        number = self.number(name)
        if number not in meanings:
            raise self.error(f"has {name}={number}, expected one of {sorted(meanings)}")
        return meanings[number]

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        value = self.attributes[name]
        if value not in allowed:
            expected = repr(allowed[0]) if len(allowed) == 1 else f"one of {tuple(allowed)}"
            raise self.error(f"has {name}={value!r}, expected {expected}")
        return str(value)

    def pattern(self, shape: tuple[int, int]) -> Pattern:
        code = self.value("pattern")
        family, kept, group, vector, rows, columns = code
        sides = 1 <= rows <= MAX_BLOCK and 1 <= columns <= MAX_BLOCK
        try:
            if family == 0 and rows == columns == 0:
                return NM(kept, group, vector)
            if family == 1 and kept == group == vector == 0 and sides:
                return _native.decode_pattern(code, shape, self.kept_blocks(shape, rows, columns))
        except ValueError as error:
            raise self.error(f"has pattern={code}: {error}") from None
        raise self.error(
            f"has pattern={code}, expected (0, N, M, vector, 0, 0) or "
            f"(1, 0, 0, 0, block rows, block columns) with sides of 1 to {MAX_BLOCK}"
        )

    def kept_blocks(self, shape: tuple[int, int], rows: int, columns: int) -> int:
        blocks = -(-shape[0] // rows) * -(-shape[1] // columns)
        kept = self.number("nnzb")
        if kept > blocks:
            raise self.error(f"has nnzb={kept}, the weight has {blocks} blocks")
        return kept


def round_up(size: int, alignment: int) -> int:
    """The next multiple of an alignment."""
    return -(-size // alignment) * alignment
