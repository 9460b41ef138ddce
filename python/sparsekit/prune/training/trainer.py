"""Sparse training inside `transformers.Trainer`.

Imported only by those who use it: transformers is no dependency.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sparsekit.prune.masks import HeldMasks, hold_masks, load_masks, save_masks
from sparsekit.prune.report import PruneReport
from sparsekit.prune.training.api import SparseTraining

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        'SparseTrainerCallback needs transformers: pip install "transformers[torch]"'
    ) from error


Run = Callable[[nn.Module, Optimizer, int], SparseTraining]

FILE = "sparsekit_training.safetensors"
"""Lies beside the model in each of the Trainer's checkpoints."""


class SparseTrainerCallback(TrainerCallback):
    """Holds masks, or trains sparse, while a `transformers.Trainer` trains::

        Trainer(..., callbacks=[SparseTrainerCallback(masks=report.masks)])
        Trainer(..., callbacks=[SparseTrainerCallback(
            run=lambda model, optimizer, steps: train_sparse(
                model, "2:4", "gradual", optimizer, steps=steps))])

    Every checkpoint gets a file of its own with masks and state, and `resume_from_checkpoint`
    goes on from there.

    Args:
        masks: held all the time, as by `hold_masks`.
        run: `(model, optimizer, steps) -> train_sparse(...)`, called when the training begins with
            the number of optimizer steps it will have; finished when the training ends, early if
            somebody stopped it.
        resume_from: the folder given to `trainer.train(resume_from_checkpoint=...)`, which the
            Trainer does not tell; None looks in the checkpoint of that step in `output_dir`.

    Attributes:
        report: of the finished run; None before and with `masks`.

    Raises:
        ValueError: not one of `masks` and `run`; when the training begins: as `hold_masks` and
            `train_sparse`, the checkpoint has no file of this callback, or, with `run`,
            `load_best_model_at_end`.
    """

    def __init__(
        self,
        *,
        masks: Mapping[str, Tensor] | None = None,
        run: Run | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        if (masks is None) == (run is None):
            raise ValueError("SparseTrainerCallback: pass either masks= or run=")
        self.report: PruneReport | None = None
        self._masks = masks
        self._make = run
        self._resume_from = resume_from
        self._active: SparseTraining | HeldMasks | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._stop()
        resumed = self._file(args, state) if state.global_step > 0 else None
        if resumed is not None and not resumed.exists():
            raise ValueError(
                f"SparseTrainerCallback: the training resumes at step {state.global_step}, but "
                f"{resumed} does not exist; pass resume_from= with the folder it resumes from, "
                "which must come from a training with this callback"
            )
        if self._make is None:
            assert self._masks is not None
            masks = self._masks if resumed is None else load_masks(resumed)
            self._active = hold_masks(model, masks, optimizer)
            return
        if args.load_best_model_at_end:
            raise ValueError(
                "SparseTrainerCallback: load_best_model_at_end would put the weights of one step "
                "under the masks of another; leave it off, or train with masks="
            )
        self._active = self._make(model, optimizer, state.max_steps)
        if resumed is not None:
            self._active.load(resumed)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if isinstance(self._active, SparseTraining):
            self._active.save(path)
        elif self._active is not None:
            save_masks(self._active.masks, path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self._active, SparseTraining):
            self.report = self._active.finish(early=True)
        elif self._active is not None:
            self._active.enforce()  # load_best_model_at_end has written the weights
        self._stop()

    def _stop(self) -> None:
        """Also ends a training that an exception ended."""
        if self._active is not None:
            self._active.remove()
            self._active = None

    def _file(self, args: Any, state: Any) -> Path:
        folder = self._resume_from
        if folder is None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        return Path(folder) / FILE
