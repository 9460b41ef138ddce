"""Channel permutation: reorder channels so that a pattern keeps more of what matters.

Which channels lie side by side is an accident of training, but it decides which of them compete
inside a group of N:M or share a block. A layer's input channels may come in any order as long as
the layers that make them put them out in the same one: `find_permutation` looks for a good order,
`permute_channels` applies it, and the network computes what it did. `permute` does both for a whole
network. All of it comes before pruning.

The idea and the search by swaps of channels: Pool & Yu 2021, "Channel Permutations for N:M
Sparsity", NeurIPS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sparsekit.patterns import NM, BlockSparse, PatternLike, parse_pattern
from sparsekit.prune.layers import PRUNABLE, groups_of
from sparsekit.prune.permutation.swaps import Search, column_terms, rows_of

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.GroupNorm,
    nn.LayerNorm,
)


@torch.no_grad()
def kept_share(
    weights: Tensor | Sequence[Tensor], pattern: PatternLike, permutation: Tensor | None = None
) -> float:
    """How much of the weights' magnitude a pattern keeps, from 0 to 1.

    Args:
        weights: as for `find_permutation`.
        pattern: what the weights shall follow.
        permutation: order of the input channels to look at; None takes them as they are.
    """
    found = _read_weights(weights, "kept_share")
    search = _search(found, known(pattern, "kept_share"), rows=None)
    order = _order(permutation, search.channels, "kept_share")
    total = sum(float(weight.abs().sum(dtype=torch.float64)) for weight in found)
    return search.kept(order.to(found[0].device)) / total if total else 1.0


@torch.no_grad()
def find_permutation(
    weights: Tensor | Sequence[Tensor],
    pattern: PatternLike,
    *,
    rounds: int = 200,
    rows: int = 2048,
) -> Tensor:
    """An order of the input channels that raises the magnitude a pattern keeps.

    Starts with the order there is, and in each round swaps pairs of channels of different groups
    (blocks), the best pairs first, until no swap gains; for N:M, a few rounds then pass channels
    on along longer cycles of groups. A round costs about `channels² · rows` operations at the
    start and less towards the end.

    Args:
        weights: of every layer that reads these channels: `[n, k]`, `[n, channels, length]` or
            `[n, channels, height, width]`, or one such tensor. Scores of a pruning method will do
            as well; what counts is the sum of absolute values, so scale them if one layer shall
            count for more.
        pattern: what the weights shall follow.
        rounds: most rounds of swaps and cycles.
        rows: most rows that the search looks at; of more (a filter has one for each tap), this many
            evenly spaced ones.

    Returns:
        int64 `[channels]`: `weight[:, permutation]` is the weight in the new order, channel
        `permutation[i]` comes to place i. The same for the same weights; never worse than the order
        there is.

    Raises:
        ValueError: no weights, weights of different numbers of channels, not 2-D to 4-D or not
            finite; `rounds` or `rows` below 1.
    """
    for name, value in (("rounds", rounds), ("rows", rows)):
        if value < 1:
            raise ValueError(f"find_permutation: {name} must be at least 1, got {value}")
    found = _read_weights(weights, "find_permutation")
    chosen = known(pattern, "find_permutation")
    order = _search(found, chosen, rows).run(rounds)
    # The search may have looked at a part of the rows alone.
    whole, start = _search(found, chosen, rows=None), torch.arange(len(order), device=order.device)
    return order if whole.kept(order) > whole.kept(start) else start


@torch.no_grad()
def permute_channels(
    producers: Sequence[nn.Module],
    consumers: Sequence[nn.Module],
    permutation: Tensor | Sequence[int],
) -> None:
    """Reorder the channels between layers in place; the network computes what it did.

    The caller names every module that sees these channels; where a residual sum adds several
    layers up, all of them are producers. Modules without parameters (activations, pooling) need no
    mention. Make the optimizer, and the masks, afterwards.

    Args:
        producers: what makes the channels and what normalises them in between: `nn.Linear`,
            `nn.Conv1d`, `nn.Conv2d` (their output channels; a depthwise one has its input channels
            follow), batch and instance norms, `nn.LayerNorm` over the channels alone,
            `nn.GroupNorm` of one group (or of one channel a group).
        consumers: what reads them: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`; their input channels.
        permutation: as `find_permutation` returns it.

    Raises:
        ValueError: a module that does not have these channels, cannot be permuted (other grouped
            convolutions, group norms) or is of another kind; not a permutation. Nothing is changed.
    """
    if not producers or not consumers:
        missing = "consumers" if producers else "producers"
        raise ValueError(
            f"permute_channels: {missing} is empty; name every layer that "
            + ("reads the channels" if producers else "makes the channels")
        )
    permutation = torch.as_tensor(permutation)
    order = _order(permutation, permutation.numel(), "permute_channels")
    # Keyed, so that a tensor two modules share is permuted once.
    steps: dict[tuple[Tensor, int], None] = {}
    for index, module in enumerate(producers):
        steps.update(dict.fromkeys(_outputs(module, f"producers[{index}]", len(order))))
    for index, module in enumerate(consumers):
        steps[_input(module, f"consumers[{index}]", len(order))] = None
    for tensor, dim in steps:
        tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


# --- what to permute --------------------------------------------------------------------------


def _outputs(module: nn.Module, name: str, channels: int) -> Iterator[tuple[Tensor, int]]:
    """The tensors of a producer that have an entry for each channel."""
    kind = type(module).__name__
    if isinstance(module, nn.GroupNorm) and module.num_groups not in (1, module.num_channels):
        raise ValueError(
            f"permute_channels: {name} is a GroupNorm of {module.num_groups} groups, whose "
            "statistics would mix other channels; leave these channels in their order"
        )
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1:
        if not module.groups == module.in_channels == module.out_channels:
            raise ValueError(
                f"permute_channels: {name} is a {kind} of {module.groups} groups, whose output "
                "channels cannot leave their group; leave these channels in their order"
            )
    elif not isinstance(module, (*PRUNABLE, *_NORMS)):
        raise ValueError(
            f"permute_channels: {name} is a {kind}; expected nn.Linear, nn.Conv1d, nn.Conv2d or a "
            "normalisation"
        )
    for key in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, key, None) is None:
            continue
        tensor = _own(module, key, name)
        # A LayerNorm over more than the channels has no entry for each of them.
        if len(tensor) != channels or (tensor.dim() > 1 and isinstance(module, _NORMS)):
            raise ValueError(
                f"permute_channels: the {key} of {name} ({kind}) has shape {list(tensor.shape)}, "
                f"the permutation has {channels} channels; name modules that put these out"
            )
        yield tensor, 0


def _input(module: nn.Module, name: str, channels: int) -> tuple[Tensor, int]:
    """The weight of a consumer."""
    kind = type(module).__name__
    if not isinstance(module, PRUNABLE):
        raise ValueError(
            f"permute_channels: {name} is a {kind}; expected nn.Linear, nn.Conv1d or nn.Conv2d"
        )
    if groups_of(module) > 1:
        raise ValueError(
            f"permute_channels: {name} is a {kind} of {groups_of(module)} groups, whose input "
            "channels cannot leave their group; name a depthwise convolution as a producer, and "
            "leave the channels of others in their order"
        )
    weight = _own(module, "weight", name)
    if weight.shape[1] != channels:
        raise ValueError(
            f"permute_channels: {name} ({kind}) reads {weight.shape[1]} channels, the permutation "
            f"has {channels}"
        )
    return weight, 1


def _own(module: nn.Module, key: str, name: str) -> Tensor:
    """A parameter or buffer that can be written: not one that is computed at each look."""
    tensor: Tensor | None = module._parameters.get(key)
    if tensor is None:
        tensor = module._buffers.get(key)
    if tensor is None or type(tensor.data) is not Tensor:
        raise ValueError(
            f"permute_channels: the {key} of {name} ({type(module).__name__}) is parametrised or "
            "quantised; permute before that"
        )
    return tensor


def _order(permutation: Tensor | None, channels: int, what: str) -> Tensor:
    """The permutation as int64, checked."""
    if permutation is None:
        return torch.arange(channels)
    whole = not (permutation.is_floating_point() or permutation.dtype == torch.bool)
    order = permutation.flatten().long() if whole else permutation
    if (
        not whole
        or permutation.shape != (channels,)
        or not torch.equal(order.sort().values.cpu(), torch.arange(channels))
    ):
        raise ValueError(
            f"{what}: expected a permutation that holds each of 0 to {channels - 1} once, "
            f"[{channels}] integers, got {permutation.dtype} {list(permutation.shape)}"
        )
    return order


def _search(weights: Sequence[Tensor], pattern: NM | BlockSparse, rows: int | None) -> Search:
    scores = [rows_of(weight, pattern) for weight in weights]
    step = 1 if rows is None else -(-sum(map(len, scores)) // rows)
    return Search(column_terms(scores, pattern, step))


def known(pattern: PatternLike, what: str) -> NM | BlockSparse:
    """A pattern that there is a search for."""
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NM | BlockSparse):
        raise ValueError(
            f"{what}: expected an N:M or block pattern, got {parsed}; others have no search yet"
        )
    return parsed


def _read_weights(weights: Tensor | Sequence[Tensor], what: str) -> list[Tensor]:
    found = [weights] if isinstance(weights, Tensor) else list(weights)
    if not found:
        raise ValueError(f"{what}: no weights; pass those of every layer that reads the channels")
    for index, weight in enumerate(found):
        if not 2 <= weight.dim() <= 4 or weight.numel() == 0:
            raise ValueError(
                f"{what}: expected weights of shape [n, channels, ...], not empty, got "
                f"{list(weight.shape)} at {index}"
            )
        if weight.shape[1] != found[0].shape[1]:
            raise ValueError(
                f"{what}: weight {index} reads {weight.shape[1]} channels, the first one "
                f"{found[0].shape[1]}; pass layers that read the same channels"
            )
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{what}: weight {index} holds NaN or infinities")
    return found
