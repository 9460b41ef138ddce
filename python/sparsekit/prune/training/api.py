"""`train_sparse`: a plain training loop becomes one that ends in a sparse model."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sparsekit.patterns import Pattern, PatternChoice
from sparsekit.prune import resume
from sparsekit.prune.layers import Prunable
from sparsekit.prune.masks import unwrapped
from sparsekit.prune.report import PruneReport
from sparsekit.prune.targets import choose_layers
from sparsekit.prune.training.base import (
    SparseLayer,
    TrainingMethod,
    sparse_layers,
    training_report,
)
from sparsekit.prune.training.methods import TRAINING_METHODS

_KIND = "train_sparse"


def train_sparse(
    model: nn.Module,
    pattern: PatternChoice,
    method: str,
    optimizer: Optimizer,
    *,
    steps: int,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    **options: Any,
) -> SparseTraining:
    """Make a training loop sparse: from now on, the optimizer's steps lead to the pattern.

    The loop stays as it is, and so do the model's modules::

        with train_sparse(model, "2:4", "gradual", optimizer, steps=1000) as run:
            for batch in batches:  # 1000 of them
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
        print(run.report)

    A regulariser acts inside the optimizer's step: the loss stays as it is, too. The weights of a
    model in training are always the ones its forward pass uses, so that evaluating, copying and
    saving it need no care.

    Args:
        model: trained as usual. Some methods change the weights at once: random masks of RigL and
            SET, the first mask of SR-STE.
        pattern: one pattern for all layers, or a mapping from globs and `re:` expressions on module
            names to patterns (None leaves a layer dense).
        method: a name in `TRAINING_METHODS`, where each method's options stand.
        optimizer: holds the weights to prune. Its steps are counted; a step with a closure, which
            is to say LBFGS, is refused.
        steps: optimizer steps that the training will make.
        targets: globs or `re:` expressions of the layers to prune; None means every `nn.Linear`,
            `nn.Conv1d` and `nn.Conv2d`, as for `prune`.
        ignore: layers to leave dense, wins over `targets`.
        options: of the method; all have `every` (steps between updates) and `start` and `end` (the
            shares of the steps between which the method works; after `end` the masks stay).

    Returns:
        A handle; `.finish()` or leaving its `with` block ends it.

    Raises:
        ValueError: steps below 1, an unknown method or option or one out of its range, no layer to
            prune, a weight that is empty, frozen, not in the optimizer, or holds NaN or infinities:
            the model is as before.
    """
    if steps < 1:
        raise ValueError(f"train_sparse: steps must be at least 1, got {steps}")
    if method not in TRAINING_METHODS:
        known = ", ".join(sorted(TRAINING_METHODS))
        raise ValueError(f"train_sparse: unknown method {method!r}; known are {known}")
    make = TRAINING_METHODS[method]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in defaults:
            raise ValueError(
                f"train_sparse: {method!r} has no option {option!r}; it has {', '.join(defaults)}"
            )
    optimizer = unwrapped(optimizer)
    chosen, dense = choose_layers(model, pattern, targets, ignore)
    layers = sparse_layers(chosen)
    _check_trained(layers, optimizer)
    with torch.no_grad():
        made = make(layers, optimizer, steps, **options)
        return SparseTraining(method, defaults | options, steps, made, dense)


class SparseTraining:
    """A running `train_sparse`. Also a context manager, which finishes it.

    Attributes:
        method: its name.
        steps: optimizer steps that the training will make.
        step: optimizer steps made so far.
        report: what `finish` returned; None before.
    """

    def __init__(
        self,
        method: str,
        options: Mapping[str, Any],
        steps: int,
        made: TrainingMethod,
        dense: Mapping[str, tuple[Prunable, str]],
    ) -> None:
        self.method = method
        self.steps = steps
        self.step = 0
        self.report: PruneReport | None = None
        self._options = dict(options)
        self._method = made
        self._layers = made.layers
        self._patterns = {layer.name: layer.pattern for layer in self._layers}
        self._dense = dense
        self._skipped = False
        self._began = time.perf_counter()
        made.begin()
        self._handles = [
            made.optimizer.register_step_pre_hook(self._before_step),
            made.optimizer.register_step_post_hook(self._after_step),
            *(layer.weight.register_hook(_masking(layer)) for layer in self._layers),
        ]
        self._prepare_gradients()

    @property
    def masks(self) -> dict[str, Tensor]:
        """Module name -> bool of the weight's shape, False = held at zero now.

        SR-STE holds nothing but computes with these masks; group lasso and DSA have none, which is
        to say all True, before their end.
        """
        return {layer.name: layer.mask for layer in self._layers}

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weights now, over all layers to be pruned."""
        zeros = sum(int((layer.weight == 0).sum()) for layer in self._layers)
        return zeros / sum(layer.weight.numel() for layer in self._layers)

    @property
    def allocation(self) -> dict[str, Pattern | None]:
        """The pattern of each layer, None = dense: as given or, once DSA has settled, as found."""
        return {layer.name: layer.pattern for layer in self._layers}

    @torch.no_grad()
    def finish(self, early: bool = False) -> PruneReport:
        """Zero what the masks drop, take all hooks off, and report.

        Args:
            early: also when the method has steps to go: what is left to prune goes at once.

        Raises:
            ValueError: the method has steps to go, without `early`; nothing has changed.
        """
        if self.report is not None:
            return self.report
        last = self._method.window.last
        if self.step < last and not early:
            raise ValueError(
                f"train_sparse: {self.method!r} reaches the pattern at step {last} and has made "
                f"{self.step}; make {last - self.step} more, or call finish(early=True) to prune "
                "what is left at once"
            )
        if self.step < last:
            self._method.settle()
        for layer in self._layers:
            layer.hold()
        self.remove()
        self.report = training_report(self.method, self._layers, self._dense, self._began)
        return self.report

    def remove(self) -> None:
        """Take all hooks off and leave the weights as they are, pruned or not."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> SparseTraining:
        return self

    def __exit__(
        self, error: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.remove()

    # --- around the optimizer's step ----------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
            raise ValueError(
                "train_sparse: the gradients must be there before optimizer.step(), which got a "
                "closure; call loss.backward() first, with an optimizer that needs no closure"
            )
        # A fused optimizer finds out by itself that gradients overflowed, and does nothing then.
        overflowed = getattr(optimizer, "found_inf", None)
        self._skipped = overflowed is not None and bool(overflowed > 0)
        if not self._skipped and self.step < self._method.window.last:
            self._method.before_step(self.step + 1)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        if self._skipped:
            return
        self.step += 1
        last = self._method.window.last
        if self.step <= last:
            self._method.after_step(self.step)
        if self.step == last:
            self._method.settle()
        if self.step >= last:
            for layer in self._layers:
                layer.hold()
        self._prepare_gradients()

    def _prepare_gradients(self) -> None:
        dense = self._method.dense_gradients(self.step + 1)
        for layer in self._layers:
            layer.dense_gradient = dense

    # --- resuming -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the states of the model and of the optimizer.

        `tensors` are the live ones, as in the states of models and optimizers; the other entries
        are plain values.
        """
        return self._description() | {"step": self.step, "tensors": self._tensors()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the run of `state_dict` was, beside the model's and the optimizer's states.

        Raises:
            ValueError: the state is of another model, method, options, pattern or number of steps;
                nothing has changed.
        """
        expected = self._description()
        for what, mine in expected.items():
            if state.get(what) != mine:
                raise ValueError(
                    f"train_sparse: the state has {what} {state.get(what)!r}, this run has "
                    f"{mine!r}; resume with the arguments the run was started with"
                )
        live = self._tensors()
        shapes = {name: list(tensor.shape) for name, tensor in live.items()}
        if {name: list(tensor.shape) for name, tensor in state["tensors"].items()} != shapes:
            raise ValueError(
                "train_sparse: the state is of a model with weights of other shapes; load it into "
                "a run on the model it was saved from"
            )
        for name, tensor in live.items():
            tensor.copy_(state["tensors"][name])
        self.step = int(state["step"])
        for layer in self._layers:
            layer.pattern = self._patterns[layer.name]
        if self.step >= self._method.window.last:
            self._method.resettle()
        self._prepare_gradients()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all."""
        resume.write(Path(path), _KIND, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load the state that `save` wrote, as `load_state_dict` does.

        Raises:
            ValueError: the file is damaged or holds something else, or as `load_state_dict`.
            FileNotFoundError: there is none.
        """
        self.load_state_dict(resume.read(Path(path), _KIND))

    def _tensors(self) -> dict[str, Tensor]:
        # The weights as well: to begin may have changed them after the model's state was loaded.
        weights = {f"{layer.name}/weight": layer.weight.detach() for layer in self._layers}
        masks = {f"{layer.name}/mask": layer.mask for layer in self._layers}
        return weights | masks | self._method.state()

    def _description(self) -> dict[str, Any]:
        patterns = {name: str(pattern) for name, pattern in self._patterns.items()}
        return {
            "method": self.method,
            "options": self._options,
            "steps": self.steps,
            "patterns": patterns,
        }


def _masking(layer: SparseLayer) -> Callable[[Tensor], Tensor]:
    # masked_fill, not a product: 0 · NaN would be NaN.
    return lambda grad: grad if layer.dense_gradient else grad.masked_fill(~layer.mask, 0)


def _check_trained(layers: Sequence[SparseLayer], optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in layers:
        if not layer.weight.requires_grad:
            problem = "is frozen (requires_grad=False)"
        elif id(layer.weight) not in held:
            problem = "is not among the optimizer's parameters"
        else:
            continue
        raise ValueError(
            f"train_sparse: the weight of {layer.name!r} {problem}, so it cannot be trained; "
            "train it, or leave the layer out with ignore="
        )
