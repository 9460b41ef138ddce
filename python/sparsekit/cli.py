"""The command line: `sparsekit doctor | kernels | bench | tune | ...`. No logic of its own."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer

from sparsekit import dispatch, gate, io, preferences

_T = TypeVar("_T")

_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<index>.")]

app = typer.Typer(
    help="Pruned PyTorch models that really run faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DType(str, Enum):
    """Spelling of a dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _checked(call: Callable[[], _T]) -> _T:
    """The call's result; an error that the user can mend ends the program with its message."""
    try:
        return call()
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def doctor() -> None:
    """What this machine has, and what will run on it."""
    typer.echo(dispatch.doctor())


@app.command()
def kernels() -> None:
    """All kernels of this build, and why each can or cannot run here."""
    typer.echo(str(dispatch.kernels()))


@app.command()
def explain(
    pattern: Annotated[str, typer.Argument(help="2:4, 2:4v4, bsr16x16@0.75, ...")] = "2:4",
    m: Annotated[int, typer.Option("-m", help="Rows of x.")] = 256,
    n: Annotated[int, typer.Option("-n", help="out_features.")] = 4096,
    k: Annotated[int, typer.Option("-k", help="in_features.")] = 1024,
    dtype: DType = DType.float32,
    device: _Device = "cpu",
) -> None:
    """Why which kernel would run a problem, and why the others would not."""
    kind = getattr(torch, dtype.value)
    answer = _checked(lambda: dispatch.explain(pattern, m=m, n=n, k=k, dtype=kind, device=device))
    typer.echo(str(answer))


@app.command()
def bench(
    pattern: Annotated[str, typer.Argument(help="2:4, 2:4v4, bsr16x16@0.75, ...")] = "2:4",
    m: Annotated[list[int] | None, typer.Option("-m", help="Rows of x; may be repeated.")] = None,
    n: Annotated[int, typer.Option("-n", help="out_features.")] = 4096,
    k: Annotated[int, typer.Option("-k", help="in_features.")] = 1024,
    dtype: DType = DType.float32,
    device: _Device = "cpu",
) -> None:
    """Time dense against sparse for one weight shape."""
    rows = m or [1, 8, 32, 256]
    kind = getattr(torch, dtype.value)
    table = _checked(lambda: gate.compare(pattern, n, k, rows, kind, device))
    typer.echo(table)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 1,8,64, got {text!r}") from None


@app.command()
def tune(
    pattern: Annotated[str, typer.Argument(help="2:4, 2:4v4, bsr16x16@0.75, ...")] = "2:4",
    m: Annotated[str, typer.Option("--m", "-m", help="Rows of x, e.g. 1,8,64.")] = "1,8,64,256",
    n: Annotated[int, typer.Option("--n", "-n", help="out_features.")] = 4096,
    k: Annotated[int, typer.Option("--k", "-k", help="in_features.")] = 1024,
    dtype: DType = DType.float32,
    device: _Device = "cpu",
    threads: Annotated[int | None, typer.Option(help="Of the CPU; as torch has them.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print what is stored.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Forget what is stored.")] = False,
) -> None:
    """Measure which kernel is the fastest, and use it from then on."""
    if list_:
        typer.echo(dispatch.tuned())
    elif clear:
        _checked(preferences.clear)
    else:
        options = {"m": _numbers(m), "n": n, "k": k, "dtype": getattr(torch, dtype.value)}
        options |= {"device": device, "threads": threads}
        typer.echo(str(_checked(lambda: dispatch.tune(pattern, **options))))


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="Written by sparsekit.save.")]) -> None:
    """What is inside a file; checks it whole."""
    typer.echo(str(_checked(lambda: io.inspect(file))))


@app.command()
def demo(
    pattern: Annotated[str, typer.Option(help="For every encoder layer.")] = "2:4",
    method: Annotated[str, typer.Option(help="Pruning method.")] = "sparsegpt",
    dtype: DType = DType.float32,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("sparsekit-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A short form.")] = False,
) -> None:
    """Prune, recover, convert and measure a trained sentence encoder."""
    from sparsekit.demo import run

    _checked(lambda: run(pattern=pattern, method=method, dtype=dtype.value, out=out, quick=quick))
