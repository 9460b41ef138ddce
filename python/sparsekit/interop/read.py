"""One reader for everything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekit.interop.bitmask import from_compressed_tensors
from sparsekit.interop.imported import Imported, State, add_mask, joined
from sparsekit.interop.masked import from_asp, from_torch_prune
from sparsekit.interop.torch_sparse import is_sparse, to_dense


def read(source: nn.Module | State | str | Path) -> Imported:
    """Plain weights and masks of whatever pruned or packed a model before.

    Knows ASP's masks, `torch.nn.utils.prune`, torch's sparse tensors and the bitmask formats of
    compressed-tensors, also several of them in one model; what is none of them stays as it is. Then
    `sparsekit.convert` finds the patterns in the zeros::

        masks = sk.interop.read(model).masks
        sk.convert(model, example_inputs=x)

    Args:
        source: a model, which is changed in place; a state dict, which is not; or a safetensors
            file or a folder of them.

    Raises:
        ValueError: contents that do not fit together; the message names the parameter.
        NotImplementedError: a tensor in cuSPARSELt's layout on a CPU.
        OSError: a file cannot be read.
    """
    if isinstance(source, nn.Module):
        masks = _dense_parameters(source)
        for reader in (from_torch_prune, from_asp):
            _join(masks, reader(source).masks)
        return Imported(dict(source.state_dict()), masks)
    imported = from_compressed_tensors(source)
    state, masks = _dense_state(imported.state)
    _join(masks, imported.masks)
    for reader in (from_torch_prune, from_asp):
        imported = reader(state)
        state = imported.state
        _join(masks, imported.masks)
    return Imported(state, masks)


def _join(masks: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for layer, mask in more.items():
        add_mask(masks, joined(layer, "weight"), mask)


def _dense_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Make a model's sparse parameters dense; their masks."""
    masks: dict[str, Tensor] = {}
    found: list[tuple[nn.Module, str, nn.Parameter]] = []
    dense: dict[int, tuple[nn.Parameter, Tensor]] = {}  # tied ones stay tied
    for layer, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_sparse(parameter):
                continue
            if id(parameter) not in dense:
                weight, mask = _dense(joined(layer, name), parameter)
                dense[id(parameter)] = nn.Parameter(weight, parameter.requires_grad), mask
            add_mask(masks, joined(layer, name), dense[id(parameter)][1])
            found.append((module, name, dense[id(parameter)][0]))
    for module, name, parameter in found:
        module._parameters[name] = parameter
    return masks


def _dense_state(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    plain, masks = dict(state), dict[str, Tensor]()
    for name, tensor in state.items():
        if is_sparse(tensor):
            plain[name], mask = _dense(name, tensor)
            add_mask(masks, name, mask)
    return plain, masks


def _dense(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    try:
        with torch.no_grad():
            return to_dense(tensor)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
