"""Which layers are pruned, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekit.patterns import (
    Pattern,
    PatternChoice,
    require_match,
    resolve_pattern,
    select_modules,
)
from sparsekit.prune.layers import PRUNABLE, Layer, Prunable, groups_of

STEM_CHANNELS = 8
"""Convolutions that read fewer channels stay dense unless `targets` names them."""


def choose_layers(
    model: nn.Module,
    pattern: PatternChoice,
    targets: str | Sequence[str] | None,
    ignore: str | Sequence[str] | None,
) -> tuple[dict[str, tuple[Layer, Pattern]], dict[str, tuple[Prunable, str]]]:
    """Sort the chosen linear layers and convolutions into those to prune and those that stay dense.

    Layers that share one weight are one `Layer` under the first name.

    Returns:
        (name -> layer and pattern, name -> module and reason why it stays dense).

    Raises:
        ValueError: no layer matches, or a name in the mapping or `targets` matches none.
    """
    found = [
        (name, module)
        for name, module in select_modules(model, targets, ignore, PRUNABLE)
        if isinstance(module, PRUNABLE)
    ]
    if isinstance(pattern, Mapping):
        require_match(pattern, [name for name, _ in found], "pattern")
    if not found:
        raise ValueError(
            "prune: the model has no nn.Linear, nn.Conv1d or nn.Conv2d that targets and ignore "
            "leave to prune; check both expressions"
        )
    readers = _readers(model)
    chosen: dict[str, tuple[Layer, Pattern]] = {}
    dense: dict[str, tuple[Prunable, str]] = {}
    first: dict[Tensor, str] = {}
    for name, module in found:
        wanted = resolve_pattern(name, pattern)
        if wanted is None:
            continue
        reason = _stays_dense(module, readers)
        if reason is None and not isinstance(module, nn.Linear):
            reason = _filters_stay_dense(module, wanted, named=targets is not None)
        if reason is not None:
            dense[name] = (module, reason)
        elif module.weight in first:
            owner = first[module.weight]
            if groups_of(module) == chosen[owner][0].groups:  # else its statistics do not add up
                chosen[owner][0].modules.append(module)
            dense[name] = (module, f"shares its weight with {owner}: pruned there")
        else:
            first[module.weight] = name
            chosen[name] = (Layer(name, [module]), wanted)
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, (_, reason) in list(dense.items())[:5])
        raise ValueError(f"prune: no layer can be pruned ({why or 'the pattern leaves all dense'})")
    return chosen, dense


def _readers(model: nn.Module) -> dict[Tensor | nn.Module, str]:
    """Weights and modules that somebody else than a layer's own forward reads, and who."""
    out: dict[Tensor | nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            out[module.out_proj] = f"nn.MultiheadAttention {name!r} reads the weight itself"
        elif isinstance(module, nn.TransformerEncoderLayer):
            reason = f"nn.TransformerEncoderLayer {name!r} reads the weight in its fused path"
            out[module.linear1] = out[module.linear2] = reason
        elif not isinstance(module, PRUNABLE):
            for _, parameter in module.named_parameters(recurse=False):
                kind = type(module).__name__
                out[parameter] = f"the weight is tied to {kind} {name!r}, which would change too"
    return out


def _stays_dense(module: Prunable, readers: Mapping[Tensor | nn.Module, str]) -> str | None:
    if module in readers:
        return readers[module]
    if parametrize.is_parametrized(module):
        return "its weight is parametrised: remove the parametrisation first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters: make it permanent first"
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        return f"it is quantised already ({type(weight.data).__name__}, {weight.dtype})"
    return readers.get(module.weight)


def _filters_stay_dense(conv: nn.Conv1d | nn.Conv2d, pattern: Pattern, named: bool) -> str | None:
    kind = nn.Conv1d if isinstance(conv, nn.Conv1d) else nn.Conv2d
    if (type(conv).forward, type(conv)._conv_forward) != (kind.forward, kind._conv_forward):
        return f"{type(conv).__name__} computes in its own way: what it does with zeros is unknown"
    filters, channels = conv.weight.shape[:2]
    if channels == 1:
        return "a filter reads one input channel (depthwise): there is nothing to choose among"
    if channels < STEM_CHANNELS and not named:
        return (
            f"a filter reads {channels} input channels, fewer than {STEM_CHANNELS}: too few to "
            "gain from it; targets= naming the layer prunes it all the same"
        )
    if conv.groups > 1 and filters // conv.groups % pattern.row_tile:
        return (
            f"its groups of {filters // conv.groups} filters cannot be cut into whole tiles of "
            f"{pattern.row_tile} rows ({pattern})"
        )
    return None
