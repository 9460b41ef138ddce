"""SynFlow: pruning without data, by what flows through each weight of a linearised network.

Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving synaptic
flow" (arXiv 2006.05467). Every parameter is replaced by its absolute value, activations by the
identity, and the input by ones; with R the sum of the outputs, a weight scores `|w · ∂R/∂w|`. The
scores of a layer then add up to R for every layer that all of the signal passes through, so that
no layer is emptied while others are full. A hundred rounds of scoring and pruning bring the
density down exponentially.

What is linear by itself stays: convolutions, pooling, sums, products of activations. The rest is
made so, which the paper leaves open for anything but batch norm:

- activations that grow without bound are the identity; those with a bound (sigmoid, tanh) scale
  their input by a constant to at most 1, softmax scales each row of it to the sum 1;
- batch norm is the scaling by γ / √(running variance + ε); the other norms divide by the root
  mean square and multiply by γ, all without shifts;
- a γ that is zero throughout, as some networks start with, counts as one;
- biases are left out; embeddings put out ones, so that it does not matter which tokens a batch
  holds.

The constants and scales take no part in the gradient. Functions that are not known here run as
they are; then scores stay meaningful, but need not add up.

Computed in float64, since the flow of a deep network leaves float32: 8 bytes for each parameter
of the model, 8 more for each chosen weight, and a forward and backward pass of one batch in each
round. Only the shape of the first batch counts, so one example is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsekit.patterns import NM, BlockSparse, Pattern, at_density
from sparsekit.prune.calibration import Batch
from sparsekit.prune.layers import Layer
from sparsekit.prune.modes import only_trainable
from sparsekit.prune.scores import Unpruned

ROUNDS = 100


def synflow(model: Unpruned) -> dict[str, Tensor]:
    """The fraction of rounds that each weight survives: 1 for those that are kept.

    In round r of `ROUNDS` a layer of density d keeps d^(r / ROUNDS) of its weights, as many as its
    pattern can express; rounds in which nothing changes are left out, so 2:4 takes two. With
    `model.together` that holds for all layers of a pattern as one, as in the paper: their tiles
    compete, and N:M does not bind the rounds. Layers that nothing flows through are not in the
    result.

    Raises:
        ValueError: the model never runs, puts out nothing, or overflows float64.
    """
    layers = [layer for layer, _ in model.layers.values()]
    with linearised(model.module, layers, model.batches[0]) as saliency:
        reached = {name: model.layers[name] for name in saliency()}
        parties: list[_Party] = []
        if model.together:
            patterns = dict.fromkeys(pattern for _, pattern in reached.values())
            for pattern in patterns:
                mine = [layer for layer, wanted in reached.values() if wanted == pattern]
                parties.append(_Party(mine, pattern, compete=True))
        else:
            parties = [_Party([layer], pattern) for layer, pattern in reached.values()]
        for number in range(1, ROUNDS + 1):
            steps = [party.step(number / ROUNDS) for party in parties]
            if any(step is not None for step in steps):
                flows = saliency()
                for party, step in zip(parties, steps, strict=True):
                    party.prune(flows, step)
    return {name: share for party in parties for name, share in party.survived().items()}


class _Party:
    """Layers that are pruned to one density."""

    def __init__(self, layers: Sequence[Layer], pattern: Pattern, compete: bool = False) -> None:
        self._layers = layers
        self._final = pattern
        self._compete = compete
        self._kept = {x.name: torch.ones_like(x.weight, dtype=torch.bool) for x in layers}
        self._survived = {name: kept.float() for name, kept in self._kept.items()}
        self._rounds = 1
        self._size: object = None

    def step(self, progress: float) -> float | Pattern | None:
        """What to prune to now: a pattern, a density for competing layers, None for no change."""
        density = (1.0 - self._final.sparsity) ** progress
        if self._compete:
            return density
        if progress == 1.0:
            pattern: Pattern | None = self._final
        elif isinstance(self._final, NM | BlockSparse):
            pattern = at_density(self._final, density)
        else:  # a pattern of which no denser one is known
            pattern = None
        size: object = pattern
        if isinstance(pattern, BlockSparse):
            (layer,) = self._layers
            rows = layer.matrices(layer.weight, pattern).flatten(0, 1)
            size = pattern.blocks_kept(*rows.shape)
        if pattern is None or size == self._size:
            return None
        self._size = size
        return pattern

    def prune(self, flows: Mapping[str, Tensor], step: float | Pattern | None) -> None:
        """Drop what has the least flow; nothing comes back."""
        if step is not None:
            largest = max(float(flows[layer.name].max()) for layer in self._layers)
            scores = []
            for layer in self._layers:
                score = flows[layer.name] / max(largest, torch.finfo(torch.double).tiny)
                # What is gone stays behind all that is left, and behind padding, which scores 0.
                score.masked_fill_(~self._kept[layer.name], -1.0)
                scores.append(layer.matrices(score, self._final))
            masks = (
                [step.mask(score.flatten(0, 1)) for score in scores]
                if isinstance(step, Pattern)
                else _best_tiles([score.flatten(0, 1) for score in scores], self._final, step)
            )
            for layer, score, mask in zip(self._layers, scores, masks, strict=True):
                kept = self._kept[layer.name]
                kept &= layer.from_matrices(mask.view_as(score))
                layer.weight.data.masked_fill_(~kept, 0.0)
        self._rounds += 1
        for name, kept in self._kept.items():
            self._survived[name] += kept

    def survived(self) -> dict[str, Tensor]:
        return {name: count / self._rounds for name, count in self._survived.items()}


def _best_tiles(scores: Sequence[Tensor], pattern: Pattern, density: float) -> list[Tensor]:
    """Masks of the best blocks, or vectors of an N:M pattern, of all layers."""
    down = pattern.row_tile
    across = pattern.k_tile if isinstance(pattern, BlockSparse) else 1
    sums = []
    for score in scores:
        padded = F.pad(score, (0, -score.shape[1] % across, 0, -score.shape[0] % down))
        sums.append(padded.unflatten(1, (-1, across)).unflatten(0, (-1, down)).sum((1, 3)))
    flat = torch.cat([tiles.flatten() for tiles in sums])
    best = torch.zeros_like(flat, dtype=torch.bool)
    order = flat.argsort(descending=True, stable=True)
    best[order[: max(1, round(density * len(flat)))]] = True
    chosen = best.split([tiles.numel() for tiles in sums])
    return [
        part.view_as(tiles)
        .repeat_interleave(down, 0)[: len(score)]
        .repeat_interleave(across, 1)[:, : score.shape[1]]
        for part, tiles, score in zip(chosen, sums, scores, strict=True)
    ]


@contextmanager
def linearised(
    model: nn.Module, layers: Sequence[Layer], batch: Batch
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """The model with absolute parameters in float64, which come back as they were.

    Yields:
        A function that computes the synaptic saliency `|w · ∂R/∂w|` of each layer's weight as it
        now is; a layer that nothing flows through is left out.
    """
    weights = {layer.name: layer.weight for layer in layers}
    parameters = [(tensor, tensor.data) for tensor in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]

    def saliency() -> dict[str, Tensor]:
        flow = _flow(model, batch)
        if not bool(flow.isfinite()):
            raise ValueError(
                "synflow: the flow through the model overflows float64; prune it in parts with "
                "targets=, or choose another method"
            )
        found = torch.autograd.grad(flow, list(weights.values()), allow_unused=True)
        return {
            name: (weight.detach() * gradient).abs()
            for (name, weight), gradient in zip(weights.items(), found, strict=True)
            if gradient is not None
        }

    with only_trainable(model, weights.values()):
        try:
            for tensor, data in parameters:
                if data.is_floating_point():
                    tensor.data = data.double().abs()
            for module, name, buffer in buffers:
                module._buffers[name] = buffer.double()
            yield saliency
        finally:
            for tensor, data in parameters:
                tensor.data = data
            for module, name, buffer in buffers:
                module._buffers[name] = buffer


class _Done(Exception):
    """Ends the run once the model has put out something: a loss need not be computed."""


def _flow(model: nn.Module, batch: Batch) -> Tensor:
    """R: the sum of the model's outputs for an input of ones."""
    outputs: list[Tensor] = []
    fed = False

    def feed(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def ones(x: Tensor) -> Tensor:
            return torch.ones_like(x, dtype=torch.double) if x.is_floating_point() else x

        nonlocal fed
        fed = True
        return tree_map_only(Tensor, ones, (args, kwargs))

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        # The loss that a model computes from labels is no part of the flow.
        loss = output.get("loss") if isinstance(output, Mapping) else None
        found = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x is not loss]
        outputs.extend(x for x in found if x.requires_grad)
        raise _Done

    hooks = [
        model.register_forward_pre_hook(feed, with_kwargs=True, prepend=True),
        model.register_forward_hook(collect),
    ]
    problem: Exception | None = None
    try:
        with _Linear():
            batch(model)
    except _Done:
        pass
    except Exception as error:
        if fed:
            raise
        problem = error  # Parts of the model are in float64, and their inputs are not.
    finally:
        for hook in hooks:
            hook.remove()
    if not outputs:
        raise ValueError(
            "synflow: no output of the model depends on the layers to prune; call the model itself "
            "in loss=, and let it return tensors"
        ) from problem
    return torch.stack([x.sum() for x in outputs]).sum()


