"""Sparse models in safetensors files: canonical form, one file for every machine.

A sparse layer `<name>` is stored as `<name>.values`, `<name>.indices` and, for blocks,
`<name>.crow_indices`; everything else as in the model's `state_dict()`, tied tensors once. The
file's metadata holds `format` ("sparsekit"), `version` ("1") and, as JSON, `layers` (pattern, shape
and dtype of each, its activation and, of a convolution, its filters), `fused` (activation modules
that a layer applies itself), `folded` (batch normalisations that weights and biases hold) and
`tied` (names that share another name's tensor).
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparsekit import _native
from sparsekit._ops import ACTIVATIONS
from sparsekit.dispatch import table
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
from sparsekit.pack import DTYPES, PackedWeight
from sparsekit.patterns import Pattern, parse_pattern

FORMAT = "sparsekit"
VERSION = 1

_PARTS = ("values", "indices", "crow_indices")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class LayerEntry:
    """What a file says of one sparse layer.

    Attributes:
        pattern: of its weight.
        shape: (n, k) of the matrix that is stored.
        dtype: of the values.
        activation: fused into the layer.
        filters: of a convolution, whose matrix is stored (`sparsekit.filters`); else None.
    """

    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    activation: str | None
    filters: FilterShape | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in the file's metadata."""
        entry: dict[str, Any] = {
            "pattern": str(self.pattern),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "activation": self.activation,
        }
        if self.filters is not None:
            entry["filters"] = {"weight": self.weight_shape, "groups": self.filters.groups}
        return entry

    @classmethod
    def of(cls, packed: PackedWeight, activation: str | None = None) -> LayerEntry:
        """The entry of a packed weight."""
        meta = packed.meta
        return cls(meta.pattern, meta.shape, meta.dtype, activation, meta.filters)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return self.shape if self.filters is None else self.filters.weight_shape

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the canonical tensors."""
        return _PARTS if self.pattern.family == "bsr" else _PARTS[:2]


# --- saving -----------------------------------------------------------------------------------


def save(model_or_state: nn.Module | Mapping[str, Tensor | PackedWeight], path: PathLike) -> None:
    """Write a model, or a mapping of tensors and packed weights, to a file.

    The file is written beside `path` and renamed, so a failed save leaves an old file as it was.

    Args:
        model_or_state: a model with sparse layers, or a mapping from names to tensors and
            `PackedWeight` objects (a packed weight's name is its layer's).
        path: the file.

    Raises:
        ValueError: the state holds something that is no tensor.
        OSError: the file cannot be written.
    """
    state: dict[str, Tensor] = {}
    layers: dict[str, LayerEntry] = {}
    fused: dict[str, str] = {}
    folded: list[str] = []
    if isinstance(model_or_state, nn.Module):
        state.update(model_or_state.state_dict())
        for name, module in model_or_state.named_modules(remove_duplicate=False):
            if isinstance(module, PackedModule):
                layers[name] = LayerEntry.of(module.packed, module.activation)
            elif isinstance(module, FusedActivation):
                fused[name] = module.activation
            elif isinstance(module, FoldedBatchNorm):
                folded.append(name)
    else:
        for name, value in model_or_state.items():
            if isinstance(value, PackedWeight):
                layers[name] = LayerEntry.of(value)
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
    tensors, tied = _without_duplicates(state)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "layers": json.dumps({name: entry.to_json() for name, entry in layers.items()}),
        "fused": json.dumps(fused),
        "folded": json.dumps(folded),
        "tied": json.dumps(tied),
    }
    _write(tensors, metadata, Path(path))


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
        if metadata.get("version") != str(VERSION):
            raise self.error(
                f"has version {metadata.get('version')!r}, this library reads version {VERSION}; "
                "update sparsekit or save the model again"
            )
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
            n, k = entry["shape"]
            dtype, activation = _DTYPES[entry["dtype"]], entry["activation"]
            if type(n) is not int or type(k) is not int or min(n, k) < 1:
                raise ValueError(f"shape {entry['shape']}")
            if activation not in ACTIVATIONS:
                raise ValueError(f"activation {activation!r}")
            pattern = parse_pattern(entry["pattern"])
            filters = _filters(entry["filters"]) if "filters" in entry else None
            if filters is not None and filters.matrix_shape(pattern) != (n, k):
                raise ValueError(f"filters {entry['filters']} of a matrix {[n, k]}")
            return LayerEntry(pattern, (n, k), dtype, activation, filters)
        except (KeyError, TypeError, ValueError) as error:
            raise self.error(f"describes layer {name!r} wrongly: {error}") from None

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
        canonical = _native.Canonical(
            entry.pattern,
            entry.shape,
            entry.dtype,
            parts["values"],
            parts["indices"],
            parts.get("crow_indices"),
        )
        try:
            _native.validate(canonical)
        except ValueError as error:
            raise self.error(f"holds a damaged layer {name!r}: {error}") from None
        if not bool(canonical.values.isfinite().all()):
            raise self.error(f"holds a damaged layer {name!r}: a value is not finite")
        return canonical


def _filters(entry: Any) -> FilterShape:
    rows, channels, *kernel = entry["weight"]
    if len(kernel) not in (1, 2):
        raise ValueError(f"filters {entry['weight']}")
    height, width = kernel if len(kernel) == 2 else (1, *kernel)
    return FilterShape(rows, channels, (height, width), entry["groups"], len(kernel))


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
    inside = {f"{name}.{part}" for name in file.layers for part in ("weight", *_PARTS)}
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


@dataclass(frozen=True)
class FileSummary:
    """What is in a file; `str()` is a table.

    Attributes:
        path: the file.
        version: of the file format.
        nbytes: size of the file.
        layers: the sparse layers.
        layer_bytes: bytes each sparse layer takes in the file, bias not included.
        dense: (dtype, shape) of every other tensor.
        fused: activation modules that a layer applies itself.
        folded: batch normalisations that weights and biases hold.
        tied: names that share another name's tensor.
    """

    path: str
    version: int
    nbytes: int
    layers: dict[str, LayerEntry]
    layer_bytes: dict[str, int]
    dense: dict[str, tuple[str, tuple[int, ...]]]
    fused: dict[str, str]
    folded: list[str]
    tied: dict[str, str]

    def __str__(self) -> str:
        rows = []
        for name, entry in self.layers.items():
            shape = entry.weight_shape
            kept = self.layer_bytes[name] / (math.prod(shape) * entry.dtype.itemsize)
            rows.append(
                (
                    name,
                    str(entry.pattern),
                    " x ".join(map(str, shape)),
                    str(entry.dtype).removeprefix("torch."),
                    entry.activation or "-",
                    f"{self.layer_bytes[name]:,}",
                    f"{kept:.1%}",
                )
            )
        head = ("sparse layer", "pattern", "weight", "dtype", "activation", "bytes", "of dense")
        lines = [
            f"{self.path}: sparsekit file, version {self.version}, {self.nbytes:,} bytes",
            table(head, rows) if rows else "no sparse layers",
            f"{len(self.dense)} dense tensors, {len(self.tied)} tied names, "
            f"{len(self.fused)} fused activations, {len(self.folded)} folded batch normalisations",
        ]
        return "\n".join(lines)


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
            layer_bytes[name] = file.canonical(name).nbytes
            inside.update(f"{name}.{part}" for part in entry.parts)
        dense = {}
        for name in sorted(file.names - inside):
            tensor = file.tensor(name)
            dense[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        return FileSummary(
            path=str(file.path),
            version=VERSION,
            nbytes=file.path.stat().st_size,
            layers=file.layers,
            layer_bytes=layer_bytes,
            dense=dense,
            fused=file.fused,
            folded=file.folded,
            tied=file.tied,
        )
