"""Checkpoints of compressed-tensors (llm-compressor, vLLM) with bitmask compression.

Of a pruned weight `<layer>.weight` such a file holds

- `<layer>.bitmask`, uint8 `[n, ceil(k / 8)]`: a bit for each weight, least significant first, set
  where it is kept;
- `<layer>.shape`, int64: n and k;
- `<layer>.compressed`: the kept weights row by row, `[n, k / 2]` in the format `sparse-24-bitmask`
  (2:4), flat in `sparse-bitmask`;
- in `sparse-bitmask` also `<layer>.row_offsets`, int64 `[n]`: where each row starts in them.

The package itself dropped both formats in 2026 and is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekit.files import replacing
from sparsekit.interop.imported import Imported, State, add_mask
from sparsekit.pack import DTYPES, PackedWeight
from sparsekit.patterns import NM

_WHAT = "from_compressed_tensors"
_FORMATS = ("dense", "sparse-24-bitmask", "sparse-bitmask")
_PARTS = ("bitmask", "shape", "row_offsets")  # beside `compressed`
_TWO_OF_FOUR = NM(2, 4)


def from_compressed_tensors(source: State | str | Path) -> Imported:
    """Read a checkpoint in the formats `sparse-24-bitmask` and `sparse-bitmask`.

    Args:
        source: a safetensors file, a folder of them (with a `config.json`, whose format is
            checked), or the tensors by name.

    Raises:
        ValueError: a damaged file, sizes, counts or bits that do not fit together, a quantised
            weight, or another compression format.
        OSError: a file cannot be read.
    """
    if not isinstance(source, Mapping):
        path = Path(source)
        state = read_tensors(path)
        _check_config(path)
    else:
        state = dict(source)
    masks: dict[str, Tensor] = {}
    plain = dict(state)
    for layer in compressed_layers(state):
        dense, mask = _decompressed(layer, state)
        for part in ("compressed", *_PARTS):
            plain.pop(f"{layer}.{part}", None)
        name = layer if layer.endswith(".weight") else f"{layer}.weight"
        if name in plain:
            raise ValueError(f"{_WHAT}: {name!r} is there both dense and compressed")
        plain[name] = dense
        add_mask(masks, name, mask)
    return Imported(plain, masks)


def compressed_layers(state: State) -> list[str]:
    """Names before `.compressed`, where a bitmask lies beside it."""
    names = [name.removesuffix(".compressed") for name in state if name.endswith(".compressed")]
    return [name for name in names if f"{name}.bitmask" in state]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of all those in a folder.

    Raises:
        ValueError: a file is damaged, the folder has none, or a name is in two of them.
        OSError: a file cannot be read.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no safetensors file")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in sorted(handle.keys()):
                    if name in state:
                        raise ValueError(f"{path}: {name!r} is in more than one file")
                    state[name] = handle.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut off: {error}") from None
    return state


def _check_config(path: Path) -> None:
    """Refuse what `config.json` says is compressed in another way."""
    file = path / "config.json"
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    for key in ("quantization_config", "compression_config", "sparsity_config"):
        inner = config.get(key) if isinstance(config, dict) else None
        config = inner if isinstance(inner, dict) else config
    format = config.get("format") if isinstance(config, dict) else None
    if format is not None and format not in _FORMATS:
        raise ValueError(f"{file} says the format is {format!r}, expected one of {_FORMATS}")


def _decompressed(layer: str, state: State) -> tuple[Tensor, Tensor]:
    values, bits = state[f"{layer}.compressed"], state[f"{layer}.bitmask"]
    offsets = state.get(f"{layer}.row_offsets")

    def error(text: str) -> ValueError:
        return ValueError(f"{_WHAT}: {layer!r}: {text}")

    if values.dtype not in DTYPES:
        raise error(
            f"the values are {values.dtype}; a quantised weight is not read, expected one of "
            f"{[str(dtype) for dtype in DTYPES]}"
        )
    n, k = _shape(layer, state)
    if bits.dtype != torch.uint8 or bits.shape != (n, -(-k // 8)):
        raise error(
            f"expected a bitmask uint8 {[n, -(-k // 8)]} for a weight {[n, k]}, got {bits.dtype} "
            f"{list(bits.shape)}"
        )
    each = np.unpackbits(bits.cpu().contiguous().numpy(), axis=1, bitorder="little")
    if each[:, k:].any():
        raise error(f"the bitmask has bits beyond column {k}")
    mask = torch.from_numpy(each[:, :k].astype(bool))
    kept = int(mask.sum())
    if kept != values.numel():
        raise error(f"the bitmask keeps {kept} values, there are {values.numel()}")
    if offsets is None:
        if values.shape != (n, k // 2) or k % 4:
            raise error(
                f"expected values {[n, k // 2]} of a 2:4 weight {[n, k]} with k a multiple of 4, "
                f"got {list(values.shape)}"
            )
        violation = _TWO_OF_FOUR.first_violation(mask)
        if violation is not None:
            raise error(f"the bitmask is not 2:4: {violation}")
    else:
        counts = mask.sum(1)
        if not torch.equal(offsets.cpu(), counts.cumsum(0) - counts):
            raise error("the row offsets are not those of the bitmask")
    dense = torch.zeros(n, k, dtype=values.dtype)
    dense[mask] = values.cpu().flatten()
    return dense.to(values.device), mask.to(values.device)


def _shape(layer: str, state: State) -> tuple[int, int]:
    shape = state.get(f"{layer}.shape")
    if shape is None or shape.is_floating_point() or shape.numel() != 2:
        got = "nothing" if shape is None else f"{shape.dtype} {list(shape.shape)}"
        raise ValueError(f"{_WHAT}: {layer!r}: expected two integers as its shape, got {got}")
    n, k = (int(side) for side in shape.flatten())
    if min(n, k) < 1:
        raise ValueError(f"{_WHAT}: {layer!r}: expected a shape of positive sides, got {[n, k]}")
    return n, k


def to_compressed_tensors(
    state: Mapping[str, Tensor | PackedWeight], path: str | Path
) -> dict[str, Any]:
    """Write a `sparse-24-bitmask` checkpoint that compressed-tensors before March 2026 reads.

    Args:
        state: packed weights by their layer's name, all other tensors by their own.
        path: the safetensors file.

    Returns:
        What belongs in the model's `config.json` as `quantization_config`.

    Raises:
        ValueError: a packed weight is no 2:4 matrix with a multiple of 4 columns.
        OSError: the file cannot be written.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    layers = []
    for name, value in state.items():
        if isinstance(value, PackedWeight):
            layers.append(name)
            parts = _compressed(name, value)
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        elif not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"to_compressed_tensors: {name!r} is a {type(value).__name__}; expected packed "
                "weights and dense tensors"
            )
        else:
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    with replacing(path) as scratch:
        try:
            save_file(tensors, scratch / path.name, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
    sparsity = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": layers,
        "ignore": [],
    }
    return {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity}


def _compressed(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    pattern, shape = packed.pattern, packed.shape
    if (
        not isinstance(pattern, NM)
        or (pattern.n, pattern.m) != (2, 4)
        or len(shape) != 2
        or shape[1] % 4
    ):
        raise ValueError(
            f"to_compressed_tensors: {name!r} is {pattern} of shape {list(shape)}; the format "
            "holds 2:4 matrices with a multiple of 4 columns"
        )
    n, k = shape
    canonical = packed.canonical()
    rows = canonical.indices.repeat_interleave(pattern.vector, 0)[:n]
    # Four 2-bit positions in a byte, the first in the lowest bits.
    positions = (rows[..., None] >> torch.arange(0, 8, 2, dtype=torch.uint8)) & 3
    where = positions.view(n, -1)[:, : k // 2].view(n, k // 4, 2).long()
    mask = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(2, where, True).view(n, k)
    bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
    return {
        "compressed": canonical.values.contiguous(),
        "bitmask": torch.from_numpy(bits),
        "shape": torch.tensor([[n], [k]]),
    }
