"""End-to-end latency: every engine on the same input, in interleaved rounds, as medians.

Interleaving makes a noisy machine hit all engines alike; a comparison of medians taken minutes
apart would measure the neighbours instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import mkldnn
from tqdm import tqdm

Inputs = tuple[Tensor, ...]
"""What a model is called with; here token ids and attention mask."""

Run = Callable[[], Tensor]

_SAME_RESULT = 0.99
"""Least cosine between an engine's embeddings and the eager ones; leaves room for bfloat16."""


class Unavailable(Exception):
    """An engine that cannot run here; the text is the reason shown in its row."""


@dataclass(frozen=True)
class Engine:
    """One way to run the model.

    Attributes:
        name: As shown in the report.
        sparse: Whether it runs the converted model.
        build: Makes a callable for one input shape; raises `Unavailable` with the reason. What it
            needs to keep on disk goes into the folder it is given.
    """

    name: str
    sparse: bool
    build: Callable[[Inputs, Path], Run]


def example(batch: int, tokens: int, vocabulary: int) -> Inputs:
    """`input_ids` and `attention_mask`, int64 [batch, tokens]: random ids, every token attended."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(1000, vocabulary, (batch, tokens), generator=generator)
    return ids, torch.ones_like(ids)


def engines(
    dense: nn.Module, sparse: nn.Module, dtype: torch.dtype, compile_models: bool
) -> list[Engine]:
    """Every engine of the comparison, those of the dense model first."""
    return [
        *dense_engines(dense, dtype, compile_models),
        *sparse_engines(sparse, dtype, compile_models),
    ]


def dense_engines(dense: nn.Module, dtype: torch.dtype, compile_models: bool) -> list[Engine]:
    """Every way to run the dense model.

    Args:
        dense: The trained float32 model.
        dtype: What the sparse model computes in. When it is not float32, the dense torch engines
            appear in it as well, since the fastest of all dense ones is the yardstick.
        compile_models: Whether to include torch.compile, which takes about 20 s a model and shape.

    Returns:
        Engines in the order of the report.
    """
    found: list[Engine] = []
    dtypes = [torch.float32] if dtype == torch.float32 else [torch.float32, dtype]
    for each in dtypes:
        model = dense if each == torch.float32 else deepcopy(dense).to(each)
        suffix = str(each).removeprefix("torch.")
        frozen = f"torch.compile, frozen {suffix}"
        found += [
            Engine(f"torch eager {suffix}", False, _eager(model)),
            Engine(frozen, False, _compiled(model, compile_models, freeze=True)),
            Engine(f"torch oneDNN {suffix}", False, _onednn(model, each)),
        ]
        if each == torch.float32:
            # With a fixed shape a frozen float32 graph calls MKL, with a free one oneDNN. A copy,
            # since torch.compile would find the program of the same model and run that.
            build = _compiled(deepcopy(model), compile_models, freeze=True, dynamic=True)
            found.append(Engine(f"{frozen}, dynamic", False, build))
    return [*found, Engine("ONNX Runtime float32", False, _onnxruntime(dense))]


def sparse_engines(sparse: nn.Module, dtype: torch.dtype, compile_models: bool) -> list[Engine]:
    """Both ways to run a converted model, which computes in `dtype`."""
    suffix = str(dtype).removeprefix("torch.")
    return [
        Engine(f"sparsekit eager {suffix}", True, _eager(sparse)),
        Engine(
            f"sparsekit torch.compile, frozen {suffix}",
            True,
            _compiled(sparse, compile_models, freeze=True),
        ),
    ]


def measure(
    candidates: Sequence[Engine],
    batch: int,
    tokens: int,
    vocabulary: int,
    rounds: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Times every engine on one input shape.

    Args:
        candidates: From `engines`; the first one is the reference of `speedup`.
        batch: Sequences.
        tokens: Tokens in each.
        vocabulary: Token ids stay below it.
        rounds: Timed calls of each engine, at least 2.
        progress: Whether to show progress bars.

    Returns:
        The shape, `rounds`, one row per engine (`name`, `sparse`, median `ms`, quartiles `ms_low`
        and `ms_high`, `speedup` over the first engine, or the reason in `skipped`), the names
        `fastest_dense` and `fastest_sparse`, and `sparse_vs_eager`, `sparse_vs_fastest_dense`:
        dense time / sparse time.
    """
    inputs = example(batch, tokens, vocabulary)
    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    expected: dict[bool, Tensor] = {}
    # What was compiled for another shape would count against torch.compile's limit.
    torch.compiler.reset()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsekit-demo-")))
        stack.enter_context(torch.no_grad())
        bar = tqdm(candidates, desc=f"building engines, batch {batch}", disable=not progress)
        for engine in bar:
            bar.set_postfix_str(engine.name)
            try:
                run = engine.build(inputs, folder)
                # Compilation, packing and the first touch of memory happen here.
                output = run()
                check_result(output, expected.setdefault(engine.sparse, output))
                run()
            except Unavailable as reason:
                skipped[engine.name] = str(reason)
            else:
                runs[engine.name] = run
        times = _interleave(runs, rounds, f"timing batch {batch}", progress)
    return _summary(candidates, times, skipped, batch, tokens, rounds)


