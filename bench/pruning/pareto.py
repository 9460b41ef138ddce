"""Accuracy against measured latency: one pattern everywhere, and mixes that `plan_latency` chose.

Every network is pruned at once, in the same way, converted, and timed in turns with all others and
with every dense engine.
"""

from __future__ import annotations

import re
import tempfile
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from bench.pruning.journal import Journal
from bench.pruning.minilm import Task, load_encoder
from sparsekit.clock import clock
from sparsekit.convert import convert
from sparsekit.demo import encoder, latency
from sparsekit.patterns import PatternChoice
from sparsekit.prune import LatencyPlan, plan_latency, prune, sensitivity

UNIFORM = ("2:4", "2:4v4", "bsr16x16@0.5", "bsr16x16@0.75")
METHOD = "admm"
_SHARES = (0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)
"""Budgets of the plans, as shares of the dense model's time."""
_BATCH, _TOKENS = 16, 128
_ROUNDS = 15


def run(journal: Journal, models: Path) -> None:
    """Fills the journal with what it lacks: the quality of each network, then one run of times.

    Args:
        journal: Where results go.
        models: Folder of the pruned networks.
    """
    task = Task()
    x = latency.example(_BATCH, _TOKENS, len(task.tokenizer))
    choices: dict[str, PatternChoice] = dict(zip(UNIFORM, UNIFORM, strict=True))
    choices |= {f"plan {share:.0%}": plan for share, plan in _plans(task, x).items()}
    models.mkdir(parents=True, exist_ok=True)
    bar = tqdm(choices.items(), unit="network")
    for name, choice in bar:
        bar.set_description(name)
        asked = {"study": "pareto", "choice": name, "method": METHOD}
        if asked in journal:
            continue
        model = deepcopy(task.dense)
        prune(model, choice, METHOD, task.calibration, encoder.ENCODER_LINEARS, progress=False)
        save_file(model.state_dict(), _path(models, name))
        journal.add(asked, {**task.quality(model), **_described(choice)})
    times = _times(task.dense, {name: _path(models, name) for name in choices}, x)
    for name, ms in times.items():
        journal.add({"study": "pareto", "time of": name}, {"ms": ms})


def _plans(task: Task, x: latency.Inputs) -> dict[float, LatencyPlan]:
    """Plans by their budgets, those that can be met, no two alike."""
    losses = sensitivity(
        task.dense,
        UNIFORM,
        task.calibration,
        method="wanda",
        reconstruction="sweep",
        targets=encoder.ENCODER_LINEARS,
        distance="cosine",
    )
    with tempfile.TemporaryDirectory() as cache:
        table = plan_latency(
            task.dense,
            x,
            UNIFORM,
            budget_ratio=1.0,
            losses=losses,
            targets=encoder.ENCODER_LINEARS,
            cache=Path(cache) / "verdicts.json",
        )
    plans: dict[float, LatencyPlan] = {}
    for share in _SHARES:
        try:
            plan = table.solve(share * table.dense_model_ms)
        except ValueError:
            break  # the rest are tighter
        if all(dict(plan) != dict(other) for other in plans.values()):
            plans[share] = plan
    return plans


def _described(choice: PatternChoice) -> dict[str, Any]:
    if not isinstance(choice, LatencyPlan):
        return {}
    chosen = {layer.name: str(layer.choice.pattern or "dense") for layer in choice.layers}
    return {"layers": chosen, "predicted_ms": choice.model_ms, "dense_ms": choice.dense_model_ms}


def _path(models: Path, name: str) -> Path:
    return models / f"pareto-{re.sub('[^a-z0-9]+', '-', name)}.safetensors"


@torch.inference_mode()
def _times(dense: nn.Module, pruned: dict[str, Path], x: latency.Inputs) -> dict[str, float]:
    """Median milliseconds of every network and dense engine, timed in turns."""
    calls: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in latency.dense_engines(dense, torch.float32, compile_models=False):
            try:
                calls[f"dense, {engine.name}"] = engine.build(x, Path(folder))
            except latency.Unavailable:
                continue
        for name, path in tqdm(pruned.items(), desc="converting", unit="network"):
            model = load_encoder(path)
            convert(
                model,
                example_inputs=x,
                targets=encoder.ENCODER_LINEARS,
                progress=False,
                cache=Path(folder) / "verdicts.json",
            )
            calls[name] = lambda model=model: model(*x)
        seconds = clock(torch.device("cpu"))
        found: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in tqdm(range(_ROUNDS), desc="timing", unit="round"):
            for name, call in calls.items():
                found[name].append(seconds(call))
    return {name: 1e3 * median(times) for name, times in found.items()}
