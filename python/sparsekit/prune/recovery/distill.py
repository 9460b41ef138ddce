"""Recovery: train the kept weights of a pruned model, towards the dense one, on labels, or both."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from tqdm import tqdm

from sparsekit.patterns import match, require_match
from sparsekit.prune import resume
from sparsekit.prune.calibration import Batch, Loss, read_batches
from sparsekit.prune.masks import hold_masks, weight_of
from sparsekit.prune.modes import eval_mode, only_trainable

CHECKPOINT_SECONDS = 30.0


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the teacher's mean square: 0 equal, 1 as bad as zeros."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp(min=1e-12)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - mean cosine along the last dimension; for embeddings."""
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1).mean()


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL divergence from the teacher's distribution along the last dimension; for logits."""
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relative_mse": relative_mse,
    "cosine": cosine,
    "kl": kl_divergence,
}
"""Losses by name: `(student, teacher) -> scalar`."""


@dataclass(frozen=True)
class DistillReport:
    """What `distill` did.

    Attributes:
        losses: loss of every step, those of a resumed run included.
        seconds: wall time of the training, resumed runs included.
        stopped: "steps" when all steps were made, "time" when `max_seconds` ended it.
        autocast: the dtype that was computed in, None = the model's own.
    """

    losses: tuple[float, ...]
    seconds: float
    stopped: Literal["steps", "time"]
    autocast: str | None

    @property
    def steps(self) -> int:
        """Steps made."""
        return len(self.losses)

    def __str__(self) -> str:
        first, last = self.losses[: self.steps // 10 + 1], self.losses[-(self.steps // 10 + 1) :]
        return (
            f"distill: {self.steps} steps in {self.seconds:.1f} s (ended by {self.stopped}), "
            f"loss {sum(first) / len(first):.4f} -> {sum(last) / len(last):.4f}"
        )


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Any],
    masks: Mapping[str, Tensor],
    *,
    loss: Loss | None = None,
    loss_weight: float = 1.0,
    hidden: str | Sequence[str] = (),
    output: Callable[[Any, Batch], Tensor] | None = None,
    output_loss: str | Callable[[Tensor, Tensor], Tensor] = "relative_mse",
    output_weight: float = 1.0,
    hidden_weight: float = 1.0,
    train: str | Sequence[str] | None = None,
    steps: int | None = None,
    max_seconds: float | None = None,
    lr: float = 3e-4,
    warmup: float = 0.05,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    autocast: torch.dtype | Literal["auto"] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> DistillReport:
    """Train a pruned model, with its zeros held: distillation, fine-tuning on labels, or both.

    What is minimised is `loss_weight` times the task's `loss`, plus `hidden_weight` times the mean
    relative squared error of the hidden states, plus `output_weight` times the loss of the output
    (Hinton et al. 2015, arXiv 1503.02531; hidden states as in Romero et al. 2014,
    arXiv 1412.6550). Needs inputs, and labels only where `loss` reads them. Costs a forward of the
    teacher, and a forward and a backward of the student, each step.

    Both models run in eval mode: dropout is off, batch normalisation keeps its statistics, and the
    same batches give the same result. The learning rate rises linearly over the first `warmup` of
    the run and falls to zero along a cosine; with `max_seconds` it is at zero when the time is up,
    however few steps were made.

    Args:
        student: the pruned model, changed in place.
        teacher: the dense model, with the same module names for the hidden states; None trains on
            `loss` alone.
        batches: iterable of batches as for `prune`; read once, used again from the start when
            there are more steps than batches. Tokens that a 2-D `attention_mask` leaves out do not
            count in a loss on `[batch, tokens, ...]`.
        masks: `PruneReport.masks`.
        loss: `(model, batch) -> scalar`, the task's loss of one batch as `batches` gave it. It runs
            the model itself, so that batches may be pairs of inputs and labels; the teacher is run
            through it as well.
        loss_weight: weight of the task's loss.
        hidden: globs or `re:` expressions of modules whose outputs shall agree, for instance
            "encoder.layer.*" restricted to the blocks by "re:encoder\\.layer\\.\\d+".
        output: `(what the model returned, batch) -> tensor` to compare, for instance a pooled
            embedding; None takes the returned tensor, its `logits`, `last_hidden_state` or first
            element.
        output_loss: a name in `LOSSES` or a function `(student, teacher) -> scalar`.
        output_weight: weight of the output's loss; 0 leaves it out.
        hidden_weight: weight of the hidden states' loss.
        train: globs or `re:` expressions of the parameters to train; None means the weights in
            `masks` and their biases.
        steps: optimizer steps; None means each batch once.
        max_seconds: stop after this much wall time.
        lr: highest learning rate.
        warmup: fraction of the run during which the learning rate rises.
        optimizer: makes the optimizer from the trained parameters; None means Adam. Its learning
            rates are overwritten.
        autocast: dtype to compute in (weights, loss and optimizer stay as they are); "auto" takes
            bfloat16 where a short measurement shows that it is faster here.
        checkpoint: safetensors file to save the progress in every 30 seconds and at the end, and
            to resume from when it exists. A resumed run ends with the same bits as one that was
            never interrupted, unless `max_seconds` sets its pace.
        progress: show a progress bar.

    Raises:
        ValueError: no batches, nothing to train or to minimise, masks of another model, an
            expression that matches nothing, a loss that is no finite scalar (names the step), a
            checkpoint of another model, other masks or another optimizer.
    """
    data = read_batches(batches, "distill", loss)
    total = len(data) if steps is None else steps
    if total < 1:
        raise ValueError(f"distill: steps must be at least 1, got {total}")
    names = [] if teacher is None else _hidden_names(student, teacher, hidden)
    _require_objective(teacher, loss, hidden, bool(names) or output_weight != 0)
    compare = _loss(output_loss)
    read = _default_output if output is None else output
    trained = trained_parameters(student, masks, train)
    dtype = _faster_dtype(trained[0]) if autocast == "auto" else autocast
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr))
    losses: list[float] = []
    spent = 0.0

    with ExitStack() as stack:
        stack.enter_context(only_trainable(student, trained))
        if teacher is not None:
            stack.enter_context(eval_mode(teacher))
        of_student = stack.enter_context(_Captured(student, names))
        of_teacher = None if teacher is None else stack.enter_context(_Captured(teacher, names))
        solver = make(trained)
        stack.enter_context(hold_masks(student, masks, solver))
        saved = _Checkpoint(checkpoint, trained, masks, solver)
        losses, spent = saved.load()
        bar = stack.enter_context(
            tqdm(total=total, initial=len(losses), desc="distill", disable=not progress)
        )
        began = time.perf_counter() - spent
        while len(losses) < total:
            spent = time.perf_counter() - began
            if max_seconds is not None and spent >= max_seconds:
                break
            share = len(losses) / total
            if max_seconds is not None:
                share = max(share, spent / max_seconds)
            for parameter_group in solver.param_groups:
                parameter_group["lr"] = lr * rate_at(share, warmup, total)
            batch = data[len(losses) % len(data)]
            error = torch.zeros((), device=trained[0].device)
            pair = None
            with _autocast(trained[0].device, dtype):
                if teacher is not None and of_teacher is not None:
                    with torch.no_grad():
                        batch(teacher)
                        wanted = read(of_teacher.returned, batch) if output_weight else None
                task = batch(student)
                if of_teacher is not None and wanted is not None:
                    pair = without_padding(read(of_student.returned, batch), wanted, batch)
            if loss is not None:
                error = error + loss_weight * _scalar(task)
            if pair is not None:
                error = error + output_weight * compare(*pair)
            if of_teacher is not None:
                for name in names:
                    states = without_padding(of_student[name], of_teacher[name], batch)
                    error = error + hidden_weight / len(names) * relative_mse(*states)
            value = error.item()
            if not math.isfinite(value):
                raise ValueError(
                    f"distill: the loss is {value} at step {len(losses) + 1}; use a lower lr, or "
                    "autocast=None"
                )
            solver.zero_grad()
            error.backward()
            solver.step()
            losses.append(value)
            bar.update()
            bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
            saved.save(losses, time.perf_counter() - began)
        spent = time.perf_counter() - began
        saved.save(losses, spent, now=True)
    stopped: Literal["steps", "time"] = "steps" if len(losses) >= total else "time"
    return DistillReport(tuple(losses), spent, stopped, None if dtype is None else str(dtype))


