"""What a model does with example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def run_examples(model: nn.Module, example_inputs: Any) -> None:
    """Forward passes in eval mode and without gradients; the modules' modes are kept.

    Args:
        model: what to run.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments,
            or a list of these, one for each pass.
    """
    examples = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            for example in examples:
                if isinstance(example, Mapping):
                    model(**example)
                elif isinstance(example, tuple):
                    model(*example)
                else:
                    model(example)
    finally:
        for module, mode in modes:
            module.training = mode
