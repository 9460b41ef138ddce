"""Progress on disk: tensors and plain values in one safetensors file that is replaced whole.

No pickle: reading a checkpoint runs no code. Nested values (an optimizer's state) keep their
structure as JSON in the file's metadata, in which each tensor stands by its name.
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


def write(path: Path, kind: str, value: Any) -> None:
    """Save nested dicts, lists and tuples of tensors, numbers, strings, bools and None.

    Args:
        path: replaced when the new file is complete; a kill at any moment leaves the old one.
        kind: what the file is; `read` refuses another one.
        value: what `read` gives back.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(value, tensors))
    with replacing(path) as folder:
        save_file(tensors, folder / path.name, {"kind": kind, "structure": structure})


def read(path: Path, kind: str) -> Any:
    """What `write` saved, tensors on the CPU.

    Raises:
        ValueError: not a checkpoint of this kind, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise ValueError(f"it holds {metadata.get('kind', 'something else')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _decode(json.loads(metadata["structure"]), tensors)
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is no checkpoint of {kind}, or is damaged ({error}); delete it or pass "
            "another path"
        ) from error


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Eight positions to a byte."""
    return {
        name: torch.from_numpy(np.packbits(mask.detach().cpu().numpy()))
        for name, mask in masks.items()
    }


def same_masks(packed: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> bool:
    """Whether `pack_masks` made the one of the other."""
    expected = pack_masks(masks)
    return packed.keys() == expected.keys() and all(
        torch.equal(packed[name], mask) for name, mask in expected.items()
    )


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # Two tensors of one storage are two in the file.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):  # keys keep their types: an optimizer counts its parameters
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, inside),) = value.items()
        if kind == "tensor":
            return tensors[inside]
        if kind == "tuple":
            return tuple(_decode(item, tensors) for item in inside)
        return {key: _decode(item, tensors) for key, item in inside}
    return value
