import json
from pathlib import Path

import pytest
import torch

import sparsekit as sk
from bench import case as cases_module
from bench import isa, race, regimes
from bench.baselines import BASELINES, Unavailable
from bench.case import Case, streamed_bytes
from bench.regimes import AVX2, AVX512, SIZES, Job, Regime, jobs, main, sizes_of
from bench.shapes import Shape

SMALL = Shape("test", "small", 64, 96, (3,))
DENSE = [baseline for baseline in BASELINES if baseline.dense]


def test_names_are_unique_and_goals_below_their_limits() -> None:
    for table in (AVX512, AVX2):
        assert len({regime.name for regime in table}) == len(table)
        for regime in table:
            assert 1 < regime.goal < regime.limit


@pytest.mark.parametrize("regime", AVX512 + AVX2, ids=lambda regime: regime.name)
def test_limits_are_those_of_the_patterns(regime: Regime) -> None:
    for text in regime.patterns:
        n, k = 1024, 1024
        pattern = sk.parse_pattern(text)
        if regime.streaming:
            streamed = streamed_bytes(pattern, n, k, regime.dtype)
            reached = n * k * regime.dtype.itemsize / streamed
        else:
            reached = 1 / (1 - pattern.sparsity)
        assert reached == pytest.approx(regime.limit, abs=0.01)


def test_streaming_layers_overflow_the_cache() -> None:
    for regime in AVX512:
        sizes = list(sizes_of(regime, SIZES, 100_000_000))
        if not regime.streaming:
            assert sizes == list(SIZES)
            continue
        assert len(sizes) == 3
        for n, k in sizes:
            assert n * k * regime.dtype.itemsize / regime.limit >= 200_000_000
            assert any(n % given == 0 and k == same for given, same in SIZES)


def test_jobs_keep_a_layer_together() -> None:
    todo = jobs(AVX512[:2], [(64, 96), (77, 130)], None, [1, 2])
    layers = [(job.case.pattern, job.case.shape.n) for job in todo]
    assert len(layers) == 3 * 2 * 4 * 2
    assert layers == sorted(layers, key=layers.index)
    assert {job.case.m for job in jobs(AVX512, SIZES, [1, 16], [1])} == {1, 16}


def test_a_measured_case(monkeypatch: pytest.MonkeyPatch) -> None:
    regime = Regime("r", ("2:4",), torch.float32, 1.5, 2.0, rows=(3,))
    job = Job(regime, Case(SMALL, 3, "2:4", torch.float32), 1)
    before = torch.get_num_threads()
    try:
        # However fast it is, it counts as a loss: the gate is asked.
        monkeypatch.setattr(race, "LOSS", 1e9)
        result = regimes.measure(job, DENSE, seconds=0, most_rounds=3)
    finally:
        torch.set_num_threads(before)
    assert (result.regime, result.pattern, result.dtype) == ("r", "2:4", "f32")
    assert (result.m, result.n, result.k, result.threads) == (3, 64, 96, 1)
    assert result.counts
    assert result.dense_ms.keys() == {"torch", "oneDNN", "onnxruntime"}
    assert result.fastest_dense in result.dense_ms
    assert result.gate_speedup is not None
    assert result.verdict.startswith("gate keeps ")
    assert result.gbytes_per_s is None


def test_a_streaming_case_reports_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regimes, "_buffer", lambda: torch.ones(1 << 10))
    regimes.reader.cache_clear()
    regime = Regime("r", ("2:4",), torch.float32, 1.5, 1.88, (1,), (), streaming=True)
    job = Job(regime, Case(SMALL, 1, "2:4", torch.float32), torch.get_num_threads())
    result = regimes.measure(job, DENSE, seconds=0, most_rounds=3)
    regimes.reader.cache_clear()
    assert result.gbytes_per_s == pytest.approx(64 * 96 * 17 / 8 / result.ms / 1e6)
    assert result.bandwidth_share is not None
    assert "read" not in result.dense_ms | result.peers_ms


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    command = ["--regimes", "f32-blocks-*", "--shapes", "77x130", "--rows", "16", "64"]
    try:
        main([*command, "--threads", "1", "--seconds", "0", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(before)
    (figures,), (text,) = tmp_path.glob("*-regimes.json"), tmp_path.glob("*-regimes.md")
    content = json.loads(figures.read_text())
    assert [result["regime"] for result in content["results"]] == ["f32-blocks-75"] * 2 + [
        "f32-blocks-90"
    ] * 2
    assert [result["counts"] for result in content["results"]] == [False, True] * 2
    assert "## Regimes" in text.read_text()
    assert "4 cases, about" in capsys.readouterr().out


@pytest.mark.parametrize("error", [AssertionError("it is wrong"), Unavailable("it is gone")])
def test_a_case_without_a_figure_fails_the_run(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(*_: object) -> None:
        raise error

    monkeypatch.setattr(cases_module, "check", wrong)
    command = ["--regimes", "f32-2:4", "--shapes", "77x130", "--rows", "16", "--threads", "1"]
    before = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit, match="1"):
            main([*command, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(before)
    assert list(tmp_path.iterdir()) == []
    assert str(error) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regimes", "f33*"], "'f33*' matches none of"),
        (["--shapes", "64"], "expected NxK such as 4096x1024, got '64'"),
        (["--shapes", "0x64"], "expected sizes of at least 1"),
        (["--threads", "0"], "expected a whole number of at least 1, got '0'"),
        (["--rows", "-3"], "expected"),
        (["--isa", "sse"], "invalid choice"),
        (["--peers", "mkl"], "invalid choice"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_no_case_is_an_error() -> None:
    with pytest.raises(SystemExit, match="nothing to measure"):
        main(["--regimes", "*streaming", "--shapes", "77x130"])


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="make peers-env"):
        main(["--peers", "deepsparse", "--deepsparse", "/nowhere/python"])


def test_peers_without_names_are_all() -> None:
    assert "deepsparse" in regimes.arguments(["--peers"]).peers
    assert "torch-csr" in regimes.arguments(["--peers"]).peers
    assert regimes.arguments([]).peers == []


def test_an_instruction_set_is_limited_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    class Replaced(Exception):
        pass

    def execve(_: str, command: list[str], environment: dict[str, str]) -> None:
        started.append((command, environment))
        raise Replaced

    monkeypatch.setattr("os.execve", execve)
    with pytest.raises(Replaced):
        main(["--isa", "avx2"])
    ((command, environment),) = started
    assert command[1:] == ["-m", "bench.regimes", "--isa", "avx2"]
    assert environment.items() >= isa.LIMITS["avx2"].items()
    for name, value in isa.LIMITS["avx2"].items():
        monkeypatch.setenv(name, value)
    isa.limit("avx2", "bench.regimes", [])  # already so: nothing is started
    assert len(started) == 1
