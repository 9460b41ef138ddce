"""One run of a model that finds out which channels may change places.

Real tensors go through the real operations, below autograd and below every Python construct, so
that there is no graph to trace and nothing a model may not do: `rules` say what each operation
means for the order of the channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sparsekit.prune.permutation import views  # registers its rules
from sparsekit.prune.permutation.freedom import Atoms, Freedom, Ledger
from sparsekit.prune.permutation.rules import MADE, RULES, Call, Label, outputs, pointwise, unknown

del views


@dataclasses.dataclass
class Dimension:
    """A dimension of a parameter or buffer: which atom stands at each position."""

    tensor: Tensor
    axis: int
    atoms: Atoms


class Trace(TorchDispatchMode):
    """While it is on, labels every tensor that a parameter or buffer of the model goes into."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.dimensions: dict[str, list[Dimension]] = {}
        self._labels = WeakTensorKeyDictionary()
        self._unseen: dict[int, str] = {}
        self._storages: dict[int, list[str]] = {}
        saved = model.state_dict(keep_vars=True).keys()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.dim() == 0:
                continue
            label = [None if size == 1 else self.ledger.fresh(size) for size in tensor.shape]
            self.dimensions[name] = [
                Dimension(tensor, axis, atoms)
                for axis, atoms in enumerate(label)
                if atoms is not None
            ]
            self._labels[tensor] = [
                atoms
                if atoms is None
                else atoms.reshape([-1 if a == axis else 1 for a in range(tensor.dim())])
                for axis, atoms in enumerate(label)
            ]
            self._unseen[id(tensor)] = name
            if name not in saved:
                self._freeze_state(name, f"{name} is made anew whenever the model is loaded")
            if type(tensor.data) is not Tensor:
                self._freeze_state(name, f"{name} is quantised, or a tensor of a class of its own")
            else:
                self._storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
        for names in self._storages.values():
            for name in names if len(names) > 1 else []:
                self._freeze_state(name, f"{' and '.join(names)} share memory")

    def fix(self, value: Any, what: str) -> None:
        """Whatever inputs or outputs of the model hold keeps its order."""
        for path, tensor in tensors_in(value):
            reason = f"{what}{path} keeps its order"
            for entry in self._label(tensor):
                if not isinstance(entry, str | None):
                    self.ledger.freeze(entry, reason)
            self._labels[tensor] = [None if size == 1 else reason for size in tensor.shape]

    def freedom(self) -> Freedom:
        """What may change places, after the run."""
        for name in self._unseen.values():
            self._freeze_state(name, f"nothing in the example run reads {name}")
        for dimensions in self.dimensions.values():
            for dimension in dimensions:
                self.ledger.part(dimension.atoms, dimension.atoms * 0)
        return Freedom.solve(self.ledger)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        rule = self._rule(func, name)
        if rule is unknown:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        call = Call(str(func), _arguments(func, args, kwargs), self.ledger, self._label)
        call.output = func(*args, **kwargs)
        found = outputs(call.output)
        labels = rule(call)
        if len(found) == 1 and not (labels and isinstance(labels[0], list)):
            labels = [labels]
        for tensor, label in zip(found, labels, strict=True):
            assert len(label) == tensor.dim(), (name, label)
            self._labels[tensor] = [
                None if size == 1 else entry
                for size, entry in zip(tensor.shape, label, strict=True)
            ]
        return call.output

    def _rule(self, func: Any, name: str) -> Callable[[Call], Any]:
        # What is written to `out=` may be seen through other views of that memory.
        into = any(one.kwarg_only and one.is_out for one in func._schema.arguments)
        if func.namespace != "aten" or into:
            return unknown
        base = name[:-1] if name.endswith("_") and name not in RULES else name
        if base in RULES:
            return RULES[base]
        return pointwise if torch.Tag.pointwise in func.tags else unknown

    def _label(self, tensor: Tensor) -> Label:
        self._unseen.pop(id(tensor), None)
        if tensor in self._labels:
            return self._labels[tensor]
        if type(tensor) is Tensor and tensor.device.type != "meta":
            # A view made behind the dispatcher's back, as `.data` is.
            for name in self._storages.get(tensor.untyped_storage().data_ptr(), ()):
                self._freeze_state(name, f"the model reads the memory of {name} itself")
        return [None if size == 1 else MADE for size in tensor.shape]

    def _freeze_state(self, name: str, reason: str) -> None:
        for dimension in self.dimensions[name]:
            self.ledger.freeze(dimension.atoms, reason)


def _arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by name, with its defaults."""
    schema = func._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)
    return {one.name: given.get(one.name, one.default_value) for one in schema}


def tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds, and how to get there."""
    seen: set[int] = set()

    def walk(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield path, value
            return
        if id(value) in seen or isinstance(value, str | bytes | type | nn.Module):
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            inside = [(f"[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            inside = [(f"[{index}]", item) for index, item in enumerate(value)]
        else:
            inside = [(f".{key}", item) for key, item in getattr(value, "__dict__", {}).items()]
        for step, item in inside:
            yield from walk(item, path + step)

    yield from walk(value, "")
