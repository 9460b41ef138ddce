"""Results that are kept one by one: a study of hours that is stopped loses minutes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON lines, each what was asked for and what came out.

    Args:
        path: The file; made when the first result is added.

    Raises:
        ValueError: A line that is no result, other than a last one that was cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                asked, found = dict(entry["asked"]), dict(entry["found"])
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    self._drop_last(lines[:-1])
                    break
                raise ValueError(f"{path}: line {number} is no result of a study") from None
            self._known[_key(asked)] = asked, found

    def __contains__(self, asked: Mapping[str, Any]) -> bool:
        return _key(asked) in self._known

    def __iter__(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        return iter(self._known.values())

    def add(self, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Keeps a result; it is on the disk when this returns."""
        self._known[_key(asked)] = dict(asked), dict(found)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"asked": dict(asked), "found": dict(found)}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _drop_last(self, lines: list[str]) -> None:
        self._path.write_text("".join(f"{line}\n" for line in lines))


def _key(asked: Mapping[str, Any]) -> str:
    return json.dumps(dict(asked), sort_keys=True)
