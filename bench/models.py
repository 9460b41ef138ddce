"""Whole models: every engine on the same input, dense and pruned, end to end.

    python -m bench.models [--models minilm] [--patterns 2:4 2:4v4] [--batches 1 32] [--peers]

Weights are pruned by magnitude, since accuracy is not the point here, and converted with
measurements for each batch size. Engines take turns; the fastest dense one is the yardstick. The
tables are printed and written as markdown and JSON.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sparsekit as sk
from bench import memory, peers, vision
from bench.baselines import Unavailable
from bench.case import machine
from bench.command import add_worker_options, console, positive
from bench.models_report import Result, Run, save, summary
from bench.networks import MODELS, Model, folded
from bench.timing import Rivals, contenders, scout
from sparsekit.demo import latency
from sparsekit.demo.latency import Engine, Inputs
from sparsekit.demo.report import rich_table

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
PATTERNS = ("2:4", "2:4v4", "bsr16x16@0.75")
# What DeepSparse's parser reads whole.
_OPSET = 14


@dataclass(frozen=True)
class Session:
    """What is measured in turns: one model's dense engines, and each pattern's."""

    model: Model
    dtype: str
    batch: int
    threads: int
    patterns: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.dtype} batch {self.batch}, {self.threads} threads"


def deepsparse(model: nn.Module, worker: peers.Worker) -> Callable[[Inputs, Path], latency.Run]:
    """The builder of DeepSparse on a model, dense or pruned."""

    def build(inputs: Inputs, folder: Path) -> latency.Run:
        path = worker.folder / "model.onnx"
        latency.export_onnx(model, inputs, path, opset=_OPSET)
        try:
            return worker.load(inputs, torch.get_num_threads(), model=path)
        except Unavailable as reason:
            raise latency.Unavailable(str(reason)) from None

    return build


@dataclass(frozen=True)
class Group:
    """Engines that compute the same.

    Attributes:
        reference: The network as torch runs it, in float32: whose results all of them must give.
        engines: The dense ones, or those of a pattern.
        eager: What ours, or torch, runs without compilation; its memory is measured.
        sparse_layers: Layers that `convert` made sparse.
        layers: Layers that were pruned.
    """

    reference: nn.Module
    engines: list[Engine]
    eager: nn.Module
    sparse_layers: int = 0
    layers: int = 0


def _groups(
    session: Session,
    dense: nn.Module,
    compile_models: bool,
    workers: Mapping[str, peers.Worker],
    cache: Path,
) -> dict[str, Group]:
    """The engines, "" for dense ones and a pattern for pruned ones."""
    model, dtype = session.model, _DTYPES[session.dtype]
    inputs = _of_dtype(model.inputs(session.batch), dtype)
    makers: Any = vision if model.convolutional else latency
    plain = dense
    if model.convolutional:
        dense = folded(dense, model.inputs(1))
        inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)

    def with_peer(group: str, engines: list[Engine], network: nn.Module) -> list[Engine]:
        if group not in workers or dtype != torch.float32:
            return engines
        name = "DeepSparse" if group else "DeepSparse, dense"
        return [*engines, Engine(name, bool(group), deepsparse(network, workers[group]))]

    engines = with_peer("", makers.dense_engines(dense, dtype, compile_models), dense)
    eager = vision.channels_last(dense).to(dtype) if model.convolutional else dense
    groups = {"": Group(plain, engines, eager)}
    for pattern in session.patterns:
        pruned = deepcopy(dense)
        sk.prune(pruned, pattern, targets=model.targets, progress=False)
        sparse = deepcopy(pruned).to(dtype)
        report = sk.convert(
            sparse,
            pattern,
            example_inputs=inputs,
            targets=model.targets,
            fuse="all" if model.convolutional else True,
            progress=False,
            cache=cache,
        )
        found = makers.sparse_engines(sparse, dtype, compile_models)
        found = with_peer(pattern, found, pruned)
        groups[pattern] = Group(
            pruned,
            [replace(e, name=f"{e.name}, {pattern}") for e in found],
            sparse,
            sum(row.verdict == "sparse" for row in report.rows),
            len(report.rows),
        )
    return groups


def _of_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Images in the model's element type; token ids stay."""
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)


def _inputs_for(engine: Engine, inputs: Inputs) -> Inputs:
    """What an engine takes: its name tells the element type of a torch model."""
    return _of_dtype(inputs, torch.bfloat16 if "bfloat16" in engine.name else torch.float32)


