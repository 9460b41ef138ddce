"""How large the inputs of sparse layers get, for int8.

The scale of a layer's input comes from the largest magnitude seen in the calibration data. It never
clips what was seen, so that an export needs no choice of a percentile to be right; where single
outliers make the steps too coarse, calibrate on data without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsekit.examples import run_examples
from sparsekit.nn import PackedModule


def input_ranges(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Any]
) -> dict[str, float]:
    """The largest magnitude in the inputs of layers.

    Args:
        model: runs in eval mode; hooks of its own do what they do.
        layers: names of sparse modules.
        batches: each a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ValueError: a name that is no sparse module's, one that never ran, or an input that is not
            finite.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in layers:
        if not isinstance(modules.get(layer), PackedModule):
            raise ValueError(
                f"export: int8 needs the range of the input of {layer!r}, which is no module; make "
                "it one (sparsekit.nn), or export without quantize"
            )
    largest: dict[nn.Module, float] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["x"]
        if x.numel():
            found = float(x.detach().abs().max())
            # max() would lose a NaN.
            largest[module] = max(largest.get(module, 0.0), math.inf if found != found else found)

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in {modules[layer] for layer in layers}
    ]
    try:
        for batch in batches:
            run_examples(model, [batch])
    finally:
        for handle in handles:
            handle.remove()
    ranges = {}
    for layer in layers:
        found = largest.get(modules[layer])
        if found is None:
            raise ValueError(
                f"export: {layer!r} did not run on the calibration data; pass inputs that reach it"
            )
        if not math.isfinite(found):
            raise ValueError(
                f"export: the input of {layer!r} is not finite on the calibration data"
            )
        ranges[layer] = found
    return ranges
