"""`SparseConv1d` and `SparseConv2d`: convolutions with packed sparse filters."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsekit.functional import Padding, Pair, conv_geometry, conv_packed
from sparsekit.nn.packed import PackedModule, copied_bias
from sparsekit.pack import PackedWeight, pack
from sparsekit.patterns import PatternLike

# torch.fx.symbolic_trace records the call instead of looking into its checks.
torch.fx.wrap("conv_packed")

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_Self = TypeVar("_Self", bound="_SparseConv")


class _SparseConv(PackedModule):
    """What the two have in common."""

    dims: ClassVar[int]
    _dense: ClassVar[Any]

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        padding_mode: str = "zeros",
        activation: str | None = None,
    ) -> None:
        name, filters = type(self).__name__, packed.meta.filters
        if filters is None or filters.dims != self.dims:
            raise ValueError(
                f"{name}: expected a weight packed from a conv{self.dims}d, got {packed}"
            )
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"{name}: expected padding_mode to be one of {PADDING_MODES}, got {padding_mode!r}"
            )
        super().__init__(packed, bias, activation)
        self.in_channels = filters.in_channels * filters.groups
        self.out_channels = filters.out_channels
        self.groups = filters.groups
        self.kernel_size = filters.kernel_size[2 - self.dims :]
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.padding_mode = padding_mode
        self._geometry = conv_geometry(filters, stride, padding, dilation)

    @classmethod
    def from_dense(
        cls: type[_Self],
        conv: Any,
        pattern: PatternLike = "2:4",
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> _Self:
        """Pack the weight of a dense layer; the bias is copied.

        Args:
            conv: float32, bfloat16 or float16, with at least two input channels in each group.
            pattern: what to keep, along the input channels (`sparsekit.filters`). A weight that
                already fits is packed without change, another one keeps its largest magnitudes.
            mask: bool, of the weight's shape, True = kept; overrides the choice by magnitude.
            activation: fused after the bias.

        Raises:
            ValueError: as `sparsekit.pack`, or another kind of layer.
        """
        if not isinstance(conv, cls._dense):
            raise ValueError(
                f"{cls.__name__}: expected an nn.{cls._dense.__name__}, got a {type(conv).__name__}"
            )
        packed = pack(conv.weight, pattern, mask, groups=conv.groups)
        return cls(
            packed,
            copied_bias(conv),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.padding_mode,
            activation,
        ).train(conv.training)

    def to_dense(self) -> Any:
        """The dense layer with the same weight and bias. It does not apply `activation`."""
        dense = self._dense(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device=self.packed_data.device,
            dtype=self.meta.dtype,
        )
        self._fill_dense(dense)
        return dense

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_first: bool = False
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: `[N, in_channels, ...]` or one image, of the weight's dtype (or under
                `torch.autocast`), at best with its channels side by side.
            residual: of the shape of the result.
            residual_first: the residual is added before the activation instead of after it.

        Returns:
            `[N, out_channels, ...]`, its channels side by side.
        """
        return conv_packed(
            **self.arguments(x),
            activation=self.activation,
            residual=residual,
            residual_first=residual_first,
        )

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """Arguments of `sparsekit.functional.conv_packed`: all but what follows the bias."""
        stride, padding, dilation = self._geometry
        filters = self.meta.filters
        assert filters is not None
        if self.padding_mode != "zeros":
            top, left, bottom, right = padding
            sides = (left, right, top, bottom)[: 2 * self.dims]
            x = functional.pad(x, sides, mode=self.padding_mode)
            padding = (0, 0, 0, 0)
        return {
            "x": x,
            "data": self.packed_data,
            "filters": filters,
            "k": self.meta.shape[1],
            "dtype": self.meta.dtype,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "bias": self.bias,
            "header": self.meta.header,
        }

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, {self._packed_repr()}"
        )
        return text if self.padding_mode == "zeros" else f"{text}, {self.padding_mode}"


class SparseConv2d(_SparseConv):
    """`activation(conv2d(x, W) + bias)` with frozen, packed sparse filters.

    The result is `channels_last`; give it such an x to save a conversion. Stored, copied and moved
    as `sparsekit.nn.packed.PackedModule` says.

    Args:
        packed: the filters, with their groups.
        bias: `[out_channels]` of the weight's dtype, or None; becomes a parameter.
        stride: as in `sparsekit.conv2d`.
        padding: as in `sparsekit.conv2d`.
        dilation: as in `sparsekit.conv2d`.
        padding_mode: as in `torch.nn.Conv2d`; all but "zeros" pad x first, which costs a copy.
        activation: fused after the bias: None, "relu", "gelu", "gelu_tanh", "silu" or "relu6".

    Raises:
        ValueError: an argument that is wrong or does not fit the weight.
    """

    dims = 2
    _dense = nn.Conv2d


class SparseConv1d(_SparseConv):
    """`SparseConv2d` for `[N, in_channels, L]`."""

    dims = 1
    _dense = nn.Conv1d
