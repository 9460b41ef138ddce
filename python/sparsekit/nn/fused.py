"""What stands where a module stood whose work the layer before it does now."""

from __future__ import annotations

from torch import Tensor, nn


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


class FoldedBatchNorm(nn.Identity):
    """Passes its input through; weight and bias of the layer before it hold the normalisation.

    Args:
        act: what the module that was here did after normalising, or None.
    """

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        if act is not None:
            self.act = act

    @classmethod
    def in_place_of(cls, module: nn.Module) -> FoldedBatchNorm:
        """What takes the place of a batch normalisation, or of one folded before."""
        return cls(module._modules.get("act")).train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        act = self._modules.get("act")
        y: Tensor = input if act is None else act(input)
        return y
