"""Sparse models in safetensors files: canonical form, one file for every machine.

A sparse layer `<name>` is stored as `<name>.values`, `<name>.indices` and, for blocks,
`<name>.crow_indices`; everything else as in the model's `state_dict()`, tied tensors once. The
file's metadata holds `format` ("sparsekit"), `version` and, as JSON, `layers` (pattern, shape
and dtype of each, its activation and, of a convolution, its filters), `fused` (activation modules
that a layer applies itself), `folded` (batch normalisations that weights and biases hold) and
`tied` (names that share another name's tensor).

A layer whose values are shared and coded (`sparsekit.codebook`) is stored as `<name>.codebook`,
`<name>.codes` and `<name>.positions` instead, with its `coding` in `layers`. A file with such
layers has version "2", all others have version "1", which older libraries read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparsekit import _native
from sparsekit._ops import ACTIVATIONS
from sparsekit.codebook import PARTS as CODED_PARTS
from sparsekit.codebook import Compression, Encoded, decode, encode
from sparsekit.files import replacing
from sparsekit.filters import FilterShape
from sparsekit.nn import (
    FoldedBatchNorm,
    FusedActivation,
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
    fusion,
)
from sparsekit.nn.batchnorm import is_batchnorm
from sparsekit.nn.memory_format import put_weights_in_nhwc
from sparsekit.nn.packed import PackedModule
from sparsekit.pack import PackedWeight
from sparsekit.summary import CANONICAL_PARTS, FileSummary, LayerEntry

FORMAT = "sparsekit"
VERSION = 1
CODED_VERSION = 2

PathLike: TypeAlias = str | os.PathLike[str]


# --- saving -----------------------------------------------------------------------------------


def save(
    model_or_state: nn.Module | Mapping[str, Tensor | PackedWeight],
    path: PathLike,
    compress: Compression | int | None = None,
) -> None:
    """Write a model, or a mapping of tensors and packed weights, to a file.

    The file is written beside `path` and renamed, so a failed save leaves an old file as it was.

    Args:
        model_or_state: a model with sparse layers, or a mapping from names to tensors and
            `PackedWeight` objects (a packed weight's name is its layer's).
        path: the file.
        compress: shares the values of sparse layers in codebooks and Huffman codes them (Deep
            Compression, Han et al. 2016, arXiv 1510.00149; `sparsekit.Compression`), or the bits of
            a code. The weights in the file are then not those of the model, which stays as it is:
            `apply_codebooks` shows what they do to its accuracy, `compression_report` the sizes.
            A layer that gets no smaller by it stays as it is. None keeps every bit.

    Raises:
        ValueError: the state holds something that is no tensor; the compression is none.
        OSError: the file cannot be written.
    """
    compression = None if compress is None else Compression.of(compress)
    state: dict[str, Tensor] = {}
    layers: dict[str, LayerEntry] = {}
    bytes_of: dict[str, Tensor] = {}
    fused: dict[str, str] = {}
    folded: list[str] = []
    if isinstance(model_or_state, nn.Module):
        state.update(model_or_state.state_dict())
        for name, module in model_or_state.named_modules(remove_duplicate=False):
            if isinstance(module, PackedModule):
                layers[name] = LayerEntry.of(module.packed, module.activation)
                bytes_of[name] = module.packed_data
            elif isinstance(module, FusedActivation):
                fused[name] = module.activation
            elif isinstance(module, FoldedBatchNorm):
                folded.append(name)
    else:
        for name, value in model_or_state.items():
            if isinstance(value, PackedWeight):
                layers[name] = LayerEntry.of(value)
                bytes_of[name] = value.data
                canonical = value.canonical()
                for part in layers[name].parts:
                    state[f"{name}.{part}"] = getattr(canonical, part)
            else:
                state[name] = value
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"save: {name!r} is a {type(value).__name__}, a file holds dense tensors only"
            )
    if compression is not None:
        _compress(state, layers, bytes_of, compression)
    coded = any(entry.coding for entry in layers.values())
    tensors, tied = _without_duplicates(state)
    metadata = {
        "format": FORMAT,
        "version": str(CODED_VERSION if coded else VERSION),
        "layers": json.dumps({name: entry.to_json() for name, entry in layers.items()}),
        "fused": json.dumps(fused),
        "folded": json.dumps(folded),
        "tied": json.dumps(tied),
    }
    _write(tensors, metadata, Path(path))


def _compress(
    state: dict[str, Tensor],
    layers: dict[str, LayerEntry],
    bytes_of: Mapping[str, Tensor],
    compression: Compression,
) -> None:
    """Replace canonical tensors by coded ones; of a weight under several names once."""
    done: dict[int, Encoded | None] = {}
    for name, entry in layers.items():
        key = id(bytes_of[name])
        if key not in done:
            parts = {part: state[f"{name}.{part}"].cpu() for part in entry.parts}
            done[key] = encode(_canonical(entry, parts), compression)
        encoded = done[key]
        if encoded is None:
            continue
        for part in entry.parts:
            del state[f"{name}.{part}"]
        state.update({f"{name}.{part}": getattr(encoded, part) for part in CODED_PARTS})
        layers[name] = replace(entry, coding=encoded.coding)


def _canonical(entry: LayerEntry, parts: Mapping[str, Tensor]) -> _native.Canonical:
    crow = parts.get("crow_indices")
    return _native.Canonical(
        entry.pattern, entry.shape, entry.dtype, parts["values"], parts["indices"], crow
    )


def _without_duplicates(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, on the CPU, owning its memory; and which name stands for which."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        tensor = tensor.cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # a part of something larger, which may be stored as well
        tensors[name] = tensor
    return tensors, tied


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    with replacing(path) as scratch:
        try:
            save_file(tensors, scratch / path.name, metadata)
        except SafetensorError as error:
            raise OSError(f"save: {path} could not be written: {error}") from error


# --- reading ----------------------------------------------------------------------------------


class _File:
    """An open file whose metadata has been checked."""

    def __init__(self, handle: Any, path: Path) -> None:
        self._handle = handle
        self.path = path
        self.names: set[str] = set(handle.keys())
        metadata = handle.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise self.error(
                f"is no sparsekit file (its format is {metadata.get('format')!r}); write it with "
                "sparsekit.save"
            )
        if metadata.get("version") not in (str(VERSION), str(CODED_VERSION)):
            raise self.error(
                f"has version {metadata.get('version')!r}, this library reads versions {VERSION} "
                f"and {CODED_VERSION}; update sparsekit or save the model again"
            )
        self.version = int(metadata["version"])
        self.layers = {
            name: self._layer(name, entry)
            for name, entry in self._mapping(metadata, "layers").items()
        }
        self.fused = self._mapping(metadata, "fused")
        self.folded = self._names(metadata, "folded")
        self.tied = self._mapping(metadata, "tied")
        for name, activation in self.fused.items():
            if activation not in ACTIVATIONS[1:]:
                raise self.error(f"fuses an unknown activation {activation!r} at {name!r}")
        for name, source in self.tied.items():
            if name in self.names or not isinstance(source, str) or source not in self.names:
                raise self.error(f"ties {name!r} to {source!r}, which does not fit its tensors")
        for name, entry in self.layers.items():
            for part in entry.parts:
                if f"{name}.{part}" not in self.names and f"{name}.{part}" not in self.tied:
                    raise self.error(f"lacks {name}.{part} of a {entry.pattern} layer")

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.path} {text}")

    def _mapping(self, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
        try:
            value = json.loads(metadata[key])
        except (KeyError, ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.error(f"has damaged metadata: {key!r} is no JSON object")
        return value

    def _names(self, metadata: Mapping[str, str], key: str) -> list[str]:
        """A list of names; files from before there was one have none."""
        try:
            value = json.loads(metadata.get(key, "[]"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(f"has damaged metadata: {key!r} is no JSON list of names")
        return value

    def _layer(self, name: str, entry: Any) -> LayerEntry:
        try:
            layer = LayerEntry.from_json(entry)
            if layer.coding is not None and self.version < CODED_VERSION:
                raise ValueError(f"coded in a file of version {self.version}")
        except (KeyError, TypeError, ValueError) as error:
            raise self.error(f"describes layer {name!r} wrongly: {error}") from None
        return layer

    def keys(self) -> set[str]:
        """All names, tied ones included."""
        return self.names | set(self.tied)

    def tensor(self, name: str) -> Tensor:
        """The tensor; it may share memory with the open file."""
        tensor: Tensor = self._handle.get_tensor(self.tied.get(name, name))
        return tensor

    def canonical(self, name: str) -> _native.Canonical:
        """A sparse layer's canonical form, with sizes and indices checked."""
        entry = self.layers[name]
        parts = {part: self.tensor(f"{name}.{part}").contiguous() for part in entry.parts}
        try:
            if entry.coding is None:
                canonical = _canonical(entry, parts)
            else:
                encoded = Encoded(entry.coding, **parts)
                canonical = decode(encoded, entry.pattern, entry.shape, entry.dtype)
            _native.validate(canonical)
        except ValueError as error:
            raise self.error(f"holds a damaged layer {name!r}: {error}") from None
        if not bool(canonical.values.isfinite().all()):
            raise self.error(f"holds a damaged layer {name!r}: a value is not finite")
        return canonical


