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
from sparsekit.prune.calibration import Layer


def choose_layers(
    model: nn.Module,
    pattern: PatternChoice,
    targets: str | Sequence[str] | None,
    ignore: str | Sequence[str] | None,
) -> tuple[dict[str, tuple[Layer, Pattern]], dict[str, tuple[nn.Linear, str]]]:
    """Sort the chosen linear layers into those to prune and those that stay dense.

    Layers that share one weight are one `Layer` under the first name.

    Returns:
        (name -> layer and pattern, name -> module and reason why it stays dense).

    Raises:
        ValueError: no layer matches, or a name in the mapping or `targets` matches none.
    """
    found = [
        (name, module)
        for name, module in select_modules(model, targets, ignore, (nn.Linear,))
        if isinstance(module, nn.Linear)
    ]
    if isinstance(pattern, Mapping):
        require_match(pattern, [name for name, _ in found], "pattern")
    if not found:
        raise ValueError(
            "prune: the model has no nn.Linear that targets and ignore leave to prune; "
            "check both expressions"
        )
    readers = _readers(model)
    chosen: dict[str, tuple[Layer, Pattern]] = {}
    dense: dict[str, tuple[nn.Linear, str]] = {}
    first: dict[Tensor, str] = {}
    for name, module in found:
        wanted = resolve_pattern(name, pattern)
        if wanted is None:
            continue
        reason = _stays_dense(module, readers)
        if reason is not None:
            dense[name] = (module, reason)
        elif module.weight in first:
            owner = first[module.weight]
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
    """Weights and modules that somebody else than a Linear's own forward reads, and who."""
    out: dict[Tensor | nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            out[module.out_proj] = f"nn.MultiheadAttention {name!r} reads the weight itself"
        elif isinstance(module, nn.TransformerEncoderLayer):
            reason = f"nn.TransformerEncoderLayer {name!r} reads the weight in its fused path"
            out[module.linear1] = out[module.linear2] = reason
        elif not isinstance(module, nn.Linear):
            for _, parameter in module.named_parameters(recurse=False):
                kind = type(module).__name__
                out[parameter] = f"the weight is tied to {kind} {name!r}, which would change too"
    return out


def _stays_dense(module: nn.Linear, readers: Mapping[Tensor | nn.Module, str]) -> str | None:
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
