"""Calibration: what the inputs of a layer look like, collected one group of layers at a time.

Works on any module without tracing it to a graph:

1. One hooked forward finds the order in which the layers run and which of them share an input
   (query, key and value, for instance). Layers that share an input share one second moment.
   Convolutions share it when they also read the same patches of that input.
2. `Calibration.moments(group)` runs the batches up to the group's last layer, adds up the second
   moment of what the group sees, and stops the forward there. Layers pruned before it are already
   pruned in that forward, so each group is calibrated on the inputs it will really get.

Cost: one moment `[k, k]` in memory at a time, and a partial forward over all batches per group.
A repeated block (a child of a `ModuleList` or `Sequential`) whose layers are all done is computed
once more and then played back from its cached outputs, so that a deep model costs about one
forward per group of a block instead of one per group of the model. The cache is bounded by
`cache_bytes`; blocks beyond it are recomputed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsekit.prune.layers import Layer, Prunable
from sparsekit.prune.patches import PIXELS, geometry, patches

CACHE_BYTES = 2 << 30


Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""`(model, one batch as the caller gave it) -> scalar`; it runs the model itself."""


@dataclass(frozen=True)
class Batch:
    """One call of the model: positional and keyword arguments, or what a loss makes of a batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Any = None
    loss: Loss | None = None

    def __call__(self, model: nn.Module) -> Any:
        if self.loss is not None:
            return self.loss(model, self.given)
        return model(*self.args, **self.kwargs)

    @property
    def token_mask(self) -> Tensor | None:
        """bool `[batch, tokens]`, False = padding, when the batch carries an attention mask."""
        mask = self.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def read_batches(
    batches: Iterable[Any], what: str = "calibration", loss: Loss | None = None
) -> list[Batch]:
    """Read an iterable of batches once, a generator as well.

    Args:
        batches: each a tensor (the one argument), a tuple or list (positional arguments) or a
            mapping (keyword arguments); with a loss, whatever that takes.
        what: the argument's name, for errors.
        loss: runs the model where one is given.

    Raises:
        ValueError: no batches, or something that is no batch.
    """
    if isinstance(batches, Tensor | Mapping | str):
        kind = "tensor" if isinstance(batches, Tensor) else type(batches).__name__
        raise ValueError(
            f"{what}: expected an iterable of batches, got one {kind}; "
            "pass [batch] if it is a single batch"
        )
    out = [_read_batch(batch, index, what, loss) for index, batch in enumerate(batches)]
    if not out:
        raise ValueError(
            f"{what}: the iterable gave no batches; pass at least one (a generator that was "
            "already read is exhausted: make a new one, or a list)"
        )
    return out


def _read_batch(batch: Any, index: int, what: str, loss: Loss | None) -> Batch:
    if loss is not None:
        # A mapping may have an attention mask.
        return Batch((), dict(batch) if isinstance(batch, Mapping) else {}, batch, loss)
    if isinstance(batch, Tensor):
        return Batch((batch,), {})
    if isinstance(batch, Mapping):
        return Batch((), dict(batch))
    if isinstance(batch, tuple | list):
        return Batch(tuple(batch), {})
    raise ValueError(
        f"{what}: batch {index} is a {type(batch).__name__}; expected a tensor, a tuple or list of "
        "arguments, or a mapping of keyword arguments; loss= takes any other kind"
    )


@dataclass
class Group:
    """Layers that read the same input tensor and therefore share its statistics."""

    layers: list[Layer]
    calls: int = 0
    """Calls of the group's modules in one forward; the forward can stop after the last."""


class _Stop(Exception):
    """Ends a forward once the last layer of interest has run."""


