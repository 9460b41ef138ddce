"""Which channels of a network may change places: what is known about them, and what follows.

Every position along a dimension of a parameter is an *atom*. What an operation does says how atoms
relate, and three relations are enough:

- `same`: two atoms are one channel (a residual sum adds them, a product contracts them).
- `part`: a dimension is a part of another one (a slice, a concatenation, the heads of a
  projection), so that an order of the whole must be an order of that part.
- `freeze`: the channel keeps its place.

`Freedom` solves them. Atoms that are the same form *channels*, and channels fall into *blocks*: all
orders that keep every channel inside its block are allowed, and no relation is hurt by them. A
channel may appear several times in one dimension (its pixels after a flatten, the heads that share
a key and value, both halves of a fused gate): then its k-th appearance moves to where the k-th
appearance of another channel was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Atoms: TypeAlias = npt.NDArray[np.int64]

TANGLED = "its channels are cut, repeated or joined in a way that leaves each of them one place"


class Ledger:
    """Collects the relations between atoms."""

    def __init__(self) -> None:
        self.atoms = 0
        self.pairs: list[tuple[Atoms, Atoms]] = []
        self.frozen: list[tuple[Atoms, str]] = []
        # (whole, part that each of its positions belongs to), keyed to keep each one once.
        self.parts: dict[tuple[bytes, bytes], tuple[Atoms, Atoms]] = {}

    def fresh(self, size: int) -> Atoms:
        """Atoms of a new dimension, `[size]`."""
        self.atoms += size
        return np.arange(self.atoms - size, self.atoms)

    def same(self, first: Atoms, second: Atoms) -> None:
        """The atoms are pairwise the same channel; shapes broadcast."""
        if first is not second:
            one, other = np.broadcast_arrays(first, second)
            self.pairs.append((one.ravel(), other.ravel()))

    def freeze(self, atoms: Atoms, reason: str) -> None:
        self.frozen.append((np.unique(atoms), reason))

    def part(self, whole: Atoms, part: Atoms) -> None:
        """Cut dimensions into parts.

        Args:
            whole: `[..., size]`, each row a dimension.
            part: int64 `[size]`, the part that a position belongs to; its positions in the order of
                the whole.
        """
        for row in np.unique(whole.reshape(-1, whole.shape[-1]), axis=0):
            self.parts[row.tobytes(), part.tobytes()] = (row, part)


@dataclass
class Freedom:
    """The solved relations.

    Attributes:
        channel: atom -> channel, int64.
        block: channel -> block, int64; channels of one block may change places.
    """

    channel: Atoms
    block: Atoms
    _why: Atoms
    _reasons: list[str]
    _blocks: int = 1

    @classmethod
    def solve(cls, ledger: Ledger) -> Freedom:
        """What the ledger's relations leave free."""
        channel = _components(ledger.atoms, ledger.pairs)
        found = cls(channel, np.zeros(ledger.atoms, np.int64), np.full(ledger.atoms, -1), [])
        for index, (atoms, reason) in reversed(list(enumerate(ledger.frozen))):
            found._why[channel[atoms]] = index
            found._reasons.insert(0, reason)
        found._isolate(np.flatnonzero(found._why >= 0))
        wholes = [(channel[whole], part) for whole, part in ledger.parts.values()]
        # Channels of one block appear equally often in every part.
        for whole, part in wholes:
            for piece in _pieces(whole, part):
                found._refine(*np.unique(piece, return_counts=True))
        # ... and a part takes the same appearances of them, out of those in the whole.
        for whole, part in wholes:
            found._isolate(found._crossed(whole, part))
        return found

    @property
    def _real(self) -> npt.NDArray[np.bool_]:
        """Which numbers are channels: the atom that stands for its channel."""
        return self.channel == np.arange(len(self.channel))

    @cached_property
    def sizes(self) -> Atoms:
        """Channels of each block."""
        return np.bincount(self.block[self._real], minlength=self._blocks)

    def free(self, atoms: Atoms) -> npt.NDArray[np.bool_]:
        """Which of the atoms can change places with another one."""
        return self.sizes[self.block[self.channel[atoms]]] > 1

    def reason(self, atom: int) -> str:
        """Why an atom that is not free keeps its place."""
        index = self._why[self.channel[atom]]
        return TANGLED if index < 0 else self._reasons[index]

    def order(self, atoms: Atoms, moved: Atoms) -> Atoms:
        """The new order of a dimension: position p takes what was at `order[p]`.

        Args:
            atoms: `[size]`, the dimension.
            moved: channel -> the channel that takes its place.
        """
        channels = self.channel[atoms]
        nth = appearance(channels)
        keys, wanted = channels * len(atoms) + nth, moved[channels] * len(atoms) + nth
        by_key = np.argsort(keys, kind="stable")
        return by_key[np.searchsorted(keys[by_key], wanted)]

    def _isolate(self, channels: Atoms) -> None:
        """A block of its own for each of the channels."""
        self._rename(channels, np.arange(len(channels)))

    def _refine(self, channels: Atoms, counts: Atoms) -> None:
        """Tell the channels apart by their counts, and from those that are not here."""
        keys = self.block[channels] * (counts.max(initial=0) + 1) + counts
        self._rename(channels, np.unique(keys, return_inverse=True)[1])

    def _rename(self, channels: Atoms, names: Atoms) -> None:
        self.block[channels] = self._blocks + names
        self._blocks += int(names.max(initial=-1)) + 1

    def _crossed(self, whole: Atoms, part: Atoms) -> Atoms:
        """Channels of blocks whose appearances in a part do not match those in the whole."""
        if len(np.unique(whole)) == len(whole):
            return whole[:0]
        nth = appearance(whole)
        bad = [whole[:0]]
        for name in np.unique(part):
            places = np.flatnonzero(part == name)
            here = appearance(whole[places])
            blocks = self.block[whole[places]]
            order = np.lexsort((nth[places], here, blocks))
            blocks, here, there = blocks[order], here[order], nth[places][order]
            differs = (np.diff(blocks) == 0) & (np.diff(here) == 0) & (np.diff(there) != 0)
            tangled = np.unique(blocks[1:][differs])
            bad.append(np.flatnonzero(self._real & np.isin(self.block, tangled)))
        return np.unique(np.concatenate(bad))


def _pieces(whole: Atoms, part: Atoms) -> Iterator[Atoms]:
    for name in np.unique(part):
        yield whole[part == name]


def appearance(channels: Atoms) -> Atoms:
    """For each position, how many of the same channel come before it."""
    order = np.argsort(channels, kind="stable")
    ordered = channels[order]
    first = np.searchsorted(ordered, ordered)
    out = np.empty_like(channels)
    out[order] = np.arange(len(channels)) - first
    return out


def _components(atoms: int, pairs: list[tuple[Atoms, Atoms]]) -> Atoms:
    """The least atom that each one is joined with."""
    root = np.arange(atoms)
    first = np.concatenate([root[:0], *(one for one, _ in pairs)])
    second = np.concatenate([root[:0], *(other for _, other in pairs)])
    while True:
        one, other = root[first], root[second]
        apart = one != other
        if not apart.any():
            return root
        first, second = first[apart], second[apart]
        low, high = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]
