"""Files in the user's cache folder: what was measured on this machine, kept between processes."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparsekit import _native

_T = TypeVar("_T")


class CacheFile:
    """A JSON file with one entry per machine, which other processes write too.

    A file that cannot be read or written costs a warning (once) and nothing else; a damaged one is
    written anew, one of another version is ignored.

    Args:
        name: what messages call it.
        version: of what `parse` of `read` understands.
        without: what happens where it cannot be used, for the message.
        path: where it is (see `default_path`).
    """

    def __init__(self, name: str, version: int, without: str, path: Path) -> None:
        self.path = path
        self._name, self._version, self._without = name, version, without

    def read(self, parse: Callable[[Any], dict[str, _T]]) -> dict[str, _T]:
        """What the file holds for each machine.

        Args:
            parse: makes it from the JSON; anything wrong is an error of the kind that Python raises
                by itself for a wrong type, key or value.
        """
        try:
            content = json.loads(self.path.read_text())
            return parse(content["machines"]) if content["version"] == self._version else {}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            self._warn_unusable(error)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            warn_once(f"the {self._name} {self.path} is damaged and will be written anew")
        return {}

    def write(self, machines: Mapping[str, Any]) -> None:
        """Replace the file; a failed write leaves the old one."""
        text = json.dumps({"version": self._version, "machines": machines}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace_text(self.path, text)
        except OSError as error:
            self._warn_unusable(error)

    def _warn_unusable(self, error: OSError) -> None:
        warn_once(
            f"the {self._name} {self.path} cannot be used ({error.strerror}); {self._without}. "
            "Set XDG_CACHE_HOME to a writable folder."
        )


def default_path(name: str) -> Path:
    """A file in `$XDG_CACHE_HOME/sparsekit`, by default `~/.cache/sparsekit`."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path(os.path.expanduser("~")) / ".cache"
    return folder / "sparsekit" / name


def machine_parts(device: torch.device | None = None) -> list[str]:
    """What a time depends on: the CPU and its instruction set, or the GPU and its driver.

    Args:
        device: where the time was taken; None means the CPU.
    """
    if device is not None and device.type == "cuda":
        gpu = _native.cuda_info(device.index or 0)
        driver = _native.cuda_version(gpu["driver_version"])
        return [str(gpu["name"]), f"{gpu['sm_count']} SMs", f"driver for CUDA {driver}"]
    cpu = _native.cpu_info()
    return [str(cpu["model"]).strip(), str(cpu["isa"]), f"{cpu['cores']} cores"]


def _replace_text(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@functools.cache
def warn_once(message: str) -> None:
    """A RuntimeWarning, once a process."""
    warnings.warn(message, RuntimeWarning, stacklevel=5)
