"""Swap the layers of a model for sparse ones where that is correct and faster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm

from sparsekit.convert.candidates import Candidate, choose_pattern, find_candidates
from sparsekit.convert.judge import Judgement, judge, make_sparse
from sparsekit.convert.report import ConvertReport, ConvertRow
from sparsekit.convert.watch import watch
from sparsekit.gate import VerdictCache
from sparsekit.nn import (
    FoldedBatchNorm,
    FusedActivation,
    batchnorm,
    fuse_residuals,
    fusion,
)
from sparsekit.nn.memory_format import put_weights_in_nhwc
from sparsekit.patterns import PatternChoice, require_match

Gate = Literal["measure", "always"]


def convert(
    model: nn.Module,
    pattern: PatternChoice | None = None,
    example_inputs: Any = None,
    gate: Gate = "measure",
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    fuse: bool | Literal["all"] = True,
    fold_batchnorm: bool = False,
    progress: bool = True,
    cache: str | os.PathLike[str] | None = None,
) -> ConvertReport:
    """Replace `nn.Linear`, `nn.Conv1d` and `nn.Conv2d`, in place, by sparse layers where they win.

    A layer stays dense, with the reason in the report, when somebody else reads its weight
    (`nn.MultiheadAttention`, the fused path of `nn.TransformerEncoderLayer`, tied embeddings, a
    parent that looks at `.weight`), when it is depthwise, parametrised, quantised or not pruned,
    when it did not run, or when dense is as fast. Transposed convolutions are not looked at.

    Sparse convolutions compute in NHWC (torch's channels_last). Once there is one, the weights of
    the dense `nn.Conv2d` become channels_last too, so that the whole model stays in that format;
    where an input still comes as NCHW, the time to convert it counts, and the report says so.

    Args:
        model: on a CPU or a GPU. Its modes (train, eval) are kept; the examples run in eval mode.
        pattern: None takes the pattern that each weight's zeros follow already (after
            `sparsekit.prune`, or pruned elsewhere). A pattern, or a mapping from globs and `re:`
            expressions to patterns, is applied to every layer it names; a weight that does not
            fit yet is pruned by magnitude.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments
            for the model, or a list of these. Needed to measure, to fuse and to fold.
        gate: "measure" keeps a layer only if it is at least `sparsekit.gate.MIN_SPEEDUP` times as
            fast as the fastest dense path over the examples and not slower at any shape seen;
            "always" converts without measuring.
        targets: which layers, by globs or `re:` expressions; None means all.
        ignore: layers left alone; wins over `targets`.
        fuse: also fuse a ReLU, ReLU6, GELU or SiLU module into the layer before it where the
            parent's graph proves that nothing else reads the layer's output; the activation module
            becomes an identity (`sparsekit.nn.FusedActivation`). "all" also lets sparse
            convolutions do the residual adds and the shared or functional activations that follow
            them, by a rewritten forward (`sparsekit.nn.fuse_residuals`).
        fold_batchnorm: fold each batch normalisation that is in eval mode into the chosen layer
            before it, proven in the same way, whether that layer becomes sparse or stays dense; the
            normalisation becomes an identity (`sparsekit.nn.FoldedBatchNorm`). Zeros stay zeros.
            The statistics are gone then: the model cannot be trained on.
        progress: show a progress bar.
        cache: file for the verdicts; None for the user's cache folder.

    Returns:
        The report, one row per layer chosen. Biases stay the parameters they were; weights of
        sparse layers are frozen from then on.

    Raises:
        ValueError: a bad argument, or a weight with NaN or infinity (the model is unchanged then).
    """
    if gate not in ("measure", "always"):
        raise ValueError(f"convert: gate must be 'measure' or 'always', got {gate!r}")
    if gate == "measure" and example_inputs is None:
        raise ValueError(
            "convert: gate='measure' needs example_inputs, to know which shapes to time; pass what "
            "the model is called with, or gate='always'"
        )
    if fuse not in (True, False, "all"):
        raise ValueError(f"convert: fuse must be True, False or 'all', got {fuse!r}")
    if fold_batchnorm and example_inputs is None:
        raise ValueError(
            "convert: fold_batchnorm=True needs example_inputs, to see that nobody calls a batch "
            "normalisation or its layer by itself; pass what the model is called with"
        )
    candidates = find_candidates(model, targets, ignore)
    if isinstance(pattern, Mapping):
        require_match(pattern, [each.name for each in candidates], "convert: pattern")
    for each in candidates:
        if not each.reason:
            choose_pattern(each, pattern)
    chains: dict[int, fusion.Chain] = {}
    if example_inputs is not None:
        movable = [each for each in candidates if not each.fixed]
        if fuse or fold_batchnorm:
            followed = [each for each in movable if fold_batchnorm or not each.reason]
            chains = fusion.find(model, [each.module for each in followed])
        watch(model, movable, chains, example_inputs)
    for each in candidates:
        _take_in(each, chains.get(id(each.module)), fold_batchnorm)
    verdicts = VerdictCache(cache) if gate == "measure" else None
    bar = tqdm(candidates, desc="convert", unit="layer", disable=not progress)
    rows = [_convert_layer(each, bool(fuse), verdicts) for each in bar]
    sparse = {row.layer for row in rows if row.verdict == "sparse"}
    if any(each.is_conv and each.name in sparse for each in candidates):
        put_weights_in_nhwc(model)
    if fuse == "all":
        rows = _with_residuals(model, rows)
    return ConvertReport(rows)


def _with_residuals(model: nn.Module, rows: Sequence[ConvertRow]) -> list[ConvertRow]:
    names = {id(module): name for name, module in model.named_modules()}
    absorbed = {names[id(each.conv)]: each for each in fuse_residuals(model)}
    return [
        replace(
            row,
            activation=absorbed[row.layer].activation or row.activation,
            residual=absorbed[row.layer].residual,
        )
        if row.layer in absorbed
        else row
        for row in rows
    ]


def _take_in(candidate: Candidate, chain: fusion.Chain | None, fold_batchnorm: bool) -> None:
    """Fold the batch normalisation that follows, and note the activation behind it."""
    if chain is None or candidate.fixed:
        return
    candidate.activation = chain.activation
    place = chain.batchnorm
    if place is None:
        return
    candidate.activation = None
    if not fold_batchnorm:
        return
    obstacle = _fold(candidate, place.module)
    if obstacle:
        candidate.notes.append(f"its batch normalisation {place.attribute!r} {obstacle}")
        return
    passed = FoldedBatchNorm.in_place_of(place.module)
    setattr(place.parent, place.attribute, passed)
    candidate.folded = True
    if chain.activation and chain.activation.parent is place.module:
        candidate.activation = replace(chain.activation, parent=passed)
    else:
        candidate.activation = chain.activation


def _fold(candidate: Candidate, module: nn.Module) -> str:
    if not candidate.is_batched:
        return "was given inputs whose first dimension does not count examples"
    if candidate.bias_tied_to:
        return f"would change a bias that is tied to {candidate.bias_tied_to}"
    return batchnorm.fold(candidate.module, module)


def _convert_layer(candidate: Candidate, fuse: bool, verdicts: VerdictCache | None) -> ConvertRow:
    if candidate.reason or candidate.pattern is None:
        return _row(candidate, candidate.reason)
    dense = candidate.module
    place = candidate.activation if fuse else None
    activation = fusion.activation_name(place.module) if place else None
    try:
        sparse = make_sparse(candidate, activation)
        judged = judge(candidate, sparse.packed, activation, verdicts)
    except NotImplementedError as error:
        return _row(candidate, str(error))
    if judged.lost:
        return _row(candidate, judged.reason, judged)
    sparse.bias = dense.bias  # the parameter itself, whoever else holds it
    for parent, attribute in candidate.places:
        setattr(parent, attribute, sparse)
    if place and activation:
        fused = FusedActivation(activation).train(place.module.training)
        setattr(place.parent, place.attribute, fused)
    note = "pruned by magnitude; " if candidate.mask is not None else ""
    return _row(candidate, note + judged.reason, judged, activation)


def _row(
    candidate: Candidate,
    reason: str,
    judged: Judgement | None = None,
    activation: str | None = None,
) -> ConvertRow:
    return ConvertRow(
        layer=candidate.name,
        pattern=None if candidate.pattern is None else str(candidate.pattern),
        kernel=judged.kernel if judged else None,
        dense_ms=judged.dense_ms if judged else None,
        sparse_ms=judged.sparse_ms if judged else None,
        speedup=judged.speedup if judged else None,
        verdict="sparse" if judged and not judged.lost else "dense",
        reason="; ".join([reason, *candidate.notes]),
        activation=activation,
        m=tuple(call.m for call in candidate.calls.elements()),
        batchnorm=candidate.folded,
        inputs=tuple(map(str, candidate.calls.elements())) if candidate.is_conv else (),
        nchw_ms=judged.nchw_ms if judged else None,
    )