def check_result(output: Tensor, expected: Tensor) -> None:
    """A fast wrong answer is no engine: compares with the eager run of the same weights.

    Raises:
        Unavailable: A row's cosine is below the least one.
    """
    cosine = nn.functional.cosine_similarity(output.double(), expected.double()).min().item()
    if not cosine >= _SAME_RESULT:
        raise Unavailable(f"its result differs from eager's: cosine {cosine:.4f}")


def _interleave(
    runs: dict[str, Run], rounds: int, label: str, progress: bool
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=label, unit="round", disable=not progress):
        for name, run in runs.items():
            # Thread pools of the engine before keep spinning for a moment.
            time.sleep(0.01)
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _summary(
    candidates: Sequence[Engine],
    times: dict[str, list[float]],
    skipped: dict[str, str],
    batch: int,
    tokens: int,
    rounds: int,
) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in times.items()}
    reference = median[candidates[0].name]
    rows: list[dict[str, Any]] = []
    for engine in candidates:
        row: dict[str, Any] = {"name": engine.name, "sparse": engine.sparse}
        if engine.name in skipped:
            row["skipped"] = skipped[engine.name]
        else:
            low, _, high = statistics.quantiles(times[engine.name], n=4, method="inclusive")
            row |= {"ms": median[engine.name], "ms_low": low, "ms_high": high}
            row["speedup"] = reference / median[engine.name]
        rows.append(row)

    def fastest(sparse: bool) -> str:
        names = [e.name for e in candidates if e.sparse == sparse and e.name in median]
        return min(names, key=lambda name: median[name])

    best_dense, best_sparse = fastest(False), fastest(True)
    return {
        "batch": batch,
        "tokens": tokens,
        "rounds": rounds,
        "engines": rows,
        "fastest_dense": best_dense,
        "fastest_sparse": best_sparse,
        "sparse_vs_eager": reference / median[best_sparse],
        "sparse_vs_fastest_dense": median[best_dense] / median[best_sparse],
    }


def _eager(model: nn.Module) -> Callable[[Inputs, Path], Run]:
    def build(inputs: Inputs, folder: Path) -> Run:
        return lambda: cast(Tensor, model(*inputs))

    return build


def _compiled(
    model: nn.Module, wanted: bool, freeze: bool = False, dynamic: bool = False
) -> Callable[[Inputs, Path], Run]:
    def build(inputs: Inputs, folder: Path) -> Run:
        if not wanted:
            raise Unavailable("left out of this run")
        if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            raise Unavailable("torch.compile needs a C++ compiler, none was found")
        from torch._inductor import config

        compiled = torch.compile(model, dynamic=dynamic)
        # Freezing prepacks dense weights and fuses their activations; packed sparse ones stay what
        # they are. As an option of torch.compile it would come too late: parameters are captured
        # before.
        with config.patch(freezing=freeze):
            compiled(*inputs)
        return lambda: cast(Tensor, compiled(*inputs))

    return build


def _onednn(model: nn.Module, dtype: torch.dtype) -> Callable[[Inputs, Path], Run]:
    def build(inputs: Inputs, folder: Path) -> Run:
        if not torch.backends.mkldnn.is_available():
            raise Unavailable("this torch was built without oneDNN")
        copy = deepcopy(model)
        with warnings.catch_warnings():
            # These modules are TorchScript, which torch announces to be on its way out.
            warnings.simplefilter("ignore")
            for name, child in list(copy.named_modules()):
                if isinstance(child, nn.Linear):
                    parent = copy.get_submodule(name.rpartition(".")[0])
                    setattr(parent, name.rpartition(".")[2], mkldnn.to_mkldnn(child, dtype))
        return lambda: cast(Tensor, copy(*inputs))

    return build


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Silences the exporter's notes about optimisations it tried and left out."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def export_onnx(
    model: nn.Module, inputs: Inputs, path: Path, opset: int | None = None
) -> list[str]:
    """Writes a model as an ONNX file of one input shape.

    Args:
        model: Is not changed.
        inputs: An example; a fixed shape is the best case for optimisers.
        path: The file.
        opset: An old one, for engines that read no other, written by the older exporter; None for
            the current one.

    Returns:
        The names of the file's inputs.
    """
    copy = deepcopy(model)
    for module in copy.modules():
        # The exporter guards torch's fused attention with IsNaN and Where in every layer;
        # written out, ONNX Runtime fuses it itself and is about a tenth faster.
        choose = getattr(module, "set_attn_implementation", None)
        if callable(choose):
            choose("eager")
    names = [f"input{index}" for index in range(len(inputs))]
    with warnings.catch_warnings(), _quiet("onnxscript", "onnx_ir", "torch.onnx"):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy,
            inputs,
            str(path),
            input_names=names,
            dynamo=opset is None,
            opset_version=opset,
            verbose=False,
        )
    return names


def _onnxruntime(model: nn.Module) -> Callable[[Inputs, Path], Run]:
    def build(inputs: Inputs, folder: Path) -> Run:
        for name in ("onnxruntime", "onnx", "onnxscript"):
            if importlib.util.find_spec(name) is None:
                raise Unavailable(f'{name} is not installed; pip install "sparsekit-kernels[demo]"')
        onnxruntime = importlib.import_module("onnxruntime")
        path = folder / f"dense_{inputs[0].shape[0]}.onnx"
        names = export_onnx(model, inputs, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Its threads would otherwise spin into the next engine's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return build