class Calibration:
    """Runs the batches through the model and collects second moments, group by group.

    Args:
        model: run in eval mode without gradients; its training flags come back afterwards.
        batches: what it is called with.
        layers: the layers of interest.
        cache_bytes: most memory for the outputs of finished blocks.
        pixels: most output pixels of a convolution that are counted in each call.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        layers: Sequence[Layer],
        cache_bytes: int = CACHE_BYTES,
        pixels: int = PIXELS,
    ) -> None:
        self._model = model
        self._pixels = pixels
        self._batches = batches
        self._cache_left = cache_bytes
        self._current = 0
        self.count = 0
        """Tokens or patches that the last `moments` are the mean of."""
        self._played: dict[nn.Module, _Playback] = {}
        self._training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            self.groups, self.unreached = self._trace(layers)
        except BaseException:
            self.close()
            raise
        self._blocks = _blocks(model, layers)
        self._waiting = Counter(
            block
            for group in self.groups
            for layer in group.layers
            for block in self._blocks_of(layer)
        )
        self._finished: list[nn.Module] = []

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as it was: own forwards, own training flags."""
        for playback in self._played.values():
            playback.stop()
        self._played.clear()
        for module in self._training:
            module.training = True

    def moments(self, group: Group) -> Tensor:
        """Mean of x xᵀ over the tokens or patches the group's layers read, padding tokens left out.

        Returns:
            `[groups, k, k]`, one matrix for each group of a convolution's channels, for a linear
            layer one; float32 (float64 for float64 weights), on the weight's device.

        Raises:
            ValueError: the inputs of a layer hold NaN or infinities (says which layer).
        """
        layer = group.layers[0]
        weight = layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        size = weight.shape[1:].numel()
        total = torch.zeros(layer.groups, size, size, dtype=dtype, device=weight.device)
        count = 0

        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal count
            if module not in layer.modules:
                return
            for rows in self._rows(module, inputs[0]):
                for part, mine in zip(total, rows.to(dtype), strict=True):
                    part.addmm_(mine.t(), mine)
                count += rows.shape[1]

        cached = self._caching()
        self._run(group, add, cached)
        self._start_playback(cached)
        if count == 0:
            raise ValueError(f"calibration: layer {layer.name!r} saw no tokens or pixels")
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"calibration: the inputs of layer {layer.name!r} hold NaN or infinity; "
                "check the batches, or compute in a wider dtype"
            )
        self.count = count
        return total.div_(count)

    def outputs(self, count: int | None = None) -> Iterator[Any]:
        """What the model makes of the batches, or of the first `count`, as it is now.

        Finished blocks are played back, so their weights must be what they were then.
        """
        for index, batch in enumerate(self._batches[:count]):
            self._current = index
            yield batch(self._model)

    def done(self, group: Group) -> None:
        """Say that the group's layers are pruned; blocks that are complete are cached from now."""
        for layer in group.layers:
            for block in self._blocks_of(layer):
                self._waiting[block] -= 1
                if self._waiting[block] == 0:
                    self._finished.append(block)

    def _rows(self, module: nn.Module, x: Tensor) -> Iterable[Tensor]:
        """`[groups, rows, k]` in blocks."""
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return patches(module, x, self._pixels)
        mask = self._batches[self._current].token_mask
        if mask is not None and mask.shape == x.shape[:-1]:
            return (x[mask.to(x.device)][None],)
        return (x.reshape(1, -1, x.shape[-1]),)

    def _run(self, group: Group, add: Any, cached: dict[nn.Module, list[Any]]) -> None:
        calls = 0

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == group.calls:
                raise _Stop

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # What follows may write into the output, a residual sum for instance.
            cached[module].append(_clone(output))

        with ExitStack() as stack, torch.no_grad():
            for layer in group.layers:
                for module in layer.modules:
                    stack.callback(module.register_forward_pre_hook(add).remove)
                    stack.callback(module.register_forward_hook(after).remove)
            for block in cached:
                stack.callback(block.register_forward_hook(keep).remove)
            for index, batch in enumerate(self._batches):
                self._current = index
                calls = 0
                try:
                    batch(self._model)
                except _Stop:
                    continue

    def _caching(self) -> dict[nn.Module, list[Any]]:
        """Finished blocks whose outputs this pass shall keep, inner ones left to outer ones."""
        finished, self._finished = self._finished, []
        inner = {m for block in finished for m in block.modules() if m is not block}
        return {block: [] for block in finished if block not in inner and self._cache_left > 0}

    def _start_playback(self, cached: dict[nn.Module, list[Any]]) -> None:
        for block, outputs in cached.items():
            size = sum(_nbytes(output) for output in outputs)
            # A block that ran more than once, or not for every batch, cannot be told apart.
            if len(outputs) != len(self._batches) or size > self._cache_left:
                continue
            for module in block.modules():
                if module in self._played:
                    inside = self._played.pop(module)
                    inside.stop()
                    self._cache_left += inside.nbytes
            self._cache_left -= size
            self._played[block] = _Playback(block, partial(self._output, outputs), size)

    def _output(self, outputs: list[Any]) -> Any:
        return _clone(outputs[self._current])

    def _trace(self, layers: Sequence[Layer]) -> tuple[list[Group], list[Layer]]:
        """Groups in execution order, and the layers no batch reaches."""
        owner = {module: layer for layer in layers for module in layer.modules}
        calls: dict[str, int] = {}
        seen: dict[str, tuple[Any, ...]] = {}
        alive: list[Tensor] = []

        def record(module: Prunable, inputs: tuple[Tensor, ...]) -> None:
            layer = owner[module]
            x = inputs[0]
            calls[layer.name] = calls.get(layer.name, 0) + 1
            alive.append(x)  # Its address must not be used again within this forward.
            version = None if x.is_inference() else x._version
            key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, version, geometry(module))
            seen.setdefault(layer.name, key)

        by_name = {layer.name: layer for layer in layers}
        groups: list[Group] = []
        with ExitStack() as stack, torch.no_grad():
            for module in owner:
                stack.callback(module.register_forward_pre_hook(record).remove)
            for batch in self._batches:
                before = set(seen)
                calls.clear()
                batch(self._model)
                inputs: dict[tuple[Any, ...], Group] = {}
                for name in (name for name in seen if name not in before):
                    # A layer that runs more than once has several inputs: it stays alone.
                    key = seen[name] if calls[name] == 1 else (name,)
                    if key not in inputs:
                        groups.append(inputs.setdefault(key, Group([])))
                    inputs[key].layers.append(by_name[name])
                    inputs[key].calls += calls[name]
                alive.clear()
                if len(seen) == len(by_name):
                    break
        return groups, [layer for layer in layers if layer.name not in seen]

    def _blocks_of(self, layer: Layer) -> set[nn.Module]:
        return {block for module in layer.modules for block in self._blocks.get(module, ())}


class _Playback:
    """Lets a module return kept outputs instead of computing, until `stop`."""

    def __init__(self, module: nn.Module, output: Callable[[], Any], nbytes: int) -> None:
        self._module = module
        self._before = module.__dict__.get("forward")
        self.nbytes = nbytes
        # An instance attribute shadows the class's forward; deleting it brings that back.
        module.__dict__["forward"] = lambda *args, **kwargs: output()

    def stop(self) -> None:
        if self._before is None:
            del self._module.__dict__["forward"]
        else:
            self._module.__dict__["forward"] = self._before


def _blocks(model: nn.Module, layers: Sequence[Layer]) -> dict[nn.Module, list[nn.Module]]:
    """Layer module -> the repeated blocks around it."""
    wanted = {module for layer in layers for module in layer.modules}
    found: dict[nn.Module, list[nn.Module]] = {}
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for block in container:
                for module in block.modules():
                    if module in wanted and module is not block:
                        found.setdefault(module, []).append(block)
    return found


def _clone(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, value)


def _nbytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
