"""What stands where an activation stood that a sparse layer now applies itself."""

from __future__ import annotations

from torch import nn


class FusedActivation(nn.Identity):
    """Passes its input through; the layer before it applies the activation.

    Args:
        activation: the activation that was here, e.g. `"gelu"`.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def extra_repr(self) -> str:
        return self.activation
