"""What the commands that measure share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """(n, k) of a layer written NxK, for argparse."""
    try:
        n, k = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NxK such as 4096x1024, got {text!r}") from None
    if n < 1 or k < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1, got {text!r}")
    return n, k


def add_worker_options(parser: argparse.ArgumentParser, engines: Sequence[str]) -> None:
    """`--<engine> PYTHON` for engines in environments of their own."""
    for engine in engines:
        parser.add_argument(
            f"--{engine}", metavar="PYTHON", help=f"the Python of {engine}'s environment"
        )


def console() -> Console:
    """The screen, or a file wide enough for whole words."""
    return Console(width=None if sys.stdout.isatty() else 200)
