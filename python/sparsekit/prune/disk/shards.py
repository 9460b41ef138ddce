"""Checkpoints on disk, read one tensor at a time: safetensors files, or a folder of shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekit.files import replacing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

PathLike: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = PathLike | Sequence[PathLike]


class Checkpoint:
    """Which file holds which tensor; no tensor is in memory, and no file stays open.

    Args:
        source: a safetensors file, a list of them, or a folder with `model.safetensors.index.json`
            or `model.safetensors`.

    Raises:
        ValueError: a file is damaged, two have the same tensor, the index does not fit them.
        OSError: a file is missing or cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self.files: list[Path] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors spells them
        self._file_of: dict[str, Path] = {}
        listed: dict[str, str] | None = None
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            if path.is_dir():
                files, listed = _files_of(path)
            else:
                files = [path]
        else:
            files = [Path(path) for path in source]
        for path in files:
            self.add(path)
        for name, file in (listed or {}).items():
            if name not in self._file_of or self._file_of[name].name != file:
                raise ValueError(f"{source}: {INDEX} says that {file} has {name!r}; it has not")

    def add(self, path: Path) -> None:
        """Take in the tensors of another file."""
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - the file itself cannot be iterated
                if name in self._file_of:
                    raise ValueError(f"{path} and {self._file_of[name]} both hold {name!r}")
                part = file.get_slice(name)
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = part.get_dtype()
                self._file_of[name] = path
        self.files.append(path)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name]

    def names(self) -> list[str]:
        """Of all tensors, in the order of the files."""
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        """A view of the file, which stays open as long as the tensor lives."""
        path = self._file_of[name]
        with opened(path) as file:
            if name not in file.keys():  # noqa: SIM118 - the file itself cannot be iterated
                raise ValueError(f"{path} no longer holds {name!r}: it was changed while in use")
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def identity(self) -> list[dict[str, Any]]:
        """What changes when a file does."""
        states = [(path, path.stat()) for path in self.files]
        return [
            {"file": path.name, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
            for path, state in states
        ]


def _files_of(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise FileNotFoundError(
                f"{folder} holds neither {INDEX} nor {SINGLE}; pass the file, or a list of shards"
            )
        return [folder / SINGLE], None
    try:
        listed = json.loads(index.read_text())["weight_map"]
        files = sorted(set(listed.values()))
        if any(Path(file).name != file for file in files):
            raise ValueError("a shard lies outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from None
    return [folder / file for file in files], listed


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        ValueError: it is damaged.
        OSError: it is missing or cannot be read.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from None


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file whole, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as scratch:
        try:
            save_file(dict(tensors), scratch / path.name, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a file whole, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as scratch:
        (scratch / path.name).write_text(json.dumps(value, indent=1) + "\n")


def write_index(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the index that makes a folder of shards a checkpoint."""
    shard_of = {name: checkpoint.path_of(name).name for name in sorted(checkpoint.names())}
    total = sum(checkpoint.read(name).nbytes for name in shard_of)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": shard_of})