# --- what takes the place of functions that are not linear ----------------------------------------


class _Linear(TorchFunctionMode):
    """Runs the functions of `_LINEAR` in place of torch's, in the calls of modules as well."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        return _LINEAR.get(name, function)(*args, **(kwargs or {}))


def _identity(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _bounded(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input / _positive(input.detach().abs().amax())


def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    # Masks of attention come as large negative numbers.
    flow = input.clamp(min=0.0)
    return flow / _positive(flow.detach().sum(-1 if dim is None else dim, keepdim=True))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    enable_gqa: bool = False,
    **__: Any,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    return _softmax(query @ key.transpose(-2, -1)) @ value


def _embedding(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return weight.new_ones(*input.shape, weight.shape[1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight)


def _without_bias(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        return convolution(input, weight, None, *args, **kwargs)

    return run


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_var is None:
        return _normalised(input, [0, *range(2, input.dim())], weight, 1)
    flow = input * _along((running_var + eps).rsqrt(), 1, input)
    return flow if weight is None else flow * _along(weight, 1, input)


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    over = list(range(-len(normalized_shape), 0))
    return _normalised(input, over, weight, -len(normalized_shape))


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    grouped = input.unflatten(1, (num_groups, -1))
    flow = _normalised(grouped, list(range(2, grouped.dim())), None, 1).flatten(1, 2)
    return flow if weight is None else flow * _along(weight, 1, input)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    return _normalised(input, list(range(2, input.dim())), weight, 1)


def _rsqrt(input: Tensor) -> Tensor:
    # Norms that models write themselves: x · rsqrt(mean of x²).
    return torch.rsqrt(input).detach()


def _normalised(input: Tensor, over: list[int], weight: Tensor | None, first: int) -> Tensor:
    flow = input / _positive(input.detach().square().mean(over, keepdim=True).sqrt())
    return flow if weight is None else flow * _along(weight, first, input)


def _along(weight: Tensor, first: int, input: Tensor) -> Tensor:
    """A norm's weight, shaped to multiply `input` from its dimension `first` on.

    One that is zero throughout, which starts a residual branch as nothing, lets the flow pass.
    """
    weight = weight if bool(weight.any()) else torch.ones_like(weight)
    behind = input.dim() - first - weight.dim() if first >= 0 else 0
    return weight.view(*weight.shape, *[1] * behind)


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


_BOUNDED = ("hardsigmoid", "sigmoid", "tanh")
_UNBOUNDED = (
    "celu",
    "elu",
    "gelu",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "log_softmax",
    "logsigmoid",
    "mish",
    "prelu",
    "relu",
    "relu6",
    "rrelu",
    "selu",
    "silu",
    "softplus",
    "softsign",
    "threshold",
)

_LINEAR: dict[str, Callable[..., Tensor]] = {
    **{name + ending: _identity for name in _UNBOUNDED for ending in ("", "_")},
    **{name + ending: _bounded for name in _BOUNDED for ending in ("", "_")},
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
    "linear": _linear,
    "conv1d": _without_bias(F.conv1d),
    "conv2d": _without_bias(F.conv2d),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "rms_norm": _layer_norm,
    "rsqrt": _rsqrt,
}
"""By the name of the function, which a module, `torch` and the tensor's method share."""
