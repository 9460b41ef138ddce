"""The MiniLM study: retrieval of the demo, after pruning and after recovery.

Recovery distils from the dense model on docstrings: the demo's own training texts and those of
torch and numpy, which are installed wherever this runs. None of them is a test text.
"""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from bench.pruning.journal import Journal
from sparsekit.demo import corpus, encoder, evaluate
from sparsekit.prune import METHODS, distill, permute, prune

PATTERNS = ("2:4", "2:4v4", "bsr16x16@0.5", "bsr16x16@0.75", "bsr1x1@0.5", "bsr1x1@0.75")
RECOVERED = ("2:4", "2:4v4", "bsr16x16@0.5")
STEPS = 2500
"""Of recovery, 32 texts of up to 64 tokens each."""

_BLOCKS = r"re:bert\.encoder\.layer\.\d+"
_TOKENS = 64
_RATE = 5e-4
_PACKAGES = ("torch", "numpy")
_SHORTEST = 40


@dataclass(frozen=True)
class Trial:
    """One way to a sparse encoder.

    Attributes:
        method: A name in `METHODS`.
        pattern: Its spelling.
        reconstruction: A name in `RECONSTRUCTIONS`; "" takes the method's own.
        permuted: Whether channels are reordered first.
        steps: Of recovery; 0 for none.
    """

    method: str
    pattern: str
    reconstruction: str = ""
    permuted: bool = False
    steps: int = 0

    @property
    def asked(self) -> dict[str, Any]:
        """The key in the journal."""
        return {"study": "minilm", **asdict(self)}

    @property
    def stem(self) -> str:
        """Of the file of its weights."""
        parts = [self.method, self.reconstruction, self.pattern.replace(":", "-")]
        return "-".join(filter(None, [*parts, "permuted" * self.permuted, str(self.steps)]))


def trials(patterns: Sequence[str], recovered: Sequence[str], steps: int) -> Iterator[Trial]:
    """All of them, recovery last."""
    for pattern in patterns:
        for name, method in METHODS.items():
            if method.needs != "gradients":
                yield Trial(name, pattern)
        yield Trial("sparsegpt", pattern, "least_squares")
        yield Trial("admm", pattern, permuted=True)
    for pattern in recovered:
        yield Trial("admm", pattern, permuted=True, steps=steps)


class Task:
    """The model and its texts, read once."""

    @cached_property
    def tokenizer(self) -> Any:
        return encoder.load_tokenizer()

    @cached_property
    def dense(self) -> encoder.SentenceEncoder:
        return encoder.load_dense()

    @cached_property
    def texts(self) -> corpus.Corpus:
        return corpus.split(corpus.collect(progress=False))

    @cached_property
    def expected(self) -> evaluate.Embeddings:
        return self.embed(self.dense)

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        return encoder.batches(self.tokenizer, [doc.text for doc in self.texts.calibration])

    @cached_property
    def example(self) -> dict[str, Tensor]:
        """A small batch, to look at the model with."""
        return {name: part[:4] for name, part in self.calibration[0].items()}

    @cached_property
    def training(self) -> list[dict[str, Tensor]]:
        texts = sorted({*self.texts.training_texts(), *self._more_texts()})
        random.Random(0).shuffle(texts)
        return encoder.batches(self.tokenizer, texts, tokens=_TOKENS)

    def _more_texts(self) -> Iterator[str]:
        test = {part for doc in self.texts.test for part in (doc.query, doc.document)}
        for package in _PACKAGES:
            for path in sorted(Path(sysconfig.get_paths()["purelib"], package).rglob("*.py")):
                try:
                    found = list(corpus.docstrings_of(package, path.read_bytes()))
                except SyntaxError:
                    continue  # for a newer Python
                for doc in found:
                    for part in (doc.query, doc.document):
                        if len(part) >= _SHORTEST and part not in test:
                            yield part

    def embed(self, model: nn.Module) -> evaluate.Embeddings:
        """The test pairs."""
        return evaluate.embed_pairs(model, self.tokenizer, self.texts.test, "embedding", False)

    def quality(self, model: nn.Module) -> dict[str, float]:
        """Retrieval, and how near the embeddings are to the dense model's."""
        return evaluate.quality(self.embed(model), self.expected)


def run(
    journal: Journal, patterns: Sequence[str], recovered: Sequence[str], steps: int, models: Path
) -> None:
    """Fills the journal with what it lacks.

    Args:
        journal: Where results go.
        patterns: Spellings, for pruning at once.
        recovered: Those that are recovered as well.
        steps: Of recovery.
        models: Folder of recovered weights, and of what an interrupted recovery goes on from.
    """
    task = Task()
    todo = [trial for trial in trials(patterns, recovered, steps) if trial.asked not in journal]
    with tqdm(todo, unit="model") as bar:
        for trial in bar:
            bar.set_description(f"{trial.method} {trial.pattern}, {trial.steps} steps")
            started = time.perf_counter()
            model, found = _run(trial, task, models)
            journal.add(trial.asked, {**found, "seconds": time.perf_counter() - started})
            if trial.steps:
                save_file(model.state_dict(), models / f"{trial.stem}.safetensors")


def prune_encoder(model: nn.Module, task: Task, trial: Trial) -> Any:
    """Prunes a copy of the dense encoder in place; returns the report."""
    if trial.permuted:
        permute(model, trial.pattern, task.example, targets=encoder.ENCODER_LINEARS, progress=False)
    return prune(
        model,
        trial.pattern,
        trial.method,
        task.calibration,
        encoder.ENCODER_LINEARS,
        reconstruction=trial.reconstruction or None,
        progress=False,
    )


def _run(trial: Trial, task: Task, models: Path) -> tuple[nn.Module, dict[str, float]]:
    model = deepcopy(task.dense)
    report = prune_encoder(model, task, trial)
    if trial.steps:
        models.mkdir(parents=True, exist_ok=True)
        distill(
            model,
            task.dense,
            task.training,
            report.masks,
            hidden=_BLOCKS,
            output_loss="cosine",
            steps=trial.steps,
            lr=_RATE,
            autocast="auto",
            checkpoint=models / f"{trial.stem}.checkpoint",
        )
    errors = [layer.error for layer in report.layers if layer.error is not None]
    return model, {**task.quality(model), "error": sum(errors) / len(errors)}


def load_encoder(path: Path) -> nn.Module:
    """An encoder whose weights a study wrote."""
    model = encoder.empty()
    model.load_state_dict(load_file(path))
    return model
