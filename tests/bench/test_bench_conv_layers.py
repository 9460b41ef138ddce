import json
import sys
from pathlib import Path

import pytest
import torch

import sparsekit as sk
from bench import conv_case, conv_layers
from bench.conv_case import ConvCase, ConvLayer, prepare
from bench.conv_layers import POINTWISE, REGIMES, SPATIAL, ConvJob, ConvRegime, jobs, main, measure
from bench.peers import Worker

THREADS = torch.get_num_threads()
SMALL = ConvLayer("test", 16, 32, 3, 7, stride=2)

# DeepSparse without DeepSparse: ONNX Runtime in its place.
FAKE = """
import os, sys
import numpy, onnxruntime
from bench import peer_worker
def load(request):
    session = onnxruntime.InferenceSession(request["model"], providers=["CPUExecutionProvider"])
    x = numpy.load(request["inputs"][0])
    return (lambda: session.run(None, {"x": x})[0]), "fake"
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
peer_worker.serve(load, sys.stdin, answers)
"""


def test_regimes_have_names_of_their_own_and_the_limits_of_their_patterns() -> None:
    assert len({regime.name for regime in REGIMES}) == len(REGIMES)
    for regime in REGIMES:
        assert regime.limit == pytest.approx(1 / (1 - sk.parse_pattern(regime.pattern).sparsity))
        assert regime.goal is None or 1 < regime.goal < regime.limit


def test_layers_are_those_of_the_networks() -> None:
    assert {layer.kernel for layer in SPATIAL} == {3}
    assert {layer.kernel for layer in POINTWISE} == {1}
    assert all(min(layer.inputs, layer.outputs) >= 64 for layer in SPATIAL)
    halving = ConvCase(SPATIAL[1], 8, "2:4", torch.float32)
    assert (halving.m, halving.layer.k) == (8 * 28 * 28, 9 * 64)
    assert halving.name == "3x3/2-64-128-at-56-batch8-2:4-f32"


def test_jobs_keep_a_layer_together() -> None:
    todo = jobs(REGIMES[:2], [1, 8], [1, 2])
    layers = [(job.case.pattern, job.case.layer.name) for job in todo]
    assert len(todo) == 2 * len(SPATIAL) * 2 * 2
    assert layers == sorted(layers, key=layers.index)
    assert todo[0].operations == 2 * 56 * 56 * 64 * 9 * 64


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4", "bsr16x16@0.5"])
@pytest.mark.parametrize("layer", [SMALL, ConvLayer("test", 32, 48, 1, 5)], ids=lambda x: x.name)
def test_every_path_computes_the_same(layer: ConvLayer, pattern: str) -> None:
    prepared, workload = prepare(ConvCase(layer, 2, pattern, torch.float32))
    filters = prepared.layer
    x = workload.input()
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(
        x.double(),
        filters.weight.double(),
        filters.bias.double(),
        layer.stride,
        layer.kernel // 2,
    )
    assert prepared.dense.keys() == {"torch", "torch channels_last", "oneDNN", "onnxruntime"}
    for call in (prepared.ours, *prepared.dense.values()):
        torch.testing.assert_close(call().double(), expected, rtol=1e-4, atol=1e-4)
    assert sk.detect(filters.weight) is not None


def test_bfloat16_leaves_out_what_has_none() -> None:
    prepared, _ = prepare(ConvCase(SMALL, 1, "2:4", torch.bfloat16))
    assert "torch channels_last" in prepared.dense
    assert prepared.unavailable == {
        "onnxruntime": "ONNX Runtime's CPU provider has no bfloat16 Conv"
    }


def test_an_older_instruction_set_leaves_onnxruntime_out() -> None:
    prepared, _ = prepare(ConvCase(SMALL, 1, "2:4", torch.float32), every_isa=False)
    assert "onnxruntime" not in prepared.dense | prepared.unavailable


def test_deepsparse_runs_the_same_filters() -> None:
    with Worker("deepsparse", [sys.executable, "-c", FAKE]) as worker:
        prepared, _ = prepare(ConvCase(SMALL, 2, "2:4", torch.float32), [worker])
        assert prepared.unavailable == {}
        torch.testing.assert_close(
            prepared.sparse["deepsparse"](), prepared.ours(), rtol=1e-4, atol=1e-4
        )
        bf16, _ = prepare(ConvCase(SMALL, 2, "2:4", torch.bfloat16), [worker])
    assert "bfloat16" in bf16.unavailable["deepsparse"]


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> object:
        return lambda: torch.zeros(1, 32, 4, 4)

    monkeypatch.setattr(conv_case.ConvWorkload, "sparse", wrong)
    with pytest.raises(AssertionError, match="the error against float64"):
        prepare(ConvCase(SMALL, 1, "2:4", torch.float32))


def test_a_measured_case() -> None:
    regime = ConvRegime("r", (SMALL,), "2:4", torch.float32, 1.5, 2.0)
    job = ConvJob(regime, ConvCase(SMALL, 2, "2:4", torch.float32), THREADS)
    result = measure(job, seconds=0, most_rounds=3)
    assert (result.regime, result.pattern, result.dtype, result.counts) == ("r", "2:4", "f32", True)
    assert (result.m, result.n, result.k) == (2 * 4 * 4, 32, 9 * 16)
    assert result.layer == "3x3/2-16-32-at-7, batch 2"
    assert result.kernel.startswith("conv2d_")
    assert result.fastest_dense in result.dense_ms


def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    regime = ConvRegime("small", (SMALL,), "2:4", torch.float32, None, 2.0)
    monkeypatch.setattr(conv_layers, "REGIMES", (regime,))
    command = ["--regimes", "small", "--batches", "1", "2", "--threads", str(THREADS)]
    monkeypatch.setattr(conv_layers, "SPATIAL", (SMALL,))
    main([*command, "--seconds", "0", "--out", str(tmp_path)])
    (figures,), (text,) = tmp_path.glob("*-convolutions.json"), tmp_path.glob("*-convolutions.md")
    assert [result["m"] for result in json.loads(figures.read_text())["results"]] == [16, 32]
    assert "## Convolutions" in text.read_text()
    assert "2 cases, about" in capsys.readouterr().out


def test_the_list_tells_goals_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--regimes", "f32-3x3-2:4", "*3x3-blocks-90", "--list"])
    lines = capsys.readouterr().out
    assert "f32-3x3-2:4: goal 1.4x, limit 2.0x, 3x3-64-64-at-56" in lines
    assert "f32-3x3-blocks-90: limit 10.0x" in lines


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--regimes", "f33*"], "--regimes: 'f33*' matches none of f32-3x3-2:4,"),
        (["--layers", "5x5*"], "--layers: '5x5*' matches none of 3x3-64-64-at-56,"),
        (["--batches", "0"], "expected a whole number of at least 1, got '0'"),
    ],
)
def test_wrong_arguments(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(given)
    assert message in capsys.readouterr().err


def test_no_case_is_an_error() -> None:
    with pytest.raises(SystemExit, match="nothing to measure"):
        main(["--regimes", "f32-3x3*", "--layers", "1x1*"])


def test_a_missing_peer_says_how_to_get_it() -> None:
    with pytest.raises(SystemExit, match="make peers-env"):
        main(["--peers", "--deepsparse", "/nowhere/python"])
