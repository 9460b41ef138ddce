"""How large the inputs of sparse layers get, for int8.

The scale of a layer's input comes from the largest magnitude seen in the calibration data. It never
clips what was seen, so that an export needs no choice of a percentile to be right; where single
outliers make the steps too coarse, calibrate on data without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sparsekit.examples import run_examples


def input_ranges(
    model: nn.Module, layers: Mapping[str, nn.Module | None], batches: Iterable[Any]
) -> dict[str, float]:
    """The largest magnitude in the inputs of layers.

    Args:
        model: runs in eval mode; hooks of its own do what they do.
        layers: by the names of the calls, None for one that is no module's.
        batches: each a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ValueError: a call that is no module's, a layer that never ran, or an input that is not
            finite.
    """
    for name, module in layers.items():
        if module is None:
            raise ValueError(
                f"export: int8 needs the range of the input of {name!r}, which is no module; make "
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
        for module in set(layers.values())
        if module is not None
    ]
    try:
        for batch in batches:
            run_examples(model, [batch])
    finally:
        for handle in handles:
            handle.remove()
    ranges = {}
    for layer, module in layers.items():
        found = None if module is None else largest.get(module)
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
