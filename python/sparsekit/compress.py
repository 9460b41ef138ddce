"""What sharing and coding the values of a model's sparse layers saves, and what it changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from sparsekit import _native
from sparsekit.codebook import Compression, Encoded, decode, encode
from sparsekit.dispatch import table
from sparsekit.nn.packed import PackedModule


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of one layer's weight.

    Attributes:
        name: of the layer.
        pattern: of its weight.
        dense: in float32.
        int8: dense, one byte for each weight and a float32 scale for each output row.
        sparse: as `sparsekit.save` writes it without compression.
        shared: with codebooks, the codes side by side.
        coded: as `sparsekit.save` writes it with this compression.
        error: of the values by sharing: the root of their mean square over that of the values.
    """

    name: str
    pattern: str
    dense: int
    int8: int
    sparse: int
    shared: int
    coded: int
    error: float | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The columns of the table."""
        return self.dense, self.int8, self.sparse, self.shared, self.coded


@dataclass(frozen=True)
class CompressionReport:
    """Bytes of a model's weights; `str()` is a table.

    Attributes:
        compression: what was asked for.
        layers: the sparse layers.
        rest: all other tensors of the model: as they are stored, but for `dense`.
    """

    compression: Compression
    layers: list[LayerSizes]
    rest: LayerSizes

    @property
    def sparse(self) -> LayerSizes:
        """Of the sparse layers together."""
        return _sum("sparse layers", self.layers)

    @property
    def total(self) -> LayerSizes:
        """Of all tensors."""
        return _sum("total", [*self.layers, self.rest])

    def __str__(self) -> str:
        rows = []
        for row in (*self.layers, self.sparse, self.rest, self.total):
            sizes = [f"{row.sizes[0]:,}"]
            sizes += [f"{size:,} ({_ratio(row.dense, size)})" for size in row.sizes[1:]]
            error = "-" if row.error is None else f"{row.error:.2%}"
            rows.append((row.name, row.pattern or "-", *sizes, error))
        head = ("layer", "pattern", "dense f32", "dense int8", "sparse", "codebook", "coded")
        how = "Huffman coded" if self.compression.entropy else "not entropy coded"
        title = f"{self.compression.bits} bits per {self.compression.per}, {how}; bytes"
        return f"{title}\n{table((*head, 'error'), rows)}"


def _sum(name: str, rows: Sequence[LayerSizes]) -> LayerSizes:
    columns = zip(*(row.sizes for row in rows), strict=True)
    dense, int8, sparse, shared, coded = map(sum, columns)
    return LayerSizes(name, "", dense, int8, sparse, shared, coded, None)


def _ratio(dense: int, size: int) -> str:
    return f"{dense / size:.1f}x" if size else "-"


def compression_report(model: nn.Module, compress: Compression | int = 5) -> CompressionReport:
    """What `sparsekit.save(model, path, compress)` makes of each sparse layer. Changes nothing.

    Args:
        model: converted, with sparse layers.
        compress: a `Compression`, or the bits of a code.

    Raises:
        ValueError: the model has no sparse layer; the compression is none.
    """
    compression = Compression.of(compress)
    layers = [_sizes(layer) for layer in _shared_layers(model, compression)]
    return CompressionReport(compression, layers, _rest(model))


def apply_codebooks(model: nn.Module, compress: Compression | int = 5) -> CompressionReport:
    """Give the sparse layers the values that a file with this compression has, in place.

    So the accuracy of what `sparsekit.save(model, path, compress)` writes can be measured before.
    What is saved with the same compression afterwards is the model to the bit. The method is the
    codebook step of Deep Compression (Han, Mao, Dally 2016, arXiv 1510.00149) without training the
    shared values; it takes seconds, and neither data nor gradients.

    Args:
        model: converted, with sparse layers.
        compress: a `Compression`, or the bits of a code.

    Returns:
        As `compression_report`.

    Raises:
        ValueError: the model has no sparse layer; the compression is none.
    """
    compression = Compression.of(compress)
    layers = []
    for layer in _shared_layers(model, compression):
        layers.append(_sizes(layer))
        shared = layer.shared
        parts = {"values": shared.values, "indices": shared.indices}
        if shared.crow_indices is not None:
            parts["crow_indices"] = shared.crow_indices
        layer.module.load_canonical(parts)
    return CompressionReport(compression, layers, _rest(model))


class _SharedLayer(NamedTuple):
    """A sparse layer, its weight, and what a file makes of it; None: leaves it as it is."""

    name: str
    module: PackedModule
    canonical: _native.Canonical
    encoded: Encoded | None

    @property
    def shared(self) -> _native.Canonical:
        was = self.canonical
        return (
            was if self.encoded is None else decode(self.encoded, was.pattern, was.shape, was.dtype)
        )


def _shared_layers(model: nn.Module, compression: Compression) -> Iterator[_SharedLayer]:
    found = [
        (name, module) for name, module in model.named_modules() if isinstance(module, PackedModule)
    ]
    if not found:
        raise ValueError("compress: the model has no sparse layer; run sparsekit.convert first")
    for name, module in found:
        canonical = module.packed.canonical()
        yield _SharedLayer(name, module, canonical, encode(canonical, compression))


def _sizes(layer: _SharedLayer) -> LayerSizes:
    weight, canonical, encoded = layer.module.packed, layer.canonical, layer.encoded
    weights = math.prod(weight.shape)
    shared = coded = canonical.nbytes
    error = 0.0
    if encoded is not None:
        values = canonical.values.double()
        norm = float(values.norm())
        error = float((layer.shared.values.double() - values).norm()) / norm if norm else 0.0
        codes = -(-values.numel() * encoded.coding.bits // 8)
        shared = encoded.codebook.nbytes + codes + encoded.coding.position_bytes
        coded = encoded.nbytes
    return LayerSizes(
        layer.name,
        str(weight.pattern),
        4 * weights,
        weights + 4 * weight.shape[0],
        canonical.nbytes,
        shared,
        coded,
        error,
    )


def _rest(model: nn.Module) -> LayerSizes:
    """Parameters and buffers outside packed weights, tied ones once."""
    seen = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module.buffers(recurse=False)):
            if tensor is not None:
                seen[id(tensor)] = tensor
        if isinstance(module, PackedModule):
            seen.pop(id(module.packed_data))
    dense = sum(
        t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in seen.values()
    )
    same = sum(tensor.nbytes for tensor in seen.values())
    return LayerSizes("everything else", "", dense, same, same, same, same, None)
