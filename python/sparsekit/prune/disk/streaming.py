"""`prune_file`: pruning a checkpoint that does not fit into memory, layer by layer.

The model's structure is on the meta device; its tensors stay in the source's files until a module
runs (`lending`). A layer is written to its shard of the new checkpoint as soon as it is pruned, and
the forward reads it from there. A journal beside the shards says what was agreed on at the start
and which layers are done, so that a run that was killed goes on where it stopped: what is read is
the same as without the interruption, and so is every result.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from tqdm import tqdm

from sparsekit.patterns import PatternChoice
from sparsekit.prune.calibration import (
    CACHE_BYTES,
    Batch,
    Calibration,
    Group,
    Loss,
    read_batches,
)
from sparsekit.prune.disk.lending import Lender
from sparsekit.prune.disk.shards import (
    Checkpoint,
    PathLike,
    Source,
    write_index,
    write_json,
    write_shard,
)
from sparsekit.prune.layers import Layer
from sparsekit.prune.layerwise import (
    Run,
    check_weight,
    choose_method,
    describe,
    require_groups,
    warn_of_few,
)
from sparsekit.prune.patches import PIXELS
from sparsekit.prune.reconstruct import ReconstructionOptions
from sparsekit.prune.report import PrunedLayer, PruneReport
from sparsekit.prune.targets import choose_layers

JOURNAL = "prune.json"
_VERSION = 1
# Of the shards for what is not pruned.
_SHARD_BYTES = 512 << 20


@torch.no_grad()
def prune_file(
    model: nn.Module,
    source: Source,
    out: PathLike,
    pattern: PatternChoice,
    method: str = "sparsegpt",
    calibration: Iterable[Any] | None = None,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    progress: bool = True,
    reconstruction: str | None = None,
    solver_block: int = 128,
    dampening: float = 0.01,
    cache_bytes: int = CACHE_BYTES,
    pixels: int = PIXELS,
    loss: Loss | None = None,
    device: torch.device | str = "cpu",
) -> PruneReport:
    """Prune a checkpoint on disk into another one, without the model in memory.

    Does what `prune` does, in the same order and to the same bits, for a model of any size: in
    memory are one layer at a time with its second moment and the solver's copies (about ten
    matrices `[n, k]` or `[k, k]` in float32), the batches, and the outputs of one block for all of
    them. Weights are read from the memory-mapped files when a module runs.

    `out` becomes a folder of safetensors shards with `model.safetensors.index.json`, with the names
    and dtypes of the source: the pruned layers one by one, and everything else. A run that was
    killed or failed goes on where it stopped when it is called again in the same way, on the same
    machine with the same threads to the same bits; `prune.json` in `out` is its journal.

    Args:
        model: built under `torch.device("meta")`, in the dtype to compute in; weights of another
            dtype are cast each time that they are read. Buffers that the source lacks, tables of
            rotary embeddings for instance, must be real.
        source: a safetensors file, a list of shards, or a folder of them with an index.
        out: a new or empty folder, or that of the run to go on with.
        pattern: as for `prune`; so are the following.
        method: a name in `METHODS`, of those without a statistic of the whole model.
        calibration: batches, on `device`.
        targets: layers to prune.
        ignore: layers to leave dense.
        progress: show a progress bar.
        reconstruction: a name in `RECONSTRUCTIONS`.
        solver_block: SparseGPT's column batch.
        dampening: of the second moment's diagonal.
        cache_bytes: most memory for the outputs of finished blocks.
        pixels: most output pixels of a convolution that count in one batch.
        loss: runs the model.
        device: where it runs.

    Returns:
        What was done to each layer. `masks` reads the files: True where a weight is not zero.

    Raises:
        ValueError: as `prune`; a tensor that the source lacks or has in another shape, a damaged
            file, a layer whose weight is not on the meta device, a folder that holds something
            else or a run with other settings, data or source.
        OSError: a file cannot be read or written, or the disk is too small. Layers that are
            finished stay so.
        RuntimeError: the folder is in use by another process.
    """
    started = time.perf_counter()
    chosen_method, name, solve = choose_method(method, reconstruction, calibration is not None)
    if chosen_method.statistic is not None:
        raise ValueError(
            f"prune_file: method {method!r} looks at the whole model before it prunes; use prune, "
            "or a method that goes layer by layer, such as 'sparsegpt'"
        )
    if pixels < 1:
        raise ValueError(f"prune_file: pixels must be at least 1, got {pixels}")
    options = ReconstructionOptions(solver_block, dampening)
    batches = None if calibration is None else read_batches(calibration, loss=loss)
    chosen, dense = choose_layers(model, pattern, targets, ignore)
    layers = [layer for layer, _ in chosen.values()]
    patterns = {layer_name: wanted for layer_name, (_, wanted) in chosen.items()}
    checkpoint = Checkpoint(source)
    device = torch.device(device)
    lender = Lender(model, checkpoint, device)
    _check_on_meta(layers, lender)
    settings = {
        "pattern": {layer_name: str(wanted) for layer_name, wanted in patterns.items()},
        "method": method,
        "reconstruction": name,
        "solver_block": solver_block,
        "dampening": dampening,
        "pixels": pixels,
        "loss": None if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
        "dtype of the model": sorted({str(layer.weight.dtype) for layer in layers}),
        "calibration": None if batches is None else _digest(batches),
        "source": checkpoint.identity(),
    }
    named = {layer.name: layer for layer in layers}
    names = {layer.name: lender.names[layer.weight] for layer in layers}
    with ExitStack() as stack:
        target = stack.enter_context(_Output.at(Path(out), settings, checkpoint, lender, names))
        stack.enter_context(lender)
        resumed = target.groups is not None
        if not resumed:
            # Hours of work are not to end at a weight that was bad from the start.
            for layer in layers:
                with lender.weight_of(layer):
                    check_weight(layer)
        groups = [Group([named[n] for n in group], calls) for group, calls in target.groups or []]
        run: Calibration | None = None
        if batches is not None and not target.is_complete:
            known = groups if resumed else None
            run = stack.enter_context(
                Calibration(model, batches, layers, cache_bytes, pixels, groups=known)
            )
            require_groups(run)
            groups = run.groups
        elif not resumed:
            groups = [Group([layer]) for layer in layers]
        if not resumed:
            target.plan(groups)
        target.write_rest()
        tokens: dict[str, int] = {}
        total = sum(len(group.layers) for group in groups)
        description = f"prune ({method})"
        with tqdm(
            total=total, initial=len(target.done), desc=description, disable=not progress
        ) as bar:
            for group in groups:
                todo = [layer for layer in group.layers if layer.name not in target.done]
                moments = run.moments(group) if run is not None and todo else None
                if run is not None and todo:
                    tokens |= dict.fromkeys((layer.name for layer in todo), run.count)
                for layer in todo:
                    bar.set_postfix_str(layer.name, refresh=False)
                    solver = Run(patterns, chosen_method.score, solve, options, {})
                    with lender.weight_of(layer) as weight:
                        wide = torch.promote_types(weight.dtype, torch.float32)
                        solver.prune(layer, None if moments is None else moments.to(wide))
                        target.write_layer(layer, weight, solver.done[0])
                    bar.update()
                del moments  # The next one is made when this one is gone.
                _give_back()
                if run is not None:
                    run.done(group)
        target.finish()
    if chosen_method.correlations or name != "none":
        warn_of_few(tokens, layers, stacklevel=4)  # beyond the decorator
    for layer in layers:
        if layer.name not in target.done:
            dense[layer.name] = (layer.modules[0], "no calibration batch runs it")
    left = [
        describe(layer_name, lender.tensor(module.weight), None, reason=reason)
        for layer_name, (module, reason) in dense.items()
    ]
    masks = _StoredMasks(lender, {layer_name: names[layer_name][0] for layer_name in target.done})
    seconds = time.perf_counter() - started
    return PruneReport(method, name, (*target.done.values(), *left), masks, seconds)


class _Output:
    """The folder of the new checkpoint, with its journal.

    Attributes:
        done: the layers that are finished, in the order they were done.
        groups: names and calls of the groups of layers, in their order; None before `plan`.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        source: Checkpoint,
        lender: Lender,
        names: Mapping[str, list[str]],
    ) -> None:
        self.done: dict[str, PrunedLayer] = {}
        self.groups: list[tuple[list[str], int]] | None = None
        self._folder = folder
        self._settings = json.loads(json.dumps(settings))
        self._source = source
        self._lender = lender
        self._names = names
        self._layer_files: dict[str, Path] = {}
        self._rest_files: dict[Path, list[str]] = {}

    @classmethod
    @contextmanager
    def at(cls, folder: Path, *args: Any) -> Iterator[_Output]:
        """The folder, for this process alone, as an earlier run with the same settings left it."""
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"prune_file: out={folder} is a file, expected a folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"prune_file: another process is writing into {folder}; wait for it, or pass "
                    "another folder"
                ) from None
            out = cls(folder, *args)
            out._resume()
            yield out
        finally:
            os.close(lock)

    @property
    def is_complete(self) -> bool:
        """Whether every layer is finished."""
        return self.groups is not None and len(self.done) == len(self._layer_files)

    def plan(self, groups: Sequence[Group]) -> None:
        """Decide which file holds what, before the first is written."""
        self._lay_out([([layer.name for layer in group.layers], group.calls) for group in groups])
        self._check_room()
        self._save()

    def write_rest(self) -> None:
        """Copy what is not pruned."""
        for path, names in self._rest_files.items():
            if not self._take_in(path, names):
                self._write(path, {name: self._source.read(name) for name in names})

    def write_layer(self, layer: Layer, weight: Tensor, entry: PrunedLayer) -> None:
        """Write a pruned layer, from now on read from there."""
        names = self._names[layer.name]
        # No tensor twice in a file: tied names that the source keeps apart get copies.
        tensors = {name: weight.detach().to("cpu", copy=True) for name in names}
        self._write(self._layer_files[layer.name], tensors)
        self.done[layer.name] = entry
        self._save()

    def finish(self) -> None:
        """Make the folder a checkpoint."""
        write_index(self._folder, self._lender.pruned)

    def _resume(self) -> None:
        journal = self._folder / JOURNAL
        for path in self._folder.glob(".*"):
            if path.is_dir() and path.name.startswith((f".{JOURNAL}.", ".model")):
                shutil.rmtree(path)  # a file that was being written when a run was killed
        if not journal.exists():
            if any(self._folder.iterdir()):
                raise ValueError(
                    f"prune_file: {self._folder} holds files that are not from a run of this "
                    "function; pass a new folder"
                )
            return
        try:
            found = json.loads(journal.read_text())
            if found["version"] != _VERSION:
                raise ValueError(f"version {found['version']}, expected {_VERSION}")
            settings = dict(found["settings"])
            groups = [(list(names), int(calls)) for names, calls in found["groups"]]
            entries = {
                entry["name"]: PrunedLayer(**entry | {"shape": tuple(entry["shape"])})
                for entry in found["layers"]
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"prune_file: {journal} is damaged ({error!r}); pass a new folder"
            ) from None
        for key in sorted(self._settings.keys() | settings.keys()):
            before, now = settings.get(key), self._settings.get(key)
            if before != now:
                raise ValueError(
                    f"prune_file: {self._folder} holds a run with another {key} ({_short(before)}, "
                    f"now {_short(now)}); call as before to go on with it, or pass a new folder"
                )
        planned = {name for names, _ in groups for name in names}
        if not entries.keys() <= planned <= self._names.keys():
            raise ValueError(f"prune_file: {journal} is damaged (its layers); pass a new folder")
        self._lay_out(groups)
        for name, entry in entries.items():
            # One whose file is gone is done again.
            if self._take_in(self._layer_files[name], self._names[name]):
                self.done[name] = entry
        self._check_room()

    def _lay_out(self, groups: list[tuple[list[str], int]]) -> None:
        layers = [name for names, _ in groups for name in names]
        pruned = {name for layer in layers for name in self._names[layer]}
        rest: list[list[str]] = []
        room = 0
        for name in self._source.names():
            if name in pruned:
                continue
            nbytes = self._source.read(name).nbytes
            if not rest or nbytes > room:
                rest.append([])
                room = _SHARD_BYTES
            rest[-1].append(name)
            room -= nbytes
        total = len(rest) + len(layers)
        files = [
            self._folder / f"model-{number:05}-of-{total:05}.safetensors"
            for number in range(1, total + 1)
        ]
        self.groups = groups
        self._rest_files = dict(zip(files, rest, strict=False))
        self._layer_files = dict(zip(layers, files[len(rest) :], strict=True))

    def _check_room(self) -> None:
        written = set(self._lender.pruned.files)
        planned = self._rest_files | {
            path: self._names[layer] for layer, path in self._layer_files.items()
        }
        wanted = sum(
            self._source.read(name).nbytes
            for path, names in planned.items()
            if path not in written
            for name in names
        )
        free = shutil.disk_usage(self._folder).free
        if wanted > free:
            raise OSError(
                errno.ENOSPC,
                f"prune_file: {self._folder} needs {wanted / 2**30:.1f} GiB more, its disk has "
                f"{free / 2**30:.1f}; make room, or pass a folder on another disk",
            )

    def _take_in(self, path: Path, names: Sequence[str]) -> bool:
        """Use a file that is there already; whether it is, and whole."""
        try:
            there = Checkpoint([path])
        except (ValueError, OSError):
            return False
        if there.shapes != {name: self._source.shapes[name] for name in names}:
            return False
        if path not in self._lender.pruned.files:
            self._lender.pruned.add(path)
        return True

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            write_shard(path, tensors)
        except OSError as error:
            raise OSError(
                f"prune_file: {path} could not be written ({error}); {len(self.done)} layers are "
                "finished: make room and call again in the same way to go on"
            ) from error
        self._lender.pruned.add(path)

    def _save(self) -> None:
        journal = {
            "version": _VERSION,
            "settings": self._settings,
            "groups": self.groups,
            "layers": [vars(entry) for entry in self.done.values()],
        }
        write_json(self._folder / JOURNAL, journal)


