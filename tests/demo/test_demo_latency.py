"""The comparison of engines: order, summary, skipped rows, and no credit for a wrong result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsekit.demo import latency
from sparsekit.demo.latency import Engine, Inputs, Run, Unavailable, measure


class Tiny(nn.Module):
    """Embeds ids without looking at the mask, as the sentence encoder does in shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2000, 8)
        self.dense = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.dense(self.embedding(input_ids)).mean(1)


def fixed(name: str, output: Tensor, sparse: bool, log: list[str]) -> Engine:
    def build(inputs: Inputs, folder: Path) -> Run:
        def run() -> Tensor:
            log.append(name)
            return output

        return run

    return Engine(name, sparse, build)


def unavailable(inputs: Inputs, folder: Path) -> Run:
    raise Unavailable("not on this machine")


def test_engines_take_turns() -> None:
    log: list[str] = []
    row = torch.ones(1, 3)
    result = measure(
        [fixed("a", row, False, log), fixed("b", row, True, log)], 1, 4, 2000, 3, progress=False
    )
    # Each one is run twice before the clock starts.
    assert log == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert result["rounds"] == 3
    assert (result["batch"], result["tokens"]) == (1, 4)


def test_an_unavailable_engine_keeps_its_row_with_the_reason() -> None:
    log: list[str] = []
    row = torch.ones(1, 3)
    engines = [
        fixed("dense", row, False, log),
        Engine("missing", False, unavailable),
        fixed("ours", row, True, log),
    ]
    result = measure(engines, 1, 4, 2000, 2, progress=False)
    names = [engine["name"] for engine in result["engines"]]
    assert names == ["dense", "missing", "ours"]
    missing = {"name": "missing", "sparse": False, "skipped": "not on this machine"}
    assert result["engines"][1] == missing
    assert result["fastest_dense"] == "dense"
    assert result["fastest_sparse"] == "ours"


def test_a_wrong_result_disqualifies() -> None:
    log: list[str] = []
    engines = [
        fixed("dense", torch.tensor([[1.0, 0.0]]), False, log),
        fixed("wrong", torch.tensor([[0.0, 1.0]]), False, log),
        fixed("nan", torch.tensor([[torch.nan, 1.0]]), False, log),
        # Pruned weights may answer differently from dense ones, but not from themselves.
        fixed("ours", torch.tensor([[0.6, 0.8]]), True, log),
    ]
    result = measure(engines, 1, 4, 2000, 2, progress=False)
    skipped = {e["name"]: e["skipped"] for e in result["engines"] if "skipped" in e}
    assert skipped == {
        "wrong": "its result differs from eager's: cosine 0.0000",
        "nan": "its result differs from eager's: cosine nan",
    }


def test_the_summary_names_the_fastest_of_each_kind() -> None:
    candidates = [
        Engine(name, sparse, unavailable)
        for name, sparse in (("eager", False), ("frozen", False), ("s1", True), ("s2", True))
    ]
    times = {
        "eager": [10.0, 30.0, 20.0],
        "frozen": [10.0, 10.0, 99.0],
        "s1": [8.0, 8.0, 8.0],
        "s2": [5.0, 4.0, 6.0],
    }
    result = latency._summary(candidates, times, {}, 32, 128, 3)
    assert result["fastest_dense"] == "frozen"
    assert result["fastest_sparse"] == "s2"
    assert result["sparse_vs_eager"] == 4.0
    assert result["sparse_vs_fastest_dense"] == 2.0
    eager = result["engines"][0]
    assert (eager["ms"], eager["ms_low"], eager["ms_high"], eager["speedup"]) == (20, 15, 25, 1)


def test_real_engines_agree_with_eager() -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    engines = latency.engines(model, model, torch.float32, compile_models=False)
    result = measure(engines, 2, 5, 2000, 2, progress=False)
    rows = {row["name"]: row for row in result["engines"]}
    assert rows["torch.compile, frozen float32"]["skipped"] == "left out of this run"
    assert "ms" in rows["torch eager float32"]
    assert "ms" in rows["sparsekit eager float32"]
    assert "ms" in rows["ONNX Runtime float32"]
    if torch.backends.mkldnn.is_available():
        assert "ms" in rows["torch oneDNN float32"]


def test_bfloat16_is_compared_with_dense_float32_as_well() -> None:
    model = Tiny().eval()
    engines = latency.engines(model, model, torch.bfloat16, compile_models=False)
    names = [engine.name for engine in engines]
    assert names[0] == "torch eager float32"
    assert "torch eager bfloat16" in names
    assert "sparsekit eager bfloat16" in names
    # The dense model is copied, not cast under the caller's feet.
    assert model.dense.weight.dtype == torch.float32


def test_without_onnxruntime_the_row_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r'onnxruntime is not installed; pip install "sparsekit'):
        latency._onnxruntime(Tiny())(latency.example(1, 4, 2000), Path())


def test_without_a_compiler_torch_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Unavailable, match=r"needs a C\+\+ compiler, none was found"):
        latency._compiled(Tiny(), True)(latency.example(1, 4, 2000), Path())


def test_examples_are_reproducible_and_fully_attended() -> None:
    ids, mask = latency.example(3, 7, 2000)
    again, _ = latency.example(3, 7, 2000)
    assert torch.equal(ids, again)
    assert ids.shape == mask.shape == (3, 7)
    assert int(ids.min()) >= 1000
    assert int(ids.max()) < 2000
    assert bool(mask.all())
