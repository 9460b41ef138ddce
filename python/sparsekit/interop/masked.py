"""Packages that keep a mask beside a dense weight: ASP and `torch.nn.utils.prune`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsekit.interop.imported import Imported, State, add_mask, checked_mask, joined, masked

_ASP_BUFFER = re.compile(r"__(.+)_mma_(mask|pruned_p)")


def _split(name: str) -> tuple[str, str]:
    layer, _, last = name.rpartition(".")
    return layer, last


# --- ASP --------------------------------------------------------------------------------------


def from_asp(model_or_state: nn.Module | State) -> Imported:
    """Read what NVIDIA's ASP (apex.contrib.sparsity) pruned.

    ASP keeps a buffer `__weight_mma_mask` beside each weight and, where masks may be computed anew,
    the pruned values as `__weight_mma_pruned_p`. The masks are applied, the buffers dropped; a mask
    that keeps everything (ASP before `compute_sparse_masks`) prunes nothing. apex is not needed.

    Args:
        model_or_state: a model, which is changed in place, or its state dict, which is not.

    Raises:
        ValueError: a mask belongs to no parameter or has another shape or values; a model is then
            unchanged.
    """
    if not isinstance(model_or_state, nn.Module):
        return _asp_state(model_or_state)
    masks: dict[str, Tensor] = {}
    changes: list[tuple[nn.Module, str, Tensor | None]] = []
    for layer, module in model_or_state.named_modules():
        for buffer, mask in module._buffers.items():
            if not (found := _ASP_BUFFER.fullmatch(buffer)):
                continue
            keep = None
            if found[2] == "mask" and mask is not None:
                name = joined(layer, found[1])
                weight = module._parameters.get(found[1])
                keep = checked_mask("from_asp", name, mask, weight)
                add_mask(masks, name, keep)
            changes.append((module, buffer, keep))
    with torch.no_grad():
        for module, buffer, keep in changes:
            if keep is not None:
                parameter = module._parameters[_ASP_BUFFER.fullmatch(buffer)[1]]  # type: ignore[index]
                assert parameter is not None
                parameter.masked_fill_(~keep, 0)
            delattr(module, buffer)
    return Imported(dict(model_or_state.state_dict()), masks)


def _asp_state(state: State) -> Imported:
    plain, masks = dict(state), dict[str, Tensor]()
    for name, mask in state.items():
        layer, last = _split(name)
        if not (found := _ASP_BUFFER.fullmatch(last)):
            continue
        del plain[name]
        if found[2] == "mask":
            weight = joined(layer, found[1])
            keep = checked_mask("from_asp", weight, mask, state.get(weight))
            plain[weight] = masked(state[weight], keep)
            add_mask(masks, weight, keep)
    return Imported(plain, masks)


# --- torch.nn.utils.prune ---------------------------------------------------------------------


def from_torch_prune(model_or_state: nn.Module | State) -> Imported:
    """Make what `torch.nn.utils.prune` pruned permanent.

    A pruned parameter `weight` is kept there as `weight_orig` and `weight_mask`. The product takes
    its place under its own name, and the hooks go.

    Args:
        model_or_state: a model, which is changed in place, or its state dict, which is not.

    Raises:
        ValueError: a mask has another shape than its weight, or values other than 0 and 1; a model
            is then unchanged.
    """
    if not isinstance(model_or_state, nn.Module):
        return _torch_prune_state(model_or_state)
    masks: dict[str, Tensor] = {}
    pruned = []
    for layer, module in model_or_state.named_modules():
        for parameter in _pruned_parameters(module):
            name = joined(layer, parameter)
            mask = module._buffers.get(f"{parameter}_mask")
            original = module._parameters.get(f"{parameter}_orig")
            if mask is None:
                raise ValueError(f"from_torch_prune: {name!r} has a hook that prunes and no mask")
            keep = checked_mask("from_torch_prune", name, mask, original)
            add_mask(masks, name, keep)
            pruned.append((module, parameter, keep))
    for module, parameter, keep in pruned:
        torch_prune.remove(module, parameter)
        with torch.no_grad():
            getattr(module, parameter).masked_fill_(~keep, 0)
    return Imported(dict(model_or_state.state_dict()), masks)


def _pruned_parameters(module: nn.Module) -> Iterator[str]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, torch_prune.BasePruningMethod):
            yield hook._tensor_name


def _torch_prune_state(state: State) -> Imported:
    plain, masks = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in state.items():
        parameter = name.removesuffix("_orig")
        # Other packages call something `_orig` or `_mask` too; the pair is what says it is this.
        if name != parameter and f"{parameter}_mask" in state:
            if parameter in state:
                raise ValueError(
                    f"from_torch_prune: there are both {parameter!r} and {name!r}, which would "
                    "take its name"
                )
            keep = checked_mask("from_torch_prune", parameter, state[f"{parameter}_mask"], tensor)
            plain[parameter] = masked(tensor, keep)
            add_mask(masks, parameter, keep)
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            plain[name] = tensor
    return Imported(plain, masks)


def to_torch_prune(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Give the masks to `torch.nn.utils.prune`, whose hooks then hold them.

    Args:
        model: changed in place.
        masks: layer name -> bool of its weight's shape, True = kept; `PruneReport.masks`.

    Raises:
        ValueError: a mask names no layer with a weight of its shape; the model is then unchanged.
    """
    layers = []
    for name, mask in masks.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"to_torch_prune: the model has no layer {name!r}") from None
        weight = module._parameters.get("weight")
        layers.append(
            (module, checked_mask("to_torch_prune", joined(name, "weight"), mask, weight))
        )
    for module, keep in layers:
        torch_prune.custom_from_mask(module, "weight", keep)