@contextmanager
def _open(path: PathLike) -> Iterator[_File]:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file")
    try:
        with safe_open(path, framework="pt") as handle:
            yield _File(handle, path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from None


def load(model: nn.Module, path: PathLike, target: str = "auto", progress: bool = True) -> None:
    """Load a file into a model of the same architecture, in place.

    Layers that are sparse in the file become `SparseLinear`, `SparseConv1d` or `SparseConv2d`,
    packed for the device they are on, with the activations fused that were fused when the file was
    written; the dense and the sparse layer are both accepted in their place, and stride, padding
    and dilation of a convolution are the model's. Batch normalisations that were folded become
    identities, and a layer that got a bias by that gets it here. All other parameters and buffers
    take the file's values and dtypes; dense convolutions beside sparse ones become channels_last.
    The whole file is checked before the model is touched.

    Args:
        model: dense, or converted before; on a CPU or GPUs, where each layer stays.
        path: written by `save` from a model.
        target: what the weights are packed for (see `sparsekit.pack`).
        progress: show a progress bar if packing takes longer than a second.

    Raises:
        ValueError: not a sparsekit file, an unknown version, a damaged or truncated file, indices
            out of range, or names and shapes that do not fit the model. The model is unchanged.
        NotImplementedError: a layer is on a GPU, and no kernel there takes it. The model is
            unchanged.
        OSError: the file cannot be read.
    """
    with _open(path) as file:
        modules = dict(model.named_modules(remove_duplicate=False))
        _check_modules(modules, file)
        state, biases = _check_tensors(model, modules, file)
        sparse: dict[int, PackedModule] = {}
        bar = tqdm(file.layers.items(), desc="load", unit="layer", delay=1, disable=not progress)
        for name, entry in bar:
            old = modules[name]
            if id(old) not in sparse:
                packed = PackedWeight.from_canonical(
                    file.canonical(name), target, _device_of(old), entry.filters
                )
                sparse[id(old)] = _sparse_in_place_of(old, packed, entry.activation)
        # From here on nothing can fail.
        with torch.no_grad():
            for name, tensor in state.items():
                value = file.tensor(name)
                if value.dtype == tensor.dtype and tensor.is_contiguous():
                    tensor.copy_(value)
                else:
                    tensor.data = value.to(tensor.device, copy=True)
        for name in biases:
            _add_bias(modules[name], file.tensor(f"{name}.bias"))
        for name in file.layers:
            new = sparse[id(modules[name])]
            new.bias = modules[name].bias  # the parameter itself, whoever else holds it
            _replace(modules, name, new)
        for name, activation in file.fused.items():
            fused = FusedActivation(activation).train(modules[name].training)
            _replace(modules, name, fused)
        for name in file.folded:
            _replace(modules, name, FoldedBatchNorm.in_place_of(modules[name]))
        if any(entry.filters for entry in file.layers.values()):
            put_weights_in_nhwc(model)


def _check_modules(modules: Mapping[str, nn.Module], file: _File) -> None:
    """The model has layers and activations where the file wants to put its own."""
    for name, entry in file.layers.items():
        module = modules.get(name) if name else None
        if module is None or not isinstance(module, _places(entry.filters)):
            got = "nothing" if module is None else f"a {type(module).__name__}"
            kind = "layer" if entry.filters is None else f"conv{entry.filters.dims}d"
            raise file.error(f"has a sparse {kind} {name!r}, the model has {got} there")
        shape = _weight_shape(module)
        if shape != entry.weight_shape:
            raise file.error(
                f"has {name!r} with shape {list(entry.weight_shape)}, the model with {list(shape)}"
            )
        if entry.filters is not None and entry.filters.groups != module.groups:
            raise file.error(
                f"has {name!r} with groups={entry.filters.groups}, the model with "
                f"groups={module.groups}"
            )
    for name in file.folded:
        module = modules.get(name) if name else None
        if module is None or not (isinstance(module, FoldedBatchNorm) or is_batchnorm(module)):
            got = "nothing" if module is None else f"a {type(module).__name__}"
            raise file.error(f"folds a batch normalisation at {name!r}, the model has {got} there")
    applied = Counter(entry.activation for entry in file.layers.values())
    for name, activation in file.fused.items():
        module = modules.get(name) if name else None
        if isinstance(module, FusedActivation):
            fits = module.activation == activation
        else:
            fits = module is not None and fusion.activation_name(module) == activation
        applied[activation] -= 1
        if not fits or applied[activation] < 0:
            raise file.error(f"fuses the {activation} at {name!r}, which does not fit the model")


def _check_tensors(
    model: nn.Module, modules: Mapping[str, nn.Module], file: _File
) -> tuple[dict[str, Tensor], list[str]]:
    """What takes a value from the file: the model's tensors but sparse weights and folded batch
    normalisations; and the layers that get a bias.
    """
    own_parts = ("weight", *CANONICAL_PARTS)
    inside = {
        f"{name}.{part}"
        for name, entry in file.layers.items()
        for part in (*own_parts, *entry.parts)
    }
    for name in file.folded:
        own = (*modules[name]._parameters, *modules[name]._buffers)
        inside.update(f"{name}.{part}" for part in own)
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in inside
    }
    biases = _biases_by_folding(modules, file)
    names = file.keys() - inside - {f"{name}.bias" for name in biases}
    missing, unexpected = sorted(state.keys() - names), sorted(names - state.keys())
    if missing or unexpected:
        raise file.error(
            f"does not fit the model: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    for name, tensor in state.items():
        value = file.tensor(name)
        if value.shape != tensor.shape or value.is_floating_point() != tensor.is_floating_point():
            raise file.error(
                f"has {name!r} as {value.dtype} {list(value.shape)}, the model as {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        if tensor.device.type == "meta":
            raise ValueError(f"load: {name!r} is on the meta device; make the model on the CPU")
    for name, entry in file.layers.items():
        has_bias = f"{name}.bias" in state or name in biases
        if has_bias and file.tensor(f"{name}.bias").dtype != entry.dtype:
            raise file.error(f"has a bias of {name!r} that is not {entry.dtype}")
    return state, biases


def _biases_by_folding(modules: Mapping[str, nn.Module], file: _File) -> list[str]:
    """Layers without a bias that have one in the file, no more than batch normalisations folded."""
    found: list[str] = []
    names = file.keys()
    for name, module in modules.items():
        layer = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | PackedModule)
        if layer and module._parameters.get("bias") is None and f"{name}.bias" in names:
            rows = _weight_shape(module)[0]
            shape = tuple(file.tensor(f"{name}.bias").shape)
            if shape != (rows,):
                raise file.error(f"has a bias of {name!r} of shape {list(shape)}, not {[rows]}")
            found.append(name)
    return found[: len(file.folded)]


def _add_bias(layer: nn.Module, bias: Tensor) -> None:
    weight = layer._parameters.get("weight")
    wanted = weight is None or weight.requires_grad
    layer.bias = nn.Parameter(bias.to(_device_of(layer), copy=True), requires_grad=wanted)


def _places(filters: FilterShape | None) -> tuple[type[nn.Module], ...]:
    """What a sparse layer may take the place of."""
    if filters is None:
        return nn.Linear, SparseLinear
    return (nn.Conv1d, SparseConv1d) if filters.dims == 1 else (nn.Conv2d, SparseConv2d)


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    weight = layer.packed if isinstance(layer, PackedModule) else layer.weight
    assert isinstance(weight, Tensor | PackedWeight)
    return tuple(weight.shape)


def _sparse_in_place_of(
    old: nn.Module, packed: PackedWeight, activation: str | None
) -> PackedModule:
    new: PackedModule
    if isinstance(old, nn.Linear | SparseLinear):
        new = SparseLinear(packed, None, activation)
    else:
        kind = SparseConv1d if isinstance(old, nn.Conv1d | SparseConv1d) else SparseConv2d
        assert isinstance(old, nn.Conv1d | nn.Conv2d | SparseConv1d | SparseConv2d)
        new = kind(
            packed, None, old.stride, old.padding, old.dilation, old.padding_mode, activation
        )
    return new.train(old.training)


def _device_of(layer: nn.Module) -> torch.device:
    weight = layer.packed_data if isinstance(layer, PackedModule) else layer.weight
    assert isinstance(weight, Tensor)
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def _replace(modules: Mapping[str, nn.Module], name: str, new: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(modules[parent], attribute, new)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


# --- looking ----------------------------------------------------------------------------------


def inspect(path: PathLike) -> FileSummary:
    """Read what is in a file, and check it as `load` does.

    Raises:
        ValueError: as `load`.
        OSError: the file cannot be read.
    """
    with _open(path) as file:
        inside: set[str] = set()
        layer_bytes = {}
        for name, entry in file.layers.items():
            file.canonical(name)
            parts = [f"{name}.{part}" for part in entry.parts]
            layer_bytes[name] = sum(file.tensor(part).nbytes for part in parts)
            inside.update(parts)
        dense = {}
        for name in sorted(file.names - inside):
            tensor = file.tensor(name)
            dense[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        return FileSummary(
            path=str(file.path),
            version=file.version,
            nbytes=file.path.stat().st_size,
            layers=file.layers,
            layer_bytes=layer_bytes,
            dense=dense,
            fused=file.fused,
            folded=file.folded,
            tied=file.tied,
        )