# Of the largest result; float32 engines sum in orders of their own.
_SAME_F32 = 1e-3


def check(engine: Engine, output: Tensor, expected: Tensor) -> None:
    """A fast wrong answer is no engine.

    Raises:
        latency.Unavailable: The result is another than that of torch's eager float32.
    """
    if "bfloat16" in engine.name:
        latency.check_result(output.flatten(1), expected.flatten(1))
        return
    if output.shape != expected.shape:
        raise latency.Unavailable(f"its result is {list(output.shape)}, not {list(expected.shape)}")
    error, scale = (output - expected).abs().max().item(), expected.abs().max().item()
    if not error <= _SAME_F32 * scale:
        raise latency.Unavailable(f"its result differs from eager's by {error:.3g} of {scale:.3g}")


def _build(
    groups: Mapping[str, Group], inputs: Inputs, folder: Path
) -> tuple[dict[str, latency.Run], dict[str, str]]:
    """Every engine's call, its result checked against torch's on the same weights, or why not."""
    runs: dict[str, latency.Run] = {}
    skipped: dict[str, str] = {}
    total = sum(len(group.engines) for group in groups.values())
    with tqdm(total=total, desc="building engines", leave=False) as bar:
        for group in groups.values():
            expected = group.reference(*inputs)
            for engine in group.engines:
                bar.set_postfix_str(engine.name)
                try:
                    run = engine.build(_inputs_for(engine, inputs), folder)
                    # Compilation, packing and the first touch of memory happen here.
                    check(engine, run(), expected)
                    runs[engine.name] = run
                except latency.Unavailable as reason:
                    skipped[engine.name] = str(reason)
                bar.update()
    return runs, skipped


def _kinds(groups: Mapping[str, Group]) -> Iterator[list[str]]:
    """Names of engines among which only the fastest counts: the dense ones, and a pattern's own."""
    for group in groups.values():
        own = [engine.name for engine in group.engines if engine.name.startswith("sparsekit")]
        yield own
        yield [engine.name for engine in group.engines if engine.name not in own]


def _peaks(
    groups: Mapping[str, Group], session: Session, folder: Path
) -> tuple[dict[str, float], str]:
    """Peak MiB by group of torch's eager or ours, or why they are not known."""
    inputs = tuple(
        x.contiguous(memory_format=torch.channels_last)
        for x in _of_dtype(session.model.inputs(session.batch), _DTYPES[session.dtype])
    )
    peaks = {}
    for name, group in groups.items():
        try:
            peaks[name] = memory.peak_mib(group.eager, inputs, session.threads, folder)
        except Unavailable as reason:
            return {}, str(reason)
    return peaks, ""


def measure(
    session: Session,
    dense: nn.Module,
    rounds: int,
    compile_models: bool = True,
    workers: Mapping[str, peers.Worker] | None = None,
) -> list[Result]:
    """Times every engine of a session in turns; of convolutions the peak memory is measured too.

    Args:
        session: What to measure.
        dense: Its model.
        rounds: Turns of each engine.
        compile_models: Whether to include torch.compile.
        workers: DeepSparse, one process a pattern, and one of "" for the dense model.

    Returns:
        A result per pattern.
    """
    torch.set_num_threads(session.threads)
    # What was compiled for another shape would count against torch.compile's limit, and the models
    # of all patterns share their code.
    torch.compiler.reset()
    from torch._dynamo import config

    peaks: dict[str, float] = {}
    unknown = ""
    with ExitStack() as stack:
        stack.enter_context(config.patch(recompile_limit=64))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsekit-bench-")))
        stack.enter_context(torch.no_grad())
        groups = _groups(session, dense, compile_models, workers or {}, folder / "verdicts.json")
        if session.model.convolutional:
            peaks, unknown = _peaks(groups, session, folder)
        inputs = session.model.inputs(session.batch)
        runs, skipped = _build(groups, inputs, folder)
        once: dict[str, float] = {}
        racing: dict[str, latency.Run] = {}
        for kind in _kinds(groups):
            once |= scout({name: runs[name] for name in kind if name in runs})
            racing |= {name: runs[name] for name in contenders(once, kind)}
        rivals = Rivals(racing)
        for _ in tqdm(range(rounds), desc=session.name, unit="round", leave=False):
            rivals.run_round()
    medians = {**once, **rivals.medians()}
    dense_names = [engine.name for engine in groups[""].engines if engine.name in racing]
    fastest = min(dense_names, key=medians.__getitem__)
    if unknown:
        skipped["peak memory"] = unknown
    results = []
    for pattern in session.patterns:
        group = groups[pattern]
        names = [engine.name for engine in group.engines]
        own = [name for name in names if name.startswith("sparsekit") and name in racing]
        if not own:
            wrong = "; ".join(f"{name}: {skipped[name]}" for name in names if name in skipped)
            raise Unavailable(f"none of our engines ran: {wrong}")
        ours = min(own, key=medians.__getitem__)
        shown = [*(engine.name for engine in groups[""].engines), *names, "peak memory"]
        results.append(
            Result(
                model=session.model.name,
                pattern=pattern,
                dtype=session.dtype,
                batch=session.batch,
                threads=session.threads,
                goal=session.model.goal(session.dtype, pattern, session.batch),
                speedup=rivals.speedup(ours, fastest),
                ours=ours.removesuffix(f", {pattern}"),
                fastest_dense=fastest,
                engines_ms={
                    name.removesuffix(f", {pattern}"): medians[name] * 1e3
                    for name in shown
                    if name in medians
                },
                sparse_layers=group.sparse_layers,
                layers=group.layers,
                skipped={name: skipped[name] for name in shown if name in skipped},
                peak_mib=peaks.get(pattern),
                dense_peak_mib=peaks.get(""),
            )
        )
    return results


