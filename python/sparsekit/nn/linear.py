"""`SparseLinear`: an `nn.Linear` with a packed sparse weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.functional import linear_packed
from sparsekit.nn.packed import PackedModule, copied_bias
from sparsekit.pack import PackedWeight, pack
from sparsekit.patterns import PatternLike

# torch.fx.symbolic_trace records the call instead of looking into its checks.
torch.fx.wrap("linear_packed")


class SparseLinear(PackedModule):
    """`activation(x @ W.T + bias)` with a frozen, packed sparse weight `W[n, k]`.

    Stored, copied and moved as `sparsekit.nn.packed.PackedModule` says.

    Args:
        packed: the weight.
        bias: `[n]` of the weight's dtype, or None; becomes a parameter.
        activation: fused after the bias: None, "relu", "gelu", "gelu_tanh", "silu" or "relu6".

    Raises:
        ValueError: the weight is a convolution's, the bias does not fit it, or the activation is
            unknown.
    """

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None
    ) -> None:
        if packed.meta.filters is not None:
            raise ValueError(
                f"SparseLinear: the packed weight is a convolution's, {list(packed.shape)}; use "
                f"SparseConv{packed.meta.filters.dims}d"
            )
        super().__init__(packed, bias, activation)
        self.out_features, self.in_features = packed.matrix_shape

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        pattern: PatternLike = "2:4",
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> SparseLinear:
        """Pack the weight of a dense layer; the bias is copied.

        Args:
            linear: float32, bfloat16 or float16.
            pattern: what to keep. A weight that already fits is packed without change, another
                one keeps its largest magnitudes.
            mask: bool `[n, k]`, True = kept; overrides the choice by magnitude.
            activation: fused after the bias.

        Raises:
            ValueError: as `sparsekit.pack`.
        """
        packed = pack(linear.weight, pattern, mask)
        return cls(packed, copied_bias(linear), activation).train(linear.training)

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same weight and bias. It does not apply `activation`."""
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.packed_data.device,
            dtype=self.meta.dtype,
        )
        self._fill_dense(dense)
        return dense

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: `[..., in_features]`, of the weight's dtype (or under `torch.autocast`).
            residual: `[..., out_features]`, added after the activation.

        Returns:
            `[..., out_features]`.
        """
        return linear_packed(
            x,
            self.packed_data,
            self.out_features,
            self.in_features,
            self.meta.dtype,
            self.bias,
            self.activation,
            residual,
            self.meta.header,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self._packed_repr()}"
        )
