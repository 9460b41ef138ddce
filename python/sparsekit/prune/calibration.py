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
once more and then played back from its kept outputs (`playback`), so that a deep model costs about
one forward per group of a block instead of one per group of the model. `cache_bytes` bounds what
is kept; blocks beyond it are recomputed.

With several processes (`distributed`) each runs its own batches, and the sums of all are added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparsekit.prune.distributed import ALONE, Ranks
from sparsekit.prune.layers import Layer, Prunable
from sparsekit.prune.patches import PIXELS, geometry, patches
from sparsekit.prune.playback import HollowRead, Playback, Recording

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
    batches: Iterable[Any],
    what: str = "calibration",
    loss: Loss | None = None,
    may_be_empty: bool = False,
) -> list[Batch]:
    """Read an iterable of batches once, a generator as well.

    Args:
        batches: each a tensor (the one argument), a tuple or list (positional arguments) or a
            mapping (keyword arguments); with a loss, whatever that takes.
        what: the argument's name, for errors.
        loss: runs the model where one is given.
        may_be_empty: whether no batches are fine.

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
    if not out and not may_be_empty:
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
        cache_bytes: most memory for the outputs of finished blocks. While a block takes over from
            the one before it in a stack, the outputs of both are there.
        pixels: most output pixels of a convolution that are counted in each call.
        ranks: the processes that share the work.
        groups: what an earlier `Calibration` of the same model found, to be spared the tracing.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        layers: Sequence[Layer],
        cache_bytes: int = CACHE_BYTES,
        pixels: int = PIXELS,
        ranks: Ranks = ALONE,
        groups: list[Group] | None = None,
    ) -> None:
        self._model = model
        self._pixels = pixels
        self._batches = batches
        self._ranks = ranks
        self._cache_left = cache_bytes
        self._current = 0
        self.count = 0
        """Tokens or patches that the last `moments` are the mean of."""
        self._played: dict[nn.Module, Playback] = {}
        self._kept: set[nn.Module] = set()  # blocks whose outputs others than the next one read
        self._training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            self.groups = self._trace(layers) if groups is None else groups
        except BaseException:
            self.close()
            raise
        reached = {layer.name for group in self.groups for layer in group.layers}
        self.unreached = [layer for layer in layers if layer.name not in reached]
        self._blocks, self._stack_of = _blocks(model, layers)
        self._waiting = Counter(
            block
            for group in self.groups
            for layer in group.layers
            for block in self._blocks_of(layer)
        )
        self._order: list[nn.Module] = []  # finished blocks, as they finished
        self._finished: set[nn.Module] = set()  # those of them that nobody has tried to keep yet

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
        count = torch.zeros((), dtype=torch.int64, device=weight.device)

        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module not in layer.modules:
                return
            for rows in self._rows(module, inputs[0]):
                for part, mine in zip(total, rows.to(dtype), strict=True):
                    part.addmm_(mine.t(), mine)
                count.add_(rows.shape[1])

        while True:
            recordings = self._recordings()
            try:
                self._run(group, add, recordings)
            except HollowRead as read:
                self._compute_again(read.block, recordings)
                total.zero_()
                count.zero_()
            else:
                break
        self._start_playback(recordings)
        # Before the ranks add up: the one whose data it is says so.
        self._check_finite(total, layer)
        self._ranks.sum([total, count])
        if count == 0:
            raise ValueError(f"calibration: layer {layer.name!r} saw no tokens or pixels")
        if self._ranks.several:
            self._check_finite(total, layer)
        self.count = int(count)
        return total.div_(count)

    def outputs(self, count: int | None = None) -> Iterator[Any]:
        """What the model makes of the batches, or of the first `count`, as it is now.

        Finished blocks are played back, so their weights must be what they were then.
        """
        for index, batch in enumerate(self._batches[:count]):
            self._current = index
            try:
                output = batch(self._model)
            except HollowRead as read:
                self._compute_again(read.block, [])
                output = batch(self._model)
            yield output

    def done(self, group: Group) -> None:
        """Say that the group's layers are pruned; blocks that are complete are cached from now."""
        for layer in group.layers:
            for block in self._blocks_of(layer):
                self._waiting[block] -= 1
                if self._waiting[block] == 0:
                    self._order.append(block)
                    self._finished.add(block)

    def _check_finite(self, total: Tensor, layer: Layer) -> None:
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"calibration: the inputs of layer {layer.name!r} hold NaN or infinity; "
                "check the batches, or compute in a wider dtype"
            )

    def _rows(self, module: nn.Module, x: Tensor) -> Iterable[Tensor]:
        """`[groups, rows, k]` in blocks."""
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return patches(module, x, self._pixels)
        mask = self._batches[self._current].token_mask
        if mask is not None and mask.shape == x.shape[:-1]:
            return (x[mask.to(x.device)][None],)
        return (x.reshape(1, -1, x.shape[-1]),)

    def _run(self, group: Group, add: Any, recordings: Sequence[Recording]) -> None:
        calls = 0

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == group.calls:
                raise _Stop

        def keep(recording: Recording) -> Callable[..., None]:
            return lambda module, inputs, output: recording.add(self._current, output)

        with ExitStack() as stack, torch.no_grad():
            for layer in group.layers:
                for module in layer.modules:
                    stack.callback(module.register_forward_pre_hook(add).remove)
                    stack.callback(module.register_forward_hook(after).remove)
            for recording in recordings:
                stack.callback(recording.block.register_forward_hook(keep(recording)).remove)
            for index, batch in enumerate(self._batches):
                self._current = index
                calls = 0
                try:
                    batch(self._model)
                except _Stop:
                    continue

    def _recordings(self) -> list[Recording]:
        """Of the finished blocks that this pass shall keep, inner ones left to outer ones."""
        finished = [block for block in self._order if block in self._finished]
        inner = {m for block in finished for m in block.modules() if m is not block}
        outer = [block for block in finished if block not in inner]
        # The last of a stack needs no outputs of those before it.
        last = {self._stack_of[b]: b for b in self._order if b in outer or b in self._played}
        recordings = []
        for block in outer:
            hollow = last[self._stack_of[block]] is not block and block not in self._kept
            replaced = sum(self._played[other].nbytes for other in self._replaced_by(block))
            recordings.append(Recording(block, hollow, self._cache_left + replaced))
        self._finished.clear()
        return recordings

    def _replaced_by(self, block: nn.Module) -> list[nn.Module]:
        """Played blocks that need no outputs once this one is played: before or inside it."""
        inside, stack = set(block.modules()), self._stack_of[block]
        before = set(self._order[: self._order.index(block)]) - self._kept
        return [
            other
            for other in self._played
            if other in inside or (other in before and self._stack_of[other] is stack)
        ]

    def _start_playback(self, recordings: Sequence[Recording]) -> None:
        # The last block of a stack first: without it the others cannot be hollow.
        for recording in reversed(recordings):
            block = recording.block
            outputs = recording.outputs(len(self._batches))
            replaced = self._replaced_by(block)
            freed = sum(self._played[other].nbytes for other in replaced)
            if outputs is None or recording.nbytes > self._cache_left + freed:
                continue
            stack = self._stack_of[block]
            if recording.hollow and not any(
                self._stack_of[other] is stack for other in self._played
            ):
                continue
            inside = set(block.modules())
            for other in replaced:
                if other in inside:
                    self._cache_left += self._played[other].nbytes
                    self._played.pop(other).stop()
                elif not recording.hollow:
                    self._cache_left += self._played[other].nbytes
                    self._played[other].empty()
            self._cache_left -= recording.nbytes
            self._played[block] = Playback(block, outputs, lambda: self._current)

    def _compute_again(self, block: nn.Module, recordings: Sequence[Recording]) -> None:
        """After a pass that failed: others than the next block read the outputs of this one."""
        self._kept.add(block)
        self._finished.update(recording.block for recording in recordings)
        for other in [other for other in self._played if self._played[other].is_hollow]:
            self._played.pop(other).stop()
            self._finished.add(other)

    def _trace(self, layers: Sequence[Layer]) -> list[Group]:
        """Groups in execution order, without the layers that no batch reaches."""
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
        return self._agree(groups, by_name)

    def _agree(self, groups: list[Group], by_name: Mapping[str, Layer]) -> list[Group]:
        """The groups of all ranks, as one process would find them on the batches of all."""
        mine = [([layer.name for layer in group.layers], group.calls) for group in groups]
        answers = self._ranks.exchange((len(self._batches), mine))
        if not any(count for count, _ in answers):
            raise ValueError("calibration: no rank has any batches; give at least one of them some")
        known: set[str] = set()
        out: list[Group] = []
        for _, theirs in answers:
            found = [
                ([name for name in names if name not in known], calls) for names, calls in theirs
            ]
            out.extend(Group([by_name[n] for n in names], calls) for names, calls in found if names)
            known.update(name for names, _ in found for name in names)
        return out

    def _blocks_of(self, layer: Layer) -> set[nn.Module]:
        return {block for module in layer.modules for block in self._blocks.get(module, ())}


def _blocks(
    model: nn.Module, layers: Sequence[Layer]
) -> tuple[dict[nn.Module, list[nn.Module]], dict[nn.Module, nn.Module]]:
    """Layer module -> the repeated blocks around it, and block -> the container it is in."""
    wanted = {module for layer in layers for module in layer.modules}
    found: dict[nn.Module, list[nn.Module]] = {}
    stack_of: dict[nn.Module, nn.Module] = {}
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for block in container:
                stack_of[block] = container
                for module in block.modules():
                    if module in wanted and module is not block:
                        found.setdefault(module, []).append(block)
    return found, stack_of