def _require_objective(
    teacher: nn.Module | None, loss: Loss | None, hidden: str | Sequence[str], compared: bool
) -> None:
    """Refuse arguments that leave nothing to minimise, or a part of them without effect."""
    if teacher is None:
        if loss is None:
            raise ValueError("distill: nothing to minimise; pass a teacher, loss=, or both")
        if hidden:
            raise ValueError("distill: hidden= compares with a teacher; pass one, or hidden=()")
    elif not compared:
        raise ValueError(
            "distill: nothing to compare; pass hidden=, or an output_weight above 0"
            + ("" if loss is None else ", or teacher=None to train on the loss alone")
        )


def _scalar(task: Any) -> Tensor:
    if not isinstance(task, Tensor) or task.dim() != 0:
        what = list(task.shape) if isinstance(task, Tensor) else type(task).__name__
        raise ValueError(
            f"distill: loss= must return a scalar tensor, got {what}; take the mean over the batch"
        )
    return task.to(torch.promote_types(task.dtype, torch.float32))


def rate_at(share: float, warmup: float, total: int) -> float:
    """Learning rate factor at `share` of the run: linear rise, cosine fall."""
    # The first step must not be lost to a rate of exactly zero.
    rise = 1.0 if warmup <= 0 else min(1.0, (share + 1.0 / total) / warmup)
    return rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _loss(loss: str | Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    if callable(loss):
        return loss
    if loss not in LOSSES:
        known = ", ".join(sorted(LOSSES))
        raise ValueError(f"distill: unknown output_loss {loss!r}; known are {known}")
    return LOSSES[loss]


def _hidden_names(student: nn.Module, teacher: nn.Module, hidden: str | Sequence[str]) -> list[str]:
    expressions = [hidden] if isinstance(hidden, str) else list(hidden)
    in_teacher = {name for name, _ in teacher.named_modules()}
    names = [name for name, _ in student.named_modules() if name in in_teacher]
    require_match(expressions, names, "hidden")
    return [name for name in names if any(match(name, e) for e in expressions)]


def trained_parameters(
    student: nn.Module, masks: Mapping[str, Tensor], train: str | Sequence[str] | None
) -> list[nn.Parameter]:
    if train is None:
        out: dict[nn.Parameter, None] = {}
        for name, mask in masks.items():
            out[weight_of(student, name, mask)] = None
            bias = student.get_submodule(name)._parameters.get("bias")
            if bias is not None:
                out[bias] = None
    else:
        expressions = [train] if isinstance(train, str) else list(train)
        named = dict(student.named_parameters())
        require_match(expressions, list(named), "train")
        out = {p: None for name, p in named.items() if any(match(name, e) for e in expressions)}
    if not out:
        raise ValueError("distill: nothing to train; pass the masks of a PruneReport, or train=")
    return list(out)


def main_output(returned: Any) -> Tensor | None:
    """The tensor among what a model returns that tells models apart, where there is a usual one."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(returned, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(returned, tuple | list) and returned:
        returned = returned[0]
    return returned if isinstance(returned, Tensor) else None


def _default_output(returned: Any, batch: Batch) -> Tensor:
    found = main_output(returned)
    if found is None:
        raise ValueError(
            f"distill: the model returns a {type(returned).__name__}; pass output= to choose the "
            "tensor to compare"
        )
    return found


def without_padding(student: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Both without padding tokens, in float32 or wider."""
    mask = batch.token_mask
    if mask is not None and student.dim() > 2 and student.shape[:2] == mask.shape:
        student, teacher = student[mask], teacher[mask]
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.to(dtype)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@torch.no_grad()
def _faster_dtype(weight: Tensor) -> torch.dtype | None:
    """bfloat16 where a matmul of a common size is clearly faster in it, else None."""
    if weight.dtype != torch.float32:
        return None
    best: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype, device=weight.device)
        times = []
        for _ in range(6):
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            start = time.perf_counter()
            (x @ x)[0, 0].item()
            times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    faster = best[torch.bfloat16] < 0.9 * best[torch.float32]
    return torch.bfloat16 if faster else None


