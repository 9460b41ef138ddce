"""A model on the meta device that runs: each module gets its tensors when it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.prune.disk.shards import Checkpoint
from sparsekit.prune.hollow import Hollow
from sparsekit.prune.layers import Layer

# Their forward reads the weights of modules that it does not call.
_READS_INSIDE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class _Place:
    """A parameter or buffer of a module, and its name in the source."""

    module: nn.Module
    attribute: str
    on_meta: Tensor
    absent: Hollow
    source: str

    def put(self, tensor: Tensor) -> None:
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = tensor
        elif isinstance(tensor, Hollow):
            self.module._parameters[self.attribute] = tensor  # type: ignore[assignment]
        else:
            # By setattr: recurrent layers keep a second list of their weights in step with it.
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(self.module, self.attribute, tensor)

    @property
    def is_empty(self) -> bool:
        return isinstance(getattr(self.module, self.attribute), Hollow)


class Lender:
    """Lends the modules of a model the tensors that they have on the meta device.

    A module has its own parameters and buffers while its `forward` runs and not longer; who reads
    them at another time gets an error. Tensors that are in memory already are left alone. Between
    `with` and its end the model can be called.

    Args:
        model: all or part of it on the meta device; it is the same again afterwards.
        source: has the tensors under the names of the model's `state_dict`, tied ones under one of
            their names at least.
        device: where they go.

    Attributes:
        names: of every parameter on the meta device, its names in the source.
        pruned: holds tensors that take the place of the source's.

    Raises:
        ValueError: the source lacks a tensor or has it in another shape or kind.
    """

    def __init__(self, model: nn.Module, source: Checkpoint, device: torch.device) -> None:
        self.pruned = Checkpoint([])
        self.names: dict[Tensor, list[str]] = {}
        self._source = source
        self._device = device
        self._removers: list[Callable[[], None]] = []
        self._lent: dict[nn.Module, list[list[_Place]]] = {}
        self._places: dict[nn.Module, list[_Place]] = {}
        _check_transient(model, source)
        self._find(model)

    def __enter__(self) -> Lender:
        for module, places in self._places.items():
            for place in places:
                place.put(place.absent)
            if isinstance(module, _READS_INSIDE):
                places = [place for m in module.modules() for place in self._places.get(m, ())]
            self._lent[module] = []
            # always_call: a forward that is stopped half-way gives back as well.
            for handle in (
                module.register_forward_pre_hook(self._lend(places)),
                module.register_forward_hook(self._take_back, always_call=True),
            ):
                self._removers.append(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        for remove in self._removers:
            remove()
        self._removers.clear()
        for places in self._places.values():
            for place in places:
                place.put(place.on_meta)

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the source, pruned if it is by now; a view of its file."""
        return (self.pruned if name in self.pruned else self._source).read(name)

    def tensor(self, stands_in: Tensor) -> Tensor:
        """What a parameter of the model is now; itself if it is in memory."""
        names = self.names.get(stands_in)
        return stands_in if names is None else self.read(names[0])

    @contextmanager
    def weight_of(self, layer: Layer) -> Iterator[Tensor]:
        """A copy of the layer's weight in the source's dtype, which `layer.weight` is meanwhile."""
        module = layer.modules[0]
        place = next(p for p in self._places[module] if p.attribute == "weight")
        place.put(self.read(place.source).to(self._device, copy=True))
        try:
            yield layer.weight
        finally:
            place.put(place.absent)

    def _find(self, model: nn.Module) -> None:
        missing: list[str] = []
        tensors: dict[Tensor, list[str]] = {}
        owners: dict[tuple[nn.Module, str], Tensor] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for attribute, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None and tensor.device.type == "meta":
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    tensors.setdefault(tensor, []).append(name)
                    owners[module, attribute] = tensor
        for tensor, names in tensors.items():
            found = [name for name in names if name in self._source]
            if not found:
                missing.append(names[0])
                continue
            self.names[tensor] = found
            for name in found:
                _check_kind(name, tensor, self._source)
        if missing:
            raise ValueError(
                f"prune_file: the source lacks {_some(missing)}; it has "
                f"{_some(self._source.names())}: the names must be those of the model's state_dict"
            )
        absent = {
            tensor: Hollow(tensor, self._device, partial(_absent, names[0]))
            for tensor, names in self.names.items()
        }
        for (module, attribute), tensor in owners.items():
            name = self.names[tensor][0]
            place = _Place(module, attribute, tensor, absent[tensor], name)
            self._places.setdefault(module, []).append(place)

    def _lend(self, places: list[_Place]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def lend(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            lent = [place for place in places if place.is_empty]
            self._lent[module].append(lent)
            for place in lent:
                tensor = self.read(place.source)
                place.put(tensor.to(self._device, place.absent.dtype))

        return lend

    def _take_back(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._lent[module]:
            for place in self._lent[module].pop():
                place.put(place.absent)


def _absent(name: str) -> Exception:
    return ValueError(
        f"prune_file: {name!r} was read while its module was not running: a module has its tensors "
        "only while it is called; what others read must be in memory before"
    )


def _check_transient(model: nn.Module, source: Checkpoint) -> None:
    """Tensors that no checkpoint has must be real."""
    lost = []
    for prefix, module in model.named_modules():
        own = {
            **{name: module._buffers[name] for name in module._non_persistent_buffers_set},
            **{name: value for name, value in vars(module).items() if isinstance(value, Tensor)},
        }
        names = {name: f"{prefix}.{name}" if prefix else name for name in own}
        lost += [
            names[name]
            for name, tensor in own.items()
            if tensor is not None and tensor.device.type == "meta" and names[name] not in source
        ]
    if lost:
        raise ValueError(
            f"prune_file: tensors on the meta device that no checkpoint holds: {_some(lost)}; "
            "after building the model, replace the modules that have them by ones built outside "
            "torch.device('meta'), or assign these tensors"
        )


def _check_kind(name: str, tensor: Tensor, source: Checkpoint) -> None:
    shape, dtype = source.shapes[name], source.dtypes[name]
    if shape != tuple(tensor.shape):
        raise ValueError(
            f"prune_file: the source has {name!r} with shape {list(shape)}, the model with "
            f"{list(tensor.shape)}"
        )
    # Narrower floats go with scales that this knows nothing of.
    if (tensor.dtype in _DTYPES.values()) != (dtype in _DTYPES):
        raise ValueError(
            f"prune_file: the source has {name!r} as {dtype}, the model as {tensor.dtype}; both "
            f"must be of {', '.join(_DTYPES)}, or neither"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