class _StoredMasks(Mapping[str, Tensor]):
    """Layer -> True where its weight on disk is not zero."""

    def __init__(self, lender: Lender, names: Mapping[str, str]) -> None:
        self._lender = lender
        self._names = names

    def __getitem__(self, layer: str) -> Tensor:
        return self._lender.read(self._names[layer]) != 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps it, and its pieces fit ever worse."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _check_on_meta(layers: Sequence[Layer], lender: Lender) -> None:
    for layer in layers:
        if layer.weight not in lender.names:
            raise ValueError(
                f"prune_file: the weight of {layer.name!r} is in memory ({layer.weight.device}); "
                "build the model under torch.device('meta'), or use prune"
            )


def _digest(batches: Sequence[Batch]) -> str:
    """Of everything in the batches that has a value of its own."""
    total = hashlib.sha256()
    for index, batch in enumerate(batches):
        leaves, structure = tree_flatten((batch.args, dict(batch.kwargs), batch.given))
        total.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device.type == "meta":
                    raise ValueError(
                        f"calibration: batch {index} is on the meta device; make it outside of "
                        "torch.device('meta')"
                    )
                raw = leaf.detach().cpu().contiguous()
                total.update(f"{raw.dtype} {list(raw.shape)}".encode())
                total.update(raw.view(-1).view(torch.uint8).numpy().data)
            else:
                plain = isinstance(leaf, bool | int | float | str | bytes | None)
                total.update(repr(leaf if plain else type(leaf)).encode())
    return total.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