class _Captured:
    """Outputs of named modules in the forward that ran last; the first element of a tuple.

    What the model itself returned is kept whole: a loss that runs the model does not pass it on.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        self._modules = {name: model.get_submodule(name) for name in names}
        self._states: dict[str, Tensor] = {}
        self._returned: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> _Captured:
        def keep_all(_: nn.Module, __: Any, output: Any) -> None:
            self._returned[:] = [output]

        self._stack.callback(self._model.register_forward_hook(keep_all).remove)
        for name, module in self._modules.items():

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                self._states[name] = output[0] if isinstance(output, tuple | list) else output

            self._stack.callback(module.register_forward_hook(keep).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._states.clear()
        self._returned.clear()

    @property
    def returned(self) -> Any:
        if not self._returned:
            raise ValueError(
                "distill: loss= did not call the model it was given; call model(...), not a part "
                "of it, or compare hidden states only, with output_weight=0"
            )
        return self._returned.pop()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._states:
            raise ValueError(f"distill: hidden module {name!r} did not run in the forward")
        state = self._states.pop(name)
        if not isinstance(state, Tensor):
            raise ValueError(
                f"distill: hidden module {name!r} returns a {type(state).__name__}; name a module "
                "that returns a tensor or a tuple that begins with one"
            )
        return state


class _Checkpoint:
    """The masks, the trained parameters, the optimizer's state and the losses so far, in a file."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        trained: Sequence[nn.Parameter],
        masks: Mapping[str, Tensor],
        optimizer: Optimizer,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._trained = trained
        self._masks = masks
        self._optimizer = optimizer
        self._saved_at = time.perf_counter()

    def load(self) -> tuple[list[float], float]:
        """Losses and seconds of the run to resume; nothing when there is none."""
        if self._path is None or not self._path.exists():
            return [], 0.0
        state = resume.read(self._path, "distill")
        kind = type(self._optimizer).__name__
        if [p.shape for p in state["parameters"]] != [p.shape for p in self._trained]:
            self._refuse("of another model or other trained parameters")
        if not resume.same_masks(state["masks"], self._masks):
            self._refuse("of other masks")
        if state["optimizer_type"] != kind:
            self._refuse(f"of the optimizer {state['optimizer_type']}, not {kind}")
        with torch.no_grad():
            for parameter, value in zip(self._trained, state["parameters"], strict=True):
                parameter.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        return state["losses"], state["seconds"]

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"distill: checkpoint {self._path} is {what}; delete it or pass another path"
        )

    def save(self, losses: Sequence[float], seconds: float, now: bool = False) -> None:
        if self._path is None:
            return
        if not now and time.perf_counter() - self._saved_at < CHECKPOINT_SECONDS:
            return
        state = {
            "masks": resume.pack_masks(self._masks),
            "parameters": list(self._trained),
            "optimizer_type": type(self._optimizer).__name__,
            "optimizer": self._optimizer.state_dict(),
            "losses": list(losses),
            "seconds": seconds,
        }
        resume.write(self._path, "distill", state)
        self._saved_at = time.perf_counter()
