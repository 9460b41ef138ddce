"""How long each layer takes with each of several patterns, without changing the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from sparsekit.convert.candidates import Candidate, choose_pattern, find_candidates
from sparsekit.convert.judge import Judgement, judge, make_sparse
from sparsekit.convert.watch import watch
from sparsekit.gate import VerdictCache
from sparsekit.nn import fusion
from sparsekit.patterns import Pattern


@dataclass(frozen=True)
class LayerTime:
    """A layer with one pattern, over all its calls.

    Attributes:
        judged: what `convert` would find.
        nbytes: size of the packed weight.
    """

    judged: Judgement
    nbytes: int


def time_layers(
    model: nn.Module,
    patterns: Sequence[Pattern],
    example_inputs: Any,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    fuse: bool = True,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[dict[str, dict[Pattern, LayerTime]], dict[str, str]]:
    """Measure what `convert(gate="measure")` would, once for each pattern.

    Weights that do not fit a pattern are packed with its magnitude mask: which values are kept
    makes no difference to the time.

    Args:
        model: is afterwards what it was.
        patterns: to time.
        example_inputs: as for `convert`.
        targets: as for `convert`.
        ignore: as for `convert`.
        fuse: as for `convert`: an activation that may move into a layer is part of both times.
        cache: as for `convert`; it shares the verdicts.
        progress: show a progress bar.

    Returns:
        (layer name -> pattern -> time, layer name -> why it was not timed).
    """
    candidates = find_candidates(model, targets, ignore)
    movable = [each for each in candidates if not each.fixed]
    followed = [each.module for each in movable if not each.reason]
    chains = fusion.find(model, followed) if fuse else {}
    watch(model, movable, chains, example_inputs)
    verdicts = VerdictCache(cache)
    times: dict[str, dict[Pattern, LayerTime]] = {}
    reasons: dict[str, str] = {}
    for each in tqdm(candidates, desc="time layers", unit="layer", disable=not progress):
        if each.reason:
            reasons[each.name] = each.reason
            continue
        activation = _activation(each, chains)
        mine: dict[Pattern, LayerTime] = {}
        for pattern in patterns:
            found = _time(each, pattern, activation, verdicts)
            if isinstance(found, str):
                reasons[each.name] = f"{pattern}: {found}"
            else:
                mine[pattern] = found
        if mine:
            reasons.pop(each.name, None)
            times[each.name] = mine
    return times, reasons


def _activation(candidate: Candidate, chains: Mapping[int, fusion.Chain]) -> str | None:
    chain = chains.get(id(candidate.module))
    # One behind a batch normalisation would move only with that.
    return chain.activation_name if chain and chain.batchnorm is None else None


def _time(
    candidate: Candidate, pattern: Pattern, activation: str | None, verdicts: VerdictCache
) -> LayerTime | str:
    """The time, or why there is none."""
    tried = replace(candidate)
    choose_pattern(tried, pattern)
    if tried.reason:
        return tried.reason
    try:
        packed = make_sparse(tried, activation).packed
        judged = judge(tried, packed, activation, verdicts)
    except NotImplementedError as error:
        return str(error)
    return judged.reason if judged.dense_ms is None else LayerTime(judged, packed.nbytes)
