"""What the examples show: the shapes each layer sees, who reads weights, which chains hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparsekit.convert.candidates import Call, Candidate
from sparsekit.examples import run_examples
from sparsekit.nn import fusion
from sparsekit.nn.memory_format import is_channels_last, put_channels_last, weights_in_nhwc


def watch(
    model: nn.Module,
    candidates: Sequence[Candidate],
    chains: dict[int, fusion.Chain],
    example_inputs: Any,
) -> None:
    """Run the examples; note the calls of each candidate, and drop the chains that do not hold.

    Convolutions are shown to each other as they will be once they are sparse: with outputs and
    dense weights in channels_last, so that an input counts as NCHW only where it will be. Where the
    model does not bear that (a `view` that needs NCHW), its convolutions stay dense. A dense 1-D
    convolution gives NCL whatever it gets; each is therefore judged as if the others were dense.

    Args:
        model: is afterwards what it was.
        candidates: those whose weight may be touched. They get `calls`, or a reason.
        chains: by `id(module)`.
        example_inputs: as for `convert`.
    """
    convolutions = [each for each in candidates if each.is_conv and not each.reason]
    seen, broken = None, ""
    if convolutions:
        try:
            seen = _observe_sparse(model, candidates, chains, example_inputs, convolutions)
        except Exception as error:
            broken = f"the model fails where its output is channels_last: {_first_line(error)}"
    if seen is None:
        # What the examples raise without our doing is raised here.
        seen = _observe(model, candidates, chains, example_inputs, set())
        for each in convolutions:
            each.reason = broken
    for each in candidates:
        key = id(each.module)
        each.calls = seen.calls.get(key, Counter())
        if key in seen.readers:
            each.reason, each.fixed = "another module reads its weight directly", True
        elif not each.calls:
            each.reason = each.reason or "it did not run on the example inputs"
    for key, chain in list(chains.items()):
        # The parent's graph is the whole truth only if nobody calls its parts by themselves.
        own = seen.calls.get(key, Counter()).total()
        if not own or any(seen.runs[id(part)] != own for part in _parts(chain)):
            del chains[key]


def _parts(chain: fusion.Chain) -> list[nn.Module]:
    places = [place for place in (chain.batchnorm, chain.activation) if place]
    return [chain.parent, *(place.module for place in places)]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@dataclass
class _Seen:
    """What a run showed, by `id(module)`: calls of layers, runs of others, whose weight is read."""

    calls: dict[int, Counter[Call]] = field(default_factory=dict)
    runs: Counter[int] = field(default_factory=Counter)
    readers: set[int] = field(default_factory=set)


def _observe_sparse(
    model: nn.Module,
    candidates: Sequence[Candidate],
    chains: dict[int, fusion.Chain],
    example_inputs: Any,
    convolutions: Sequence[Candidate],
) -> _Seen:
    """Run the examples as if the convolutions were sparse."""
    nhwc = {id(each.module) for each in convolutions}
    seen = _observe(model, candidates, chains, example_inputs, nhwc)
    flat = {id(each.module) for each in convolutions if isinstance(each.module, nn.Conv1d)}
    if flat:
        among_dense = _observe(model, candidates, {}, example_inputs, nhwc - flat).calls
        seen.calls.update((key, among_dense[key]) for key in flat & among_dense.keys())
    return seen


def _observe(
    model: nn.Module,
    candidates: Sequence[Candidate],
    chains: dict[int, fusion.Chain],
    example_inputs: Any,
    nhwc: set[int],
) -> _Seen:
    """Run the examples; the layers in `nhwc` give their outputs in channels_last."""
    seen = _Seen()
    parts = {id(part): part for chain in chains.values() for part in _parts(chain)}
    handles = [
        part.register_forward_pre_hook(lambda module, _: seen.runs.update((id(module),)))
        for part in parts.values()
    ]
    kinds = {each.module: type(each.module) for each in candidates}
    watched = {kind: _watched(kind, seen, nhwc) for kind in set(kinds.values())}
    try:
        with weights_in_nhwc(model) if nhwc else nullcontext():
            for module, kind in kinds.items():
                module.__class__ = watched[kind]
            run_examples(model, example_inputs)
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind
        for handle in handles:
            handle.remove()
    return seen


def _watched(kind: Any, seen: _Seen, nhwc: set[int]) -> Any:
    """Stands in for a layer's class: sees each call, and each look at the weight from outside."""

    class Watched(kind):
        @property
        def weight(self) -> Tensor:
            seen.readers.add(id(self))
            weight: Tensor = self._parameters["weight"]
            return weight

        def forward(self, input: Tensor) -> Tensor:
            weight = self._parameters["weight"]
            if kind is nn.Linear:
                y = nn.functional.linear(input, weight, self.bias)
                call = Call(tuple(input.shape), input.numel() // max(1, self.in_features))
            else:
                y, x, dims = self._conv_forward(input, weight, self.bias), input, weight.dim() - 2
                if self.padding_mode != "zeros":
                    sides = self._reversed_padding_repeated_twice
                    x = nn.functional.pad(x, sides, mode=self.padding_mode)
                if id(self) in nhwc:
                    y = put_channels_last(y, dims)
                pixels = y.numel() // self.out_channels
                call = Call(tuple(x.shape), pixels, dims, is_channels_last(x, dims))
            seen.calls.setdefault(id(self), Counter())[call] += 1
            return y

    return Watched