def _pattern(text: str) -> str:
    try:
        return str(sk.parse_pattern(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        SystemExit: It is wrong; the message is on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [model.name for model in MODELS]
    add = parser.add_argument
    add("--models", nargs="+", default=["*"], metavar="GLOB", help=f"of {', '.join(names)}")
    add("--patterns", nargs="+", type=_pattern, default=list(PATTERNS), metavar="PATTERN")
    add("--dtypes", nargs="+", choices=list(_DTYPES), default=list(_DTYPES))
    add("--batches", nargs="+", type=positive, metavar="B", help="instead of each model's own")
    add("--threads", nargs="+", type=positive, default=[torch.get_num_threads()], metavar="T")
    add("--rounds", type=positive, default=9, help="turns of each engine")
    add("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    add(
        "--peers",
        action="store_true",
        help="DeepSparse too, on the dense model and on each pruned one",
    )
    add_worker_options(parser, ["deepsparse"])
    add("--out", type=Path, default=Path("bench/results"), help="folder of the result files")
    options = parser.parse_args(given)
    for glob in options.models:
        if not fnmatch.filter(names, glob):
            parser.error(f"--models: {glob!r} matches none of {', '.join(names)}")
    return options


def sessions(options: argparse.Namespace) -> list[Session]:
    """What the command line asks for, a model's sessions in a row."""
    return [
        Session(model, dtype, batch, threads, tuple(options.patterns))
        for model in MODELS
        if any(fnmatch.fnmatchcase(model.name, glob) for glob in options.models)
        for dtype in options.dtypes
        for batch in options.batches or model.batches
        for threads in options.threads
    ]


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    where: dict[str, Any] = machine()
    run = Run(date=datetime.date.today().isoformat(), rounds=options.rounds, **where)
    screen = console()
    with ExitStack() as stack:
        workers = {}
        if options.peers:
            try:
                python = peers.python_of("deepsparse", options.deepsparse)
            except Unavailable as missing:
                sys.exit(str(missing))
            for pattern in ("", *options.patterns):
                workers[pattern] = stack.enter_context(peers.Worker.start("deepsparse", python))
        todo = sessions(options)
        bar = stack.enter_context(tqdm(total=len(todo), desc="models", unit="session"))
        try:
            for model, group in itertools.groupby(todo, key=lambda session: session.model):
                try:
                    dense = model.build()
                except ImportError as missing:
                    run.failures.append(f"{model.name}: {missing}")
                    continue
                for session in group:
                    bar.set_description(session.name)
                    compiled = not options.no_compile
                    try:
                        found = measure(session, dense, options.rounds, compiled, workers)
                        run.results.extend(found)
                    except Unavailable as gone:
                        run.failures.append(f"{session.name}: {gone}")
                    bar.update()
        except KeyboardInterrupt:
            run.failures.append("the run was interrupted: models are missing")
    screen.print(rich_table(summary(run)))
    if run.results:
        screen.print(f"wrote {' and '.join(map(str, save(run, options.out)))}", soft_wrap=True)
    if run.failures:
        sys.exit("; ".join(run.failures))


if __name__ == "__main__":
    main()
