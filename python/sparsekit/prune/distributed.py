"""Calibration by several processes, each on batches of its own.

Every rank runs the same code on the same model. What one of them meets must stop all of them: a
rank that leaves alone lets the others wait for it until their timeout. So there is one rule: every
collective is preceded by an exchange of small Python objects, and a rank that fails says so in the
exchange that the others come to next. `together` puts it around a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
P = ParamSpec("P")


class Ranks:
    """The processes of a group, in step; alone, every method is local and costs nothing.

    Args:
        group: None for one process.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self._apart = group is None
        self._size = 1 if group is None else distributed.get_world_size(group)

    @classmethod
    def of(cls, given: DistributedChoice) -> Ranks:
        """What a caller's `distributed=` means.

        Raises:
            ValueError: no process group is there, or this process is not in it.
        """
        if isinstance(given, Ranks):
            return given
        if given is None or given is False:
            return ALONE
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "distributed: no process group is initialised; call "
                "torch.distributed.init_process_group in every process first (torchrun starts them)"
            )
        group = distributed.group.WORLD if given is True else given
        if not isinstance(group, distributed.ProcessGroup) or distributed.get_rank(group) < 0:
            raise ValueError(
                "distributed: expected True or a ProcessGroup that this process belongs to, got "
                f"{group!r}"
            )
        return cls(group)

    @property
    def several(self) -> bool:
        """Whether there is more than this process."""
        return self._group is not None

    def exchange(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks.

        Raises:
            ValueError, RuntimeError: another rank failed; says which, and how.
        """
        if self._group is None:
            return [value]
        answers = self._gather((None, value))
        for rank, (failure, _) in enumerate(answers):
            if failure is not None:
                self._apart = True
                kind, text = failure
                raise kind(f"rank {rank} of {self._size} failed: {text}")
        return [answer for _, answer in answers]

    def require_same(self, what: str, value: Any) -> None:
        """Check a value that the work depends on.

        Raises:
            ValueError: another rank has another one.
        """
        values = self.exchange(value)
        for rank, theirs in enumerate(values):
            if theirs != values[0]:
                raise ValueError(
                    f"distributed: {what} of rank {rank} differs from that of rank 0; every rank "
                    f"must call with the same model and settings ({_difference(values[0], theirs)})"
                )

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, on every rank the same bits."""
        if self._group is None:
            return
        self.exchange(None)
        self._collective(
            lambda: [distributed.all_reduce(tensor, group=self._group) for tensor in tensors]
        )

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        if self._group is None:
            return
        self.exchange(None)
        first = distributed.get_global_rank(self._group, 0)
        # As bytes: not every backend knows every dtype.
        raw = [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors]
        self._collective(lambda: [distributed.broadcast(part, first, self._group) for part in raw])
        for tensor, part in zip(tensors, raw, strict=True):
            tensor.detach().copy_(part.view(tensor.dtype).view(tensor.shape))

    def leave(self, error: Exception | None) -> None:
        """The last exchange: without an error, hear whether the others made it as well."""
        if self._apart:
            return
        if error is None:
            self.exchange(None)
            return
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        self._gather(((kind, f"{type(error).__name__}: {error}"), None))

    def _gather(self, value: tuple[Any, Any]) -> list[tuple[Any, Any]]:
        out: list[Any] = [None] * self._size
        self._collective(lambda: distributed.all_gather_object(out, value, self._group))
        return out

    def _collective(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException:
            self._apart = True  # The connection is gone: nobody is left to tell.
            raise


ALONE = Ranks()
DistributedChoice: TypeAlias = "ProcessGroup | Ranks | bool | None"


def together(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function with a keyword `distributed` fail on all ranks or none.

    It gets the `Ranks` in place of what the caller gave.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        ranks = Ranks.of(cast(DistributedChoice, kwargs.get("distributed")))
        kwargs["distributed"] = ranks
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            ranks.leave(error)
            raise
        ranks.leave(None)
        return result

    return run


def all_reduce_sum(tensors: Sequence[Tensor], ranks: Ranks | None) -> None:
    """Replace each tensor by its sum over the ranks; with None or one process, nothing happens."""
    if ranks is not None:
        ranks.sum(tensors)


def mean_over_ranks(
    means: Mapping[str, Tensor], count: int, like: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """The means of the batches of all ranks.

    Args:
        means: of this rank's batches, one for each name that any of them has to do with.
        count: of this rank's batches.
        like: every name, with a tensor of the shape and on the device of its mean.
        ranks: all.

    Raises:
        ValueError: no rank has any batches.
    """
    if not ranks.several:
        return dict(means)
    answers = ranks.exchange((count, [(name, mean.dtype) for name, mean in means.items()]))
    total = sum(theirs for theirs, _ in answers)
    if total == 0:
        raise ValueError("calibration: no rank has any batches; give at least one of them some")
    dtypes = dict(named for _, names in answers for named in names)
    out = {}
    for name, tensor in like.items():
        if name in dtypes:
            mine = means.get(name)
            empty = torch.zeros(tensor.shape, dtype=dtypes[name], device=tensor.device)
            out[name] = empty if mine is None else mine * (count / total)
    for mean in out.values():
        ranks.sum([mean])
    return out


def checksum(tensor: Tensor) -> int:
    """Of the bits; equal tensors have equal ones."""
    raw = tensor.detach().contiguous().view(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[raw.element_size()]
    return int(raw.view(bits).sum(dtype=torch.int64))


def _difference(first: Any, other: Any) -> str:
    if isinstance(first, dict) and isinstance(other, dict):
        for key in [*first, *other]:
            if first.get(key) != other.get(key):
                return f"{key}: {_difference(first.get(key), other.get(key))}"
    return f"{first!r} and {other!r}"
