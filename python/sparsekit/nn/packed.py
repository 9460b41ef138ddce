"""What the sparse modules share: a frozen packed weight, and how it is stored, copied and moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsekit import _native
from sparsekit._ops import ACTIVATIONS
from sparsekit.pack import PackedMeta, PackedWeight

_CANONICAL = ("values", "indices", "crow_indices")
_Self = TypeVar("_Self", bound="PackedModule")


class PackedModule(nn.Module):
    """A module with a packed sparse weight, a bias and a fused activation.

    `state_dict()` holds the canonical tensors (`values`, `indices`, for blocks `crow_indices`), so
    it loads on any machine; the packed bytes are a non-persistent buffer, `packed_data`. Copies
    and pickles go through the canonical form too. Gradients flow to the input and the bias.

    Args:
        packed: the weight.
        bias: one number for each row of the weight, of its dtype, or None; becomes a parameter.
        activation: fused after the bias: None, "relu", "gelu", "gelu_tanh", "silu" or "relu6".

    Raises:
        ValueError: the bias does not fit the weight, or the activation is unknown.
    """

    packed_data: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{name}: unknown activation {activation!r}; expected one of {ACTIVATIONS}"
            )
        self.activation = activation
        self.meta: PackedMeta = packed.meta
        self.register_buffer("packed_data", packed.data, persistent=False)
        if bias is None:
            self.register_parameter("bias", None)
            return
        rows = packed.shape[0]
        if bias.shape != (rows,) or bias.dtype != packed.dtype:
            raise ValueError(
                f"{name}: expected a bias of shape [{rows}] and dtype "
                f"{packed.dtype}, got {list(bias.shape)} and {bias.dtype}"
            )
        self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight (shares its bytes with the module)."""
        return PackedWeight(self.packed_data, self.meta)

    def _fill_dense(self, dense: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
        """Give a dense layer of this one's sizes its weight, bias and mode."""
        with torch.no_grad():
            dense.weight.copy_(self.packed.to_dense())
            if self.bias is not None:
                assert dense.bias is not None
                dense.bias.copy_(self.bias)
        dense.train(self.training)

    def _packed_repr(self) -> str:
        text = (
            f"bias={self.bias is not None}, pattern={self.meta.pattern}, "
            f"format={self.meta.format}, dtype={self.meta.dtype}"
        )
        return text if self.activation is None else f"{text}, activation={self.activation}"

    def load_canonical(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weight by canonical tensors of the same pattern, shape and dtype.

        Args:
            tensors: `values`, `indices` and, for block patterns, `crow_indices`.

        Raises:
            ValueError: sizes or indices that do not belong to this layer; nothing is changed.
        """
        self._set_packed(self._packed_from(tensors))

    def _packed_from(self, tensors: Mapping[str, Tensor]) -> PackedWeight:
        values = tensors["values"]
        if not values.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: expected floating-point values, got {values.dtype}"
            )
        canonical = _native.Canonical(
            pattern=self.meta.pattern,
            shape=self.meta.shape,
            dtype=self.meta.dtype,
            # As for any module, what is loaded takes the module's dtype.
            values=values.detach().cpu().to(self.meta.dtype).contiguous(),
            indices=tensors["indices"].detach().cpu().contiguous(),
            crow_indices=(
                tensors["crow_indices"].detach().cpu().contiguous()
                if self.meta.pattern.family == "bsr"
                else None
            ),
        )
        _native.validate(canonical)
        if not bool(canonical.values.isfinite().all()):
            raise ValueError(f"{type(self).__name__}: the values hold a NaN or an infinity")
        return PackedWeight.from_canonical(
            canonical, self.meta.target, self.packed_data.device, self.meta.filters
        )

    def _set_packed(self, packed: PackedWeight) -> None:
        self.packed_data = packed.data
        self.meta = packed.meta

    # --- state_dict: canonical tensors instead of packed bytes ---

    def _canonical_names(self) -> tuple[str, ...]:
        return _CANONICAL if self.meta.pattern.family == "bsr" else _CANONICAL[:2]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        canonical = self.packed.canonical()
        for name in self._canonical_names():
            destination[prefix + name] = getattr(canonical, name)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]]["pattern"] = str(self.meta.pattern)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = self._canonical_names()
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = {prefix + name for name in names}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
        missing_keys.extend(prefix + name for name in names if name not in found)
        if len(found) < len(names):
            return
        pattern = local_metadata.get("pattern", str(self.meta.pattern))
        try:
            if _stored_as(pattern) != _stored_as(str(self.meta.pattern)):
                raise ValueError(
                    f"the state has pattern {pattern}, the module {self.meta.pattern}; "
                    "convert the model with the same pattern"
                )
            self.load_canonical(found)
        except ValueError as error:
            error_msgs.append(f"While loading {prefix}values: {error}")

    # --- copies and pickles: canonical form instead of packed bytes ---

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {
            name: buffer for name, buffer in self._buffers.items() if name != "packed_data"
        }
        state["_packed"] = self.packed
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        packed: PackedWeight = state.pop("_packed")
        super().__setstate__(state)
        self.register_buffer("packed_data", packed.data, persistent=False)
        self.meta = packed.meta

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        # What fn does to a tensor of the weight's dtype says what the weight should become; bytes
        # that stay as they are get what fn does to them, e.g. shared memory.
        probe = fn(torch.empty(0, dtype=self.meta.dtype, device=self.packed_data.device))
        packed = self.packed
        moved = packed.to(probe.device, probe.dtype)
        super()._apply(fn, recurse)
        if moved.data is not packed.data:
            self._set_packed(moved)
        elif self.packed_data.dtype != torch.uint8:  # fn casts everything, as Module.type does
            self.packed_data = packed.data
        return self


def _stored_as(pattern: str) -> str:
    """The part of a pattern's spelling that decides the layout: blocks without their sparsity."""
    return pattern.partition("@")[0]


def copied_bias(dense: nn.Linear | nn.Conv1d | nn.Conv2d) -> nn.Parameter | None:
    """A bias of its own for the sparse layer that is made from a dense one."""
    if dense.bias is None:
        return None
    return nn.Parameter(dense.bias.detach().clone(), dense.bias.requires_grad)
