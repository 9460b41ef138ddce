"""Files to be damaged, and models that must not notice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Edit = Callable[[dict[str, Tensor], dict[str, Any]], object]


def snapshot(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    return repr(model), {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[str, dict[str, Tensor]]) -> None:
    assert repr(model) == before[0]
    after = model.state_dict()
    assert after.keys() == before[1].keys()
    assert all(torch.equal(after[name], value) for name, value in before[1].items())


def edited(path: Path, edit: Edit) -> Path:
    """A copy of a file with its tensors and metadata changed."""
    with safe_open(path, framework="pt") as handle:
        metadata: dict[str, Any] = dict(handle.metadata())
    for key in ("layers", "fused", "tied"):
        metadata[key] = json.loads(metadata[key])
    tensors = load_file(path)
    edit(tensors, metadata)
    other = path.with_name("edited.safetensors")
    strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    save_file(tensors, other, strings)
    return other


def layers(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata["layers"]  # type: ignore[no-any-return]


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flipped(content: bytes, region: str, times: int) -> Iterator[bytes]:
    """A file with a few bits of its "length", "header" or "data" turned over, again and again."""
    head = header_size(content)
    low, high = {"length": (0, 8), "header": (8, head), "data": (head, len(content))}[region]
    rng = random.Random(region)
    for _ in range(times):
        bad = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            bad[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        yield bytes(bad)
