"""Folding of batch normalisation into the layer before it.

In eval mode `(y - mean) / sqrt(var + eps) * gamma + beta` is one factor and one summand for each
output channel, which the layer's weight and bias can take: exact algebra, rounded once. Zeros stay
zeros, so the weight keeps its pattern. A folded model cannot be trained on: the statistics are
gone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module normalises by batch statistics and, at most, applies its `act` afterwards.

    A subclass of `nn.BatchNorm2d` with exactly the children `drop` and `act`, of which `drop` does
    nothing, is taken for one (timm's `BatchNormAct2d`); `fold` tries whether it is.
    """
    if type(module) in _PLAIN:
        return True
    children = module._modules
    return (
        isinstance(module, nn.BatchNorm2d)
        and children.keys() == {"drop", "act"}
        and type(children["drop"]) is nn.Identity
    )


def fold(layer: nn.Module, batchnorm: nn.Module) -> str:
    """Fold a batch normalisation into the layer before it, or say why that cannot be.

    Args:
        layer: an `nn.Linear`, `nn.Conv1d` or `nn.Conv2d`. Its parameters stay the objects they
            were; a bias may be added.
        batchnorm: what `is_batchnorm` takes, called with the layer's output alone.

    Returns:
        "" or why the layer was left as it was, to be said of the batch normalisation.
    """
    assert isinstance(batchnorm, nn.modules.batchnorm._BatchNorm)
    if batchnorm.training:
        return "is in training mode; call model.eval() first"
    if batchnorm.running_mean is None or batchnorm.running_var is None:
        return "has no running statistics"
    if type(batchnorm) not in _PLAIN and not _acts_last(batchnorm):
        return f"is a {type(batchnorm).__qualname__}, which does something else"
    weight, bias = _folded(layer, batchnorm)
    if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all())):
        return f"gives weights that are not finite in {weight.dtype}"
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight.data = weight
    if isinstance(layer.bias, nn.Parameter):
        layer.bias.data = bias
    else:
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    return ""


@torch.no_grad()
def _acts_last(batchnorm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether a subclass computes `act` of the normalised input, tried on numbers."""
    mean, act = batchnorm.running_mean, batchnorm._modules["act"]
    assert mean is not None
    assert act is not None
    spread = torch.linspace(-3, 3, 8, device=mean.device, dtype=mean.dtype)
    x = mean[:, None, None] + spread.view(2, 1, 2, 2)
    expected = act(nn.BatchNorm2d.forward(batchnorm, x))
    found = batchnorm(x)
    return isinstance(found, Tensor) and torch.equal(found, expected)


@torch.no_grad()
def _folded(layer: nn.Module, batchnorm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """The new weight and bias, in the weight's dtype; computed in float64."""
    weight, bias = layer.weight, layer.bias
    mean, var = batchnorm.running_mean, batchnorm.running_var
    assert isinstance(weight, Tensor)
    assert mean is not None
    assert var is not None
    scale = (var.double() + batchnorm.eps).rsqrt()
    if batchnorm.weight is not None:
        scale = scale * batchnorm.weight.double()
    shift = -mean.double() * scale
    if isinstance(bias, Tensor):
        shift = shift + bias.double() * scale
    if batchnorm.bias is not None:
        shift = shift + batchnorm.bias.double()
    scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)
