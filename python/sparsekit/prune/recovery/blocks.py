"""Block-wise recovery: one repeated block at a time learns what the dense block puts out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from sparsekit.patterns import match, require_match
from sparsekit.prune import resume
from sparsekit.prune.calibration import Batch, read_batches
from sparsekit.prune.masks import hold_masks, weight_of
from sparsekit.prune.modes import only_trainable
from sparsekit.prune.recovery.distill import (
    rate_at,
    relative_mse,
    trained_parameters,
    without_padding,
)


@dataclass(frozen=True)
class ReconstructedBlock:
    """One block of a `BlocksReport`.

    Attributes:
        name: dotted module name.
        before: mean relative squared error of its outputs, once the blocks before it were done.
        after: the same after its own training; never more.
        seconds: of training.
    """

    name: str
    before: float
    after: float
    seconds: float


@dataclass(frozen=True)
class BlocksReport:
    """Result of `reconstruct_blocks`: the blocks in the order they run."""

    blocks: tuple[ReconstructedBlock, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{block.name}: relative error {block.before:.4f} -> {block.after:.4f} in "
            f"{block.seconds:.1f} s"
            for block in self.blocks
        )


def reconstruct_blocks(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    masks: Mapping[str, Tensor],
    *,
    blocks: str | Sequence[str],
    steps: int = 100,
    lr: float = 1e-3,
    warmup: float = 0.05,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> BlocksReport:
    """Train the kept weights of a pruned model one block at a time, with its zeros held.

    Each block learns to put out what the dense model puts out at that place, from the inputs that
    the blocks before it, done already, really give it: so it also makes up for what they still
    lose. As in BRECQ (Li et al. 2021, arXiv 2102.05426) for quantisation and EBFT (Guo et al.
    2024, arXiv 2402.12419) for sparsity. Needs inputs, no labels.

    Memory holds the inputs and outputs of one block over all batches, and the gradients of one
    block; there is no backward through the whole model. Costs `steps` forward and backward passes
    of each block, and for each block a forward of both models up to it.

    Args:
        student: the pruned model, changed in place; run in eval mode.
        teacher: the dense model, with the same module names.
        batches: iterable of batches as for `prune`, read once. Tokens that a 2-D `attention_mask`
            leaves out do not count.
        masks: `PruneReport.masks`.
        blocks: globs or `re:` expressions of the blocks, such as "re:encoder\\.layer\\.\\d+". They
            return a tensor, or a tuple that begins with one.
        steps: optimizer steps for each block, of one batch each.
        lr: highest learning rate.
        warmup: fraction of the steps during which the learning rate rises.
        optimizer: makes the optimizer from a block's parameters; None means Adam. Its learning
            rates are overwritten.
        checkpoint: safetensors file to save finished blocks in, and to resume from when it exists.
        progress: show a progress bar.

    Raises:
        ValueError: no batches or steps, an expression that matches nothing, a block that lies in
            another, does not run, runs more than once in a forward or holds no pruned layer, masks
            of another model, a checkpoint of other masks or blocks.
    """
    data = read_batches(batches, "reconstruct_blocks")
    if steps < 1:
        raise ValueError(f"reconstruct_blocks: steps must be at least 1, got {steps}")
    for name, mask in masks.items():
        weight_of(student, name, mask)
    names = _in_order(student, teacher, blocks, data[0])
    parts = {name: _masks_of(name, masks) for name in names}
    saved = _Checkpoint(checkpoint, student, parts, masks)
    done = saved.load()
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr))
    with tqdm(total=len(names) * steps, desc="reconstruct blocks", disable=not progress) as bar:
        bar.update(len(done) * steps)
        for name in names[len(done) :]:
            bar.set_postfix_str(name, refresh=False)
            inputs = _captured(student, name, data, outputs=False)
            wanted = _captured(teacher, name, data, outputs=True)
            trained = trained_parameters(student, parts[name], None)
            block = _Block(student.get_submodule(name), name, data, inputs, wanted)
            started = time.perf_counter()
            with only_trainable(student, trained):
                before = block.error()
                kept = [parameter.detach().clone() for parameter in trained]
                solver = make(trained)
                with hold_masks(student, parts[name], solver):
                    for step in range(steps):
                        for group in solver.param_groups:
                            group["lr"] = lr * rate_at(step / steps, warmup, steps)
                        solver.zero_grad()
                        block.loss(step % len(data)).backward()
                        solver.step()
                        bar.update()
                after = block.error()
                if not after <= before:  # NaN as well: it has not learned anything
                    after = before
                    with torch.no_grad():
                        for parameter, value in zip(trained, kept, strict=True):
                            parameter.copy_(value)
            seconds = time.perf_counter() - started
            done.append(ReconstructedBlock(name, before, after, seconds))
            saved.save(done)
    return BlocksReport(tuple(done))


@dataclass(frozen=True)
class _Block:
    """A block of the student with its inputs, and the outputs it shall give."""

    module: nn.Module
    name: str
    batches: Sequence[Batch]
    inputs: Sequence[tuple[Any, Any]]
    wanted: Sequence[Tensor]

    def loss(self, index: int) -> Tensor:
        args, kwargs = self.inputs[index]
        got = _first(self.module(*args, **kwargs), self.name)
        return relative_mse(*without_padding(got, self.wanted[index], self.batches[index]))

    @torch.no_grad()
    def error(self) -> float:
        return sum(self.loss(index).item() for index in range(len(self.inputs))) / len(self.inputs)


class _Stop(Exception):
    """Ends a forward at the block of interest."""


def _captured(model: nn.Module, name: str, batches: Sequence[Batch], outputs: bool) -> list[Any]:
    """A block's outputs, or its inputs as (args, kwargs), one for each batch."""
    found: list[Any] = []

    def keep(value: Any) -> None:
        # A copy: what runs inside the block may write into its inputs.
        found.append(tree_map_only(Tensor, Tensor.clone, value))
        raise _Stop

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        keep((args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        keep(_first(output, name))

    module = model.get_submodule(name)
    if outputs:
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    with only_trainable(model, []), torch.no_grad():
        try:
            for index, batch in enumerate(batches):
                try:
                    batch(model)
                except _Stop:
                    continue
                raise ValueError(f"reconstruct_blocks: batch {index} does not run block {name!r}")
        finally:
            handle.remove()
    return found


def _first(output: Any, name: str) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(
            f"reconstruct_blocks: block {name!r} returns a {type(first).__name__}; name modules "
            "that return a tensor or a tuple that begins with one"
        )
    return first


def _in_order(
    student: nn.Module, teacher: nn.Module, blocks: str | Sequence[str], batch: Batch
) -> list[str]:
    """Names of the blocks in the order they run."""
    expressions = [blocks] if isinstance(blocks, str) else list(blocks)
    in_teacher = {name for name, _ in teacher.named_modules()}
    names = [name for name, _ in student.named_modules() if name in in_teacher]
    require_match(expressions, names, "blocks")
    chosen = [name for name in names if any(match(name, e) for e in expressions)]
    for outer in chosen:
        inner = [name for name in chosen if name != outer and _inside(name, outer)]
        if inner:
            raise ValueError(
                f"reconstruct_blocks: block {inner[0]!r} lies in block {outer!r}; write blocks= so "
                "that it matches one of them (a glob's * also matches dots)"
            )
    ran: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(only_trainable(student, []))
        stack.enter_context(torch.no_grad())
        for name in chosen:

            def note(module: nn.Module, args: Any, name: str = name) -> None:
                ran.append(name)

            stack.callback(student.get_submodule(name).register_forward_pre_hook(note).remove)
        batch(student)
    for name in chosen:
        if ran.count(name) != 1:
            raise ValueError(
                f"reconstruct_blocks: block {name!r} runs {ran.count(name)} times in a forward, "
                "expected once; leave it out of blocks="
            )
    return ran


def _masks_of(block: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: mask for name, mask in masks.items() if _inside(name, block)}
    if not found:
        raise ValueError(
            f"reconstruct_blocks: masks= holds no layer of block {block!r}; leave it out of blocks="
        )
    return found


def _inside(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(f"{block}.")


class _Checkpoint:
    """The trained parameters of the blocks that are done, in one file."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        student: nn.Module,
        parts: Mapping[str, Mapping[str, Tensor]],
        masks: Mapping[str, Tensor],
    ) -> None:
        self._path = None if path is None else Path(path)
        self._student = student
        self._parts = parts
        self._masks = masks

    def load(self) -> list[ReconstructedBlock]:
        """The blocks that are done, once their parameters are in place."""
        if self._path is None or not self._path.exists():
            return []
        state = resume.read(self._path, "reconstruct_blocks")
        done = [ReconstructedBlock(*block) for block in state["blocks"]]
        parameters = [self._parameters(name) for name in list(self._parts)[: len(done)]]
        if (
            not resume.same_masks(state["masks"], self._masks)
            or state["names"] != list(self._parts)
            or [[p.shape for p in part] for part in parameters]
            != [[p.shape for p in part] for part in state["parameters"]]
        ):
            raise ValueError(
                f"reconstruct_blocks: checkpoint {self._path} is of another model, other masks or "
                "other blocks; delete it or pass another path"
            )
        with torch.no_grad():
            for part, values in zip(parameters, state["parameters"], strict=True):
                for parameter, value in zip(part, values, strict=True):
                    parameter.copy_(value)
        return done

    def save(self, done: Sequence[ReconstructedBlock]) -> None:
        if self._path is None:
            return
        state = {
            "names": list(self._parts),
            "masks": resume.pack_masks(self._masks),
            "blocks": [(b.name, b.before, b.after, b.seconds) for b in done],
            "parameters": [self._parameters(block.name) for block in done],
        }
        resume.write(self._path, "reconstruct_blocks", state)

    def _parameters(self, block: str) -> list[nn.Parameter]:
        return trained_parameters(self._student, self._parts[block], None)
