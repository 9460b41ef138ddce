import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekit as sk
from bench import gpu, gpu_peers, gpu_sample, gpu_timing
from bench.gpu import Reference, arguments, chosen_jobs, main, parse_smi, read_rates
from bench.gpu_cases import GOALS, REGIMES, Job, Regime, jobs, quick
from bench.gpu_peers import Compiler, bsr_options, fastest, padded
from bench.gpu_report import Result, Timed
from bench.gpu_timing import OVERFLOW, TURN_S, Call, Turns, calls_and_copies
from bench.gpu_timing import Path as CallPath

F16 = torch.float16


def timed(us: float, captured: bool = True) -> Timed:
    return Timed(us, us - 1, us + 1, 5, captured)


@pytest.fixture
def result() -> Result:
    return Result(
        regime="decode-2:4-f16",
        pattern="2:4",
        dtype="f16",
        m=1,
        n=8192,
        k=8192,
        kernel="matmul_nm_mma_sp_f16_sm80_64x8",
        paths={"sparsekit": timed(20), "cuBLAS": timed(36)},
        speedup={"cuBLAS": 1.8},
        unavailable={},
        bytes_moved=75_530_240,
        copy_gbytes_per_s=4200.0,
        instruction="mma.sp.m16n8k32",
        instruction_operations=1 << 27,
    )


def job(name: str, m: int, n: int, k: int) -> Job:
    return Job(next(regime for regime in REGIMES if regime.name == name), m, n, k)


# ---- cases ---------------------------------------------------------------------------------------


def test_every_goal_has_a_regime_and_cases() -> None:
    names = [regime.name for regime in REGIMES]
    assert len(names) == len(set(names))
    for goal in GOALS:
        assert goal.regime in names
        counting = [j for j in jobs(REGIMES) if j.regime.name == goal.regime]
        assert any(goal.counts(j.n, j.k, j.m) for j in counting)


def test_cases_are_unique_and_filtered() -> None:
    every = list(jobs(REGIMES))
    assert len({j.name for j in every}) == len(every)
    few = list(jobs(REGIMES[:1], [(512, 256)], [1, 16, 5]))
    assert [j.name for j in few] == [f"{REGIMES[0].name} m={m} 512x256" for m in (1, 16)]


def test_the_quick_run_has_every_regime() -> None:
    found = list(quick(REGIMES))
    assert {j.regime for j in found} == set(REGIMES)
    assert len(found) == len({j.name for j in found}) <= 4 * len(REGIMES)
    assert max(j.m for j in found) <= 4096


def test_what_a_call_moves_and_does() -> None:
    nm = job("decode-2:4-f16", 3, 64, 128)
    assert nm.weight_bytes == 64 * 64 * 2 + 64 * 128 // 8
    assert nm.bytes_moved == nm.weight_bytes + 2 * 3 * (64 + 128)
    assert nm.operations == nm.instruction_operations == 2 * 3 * 64 * 128
    assert nm.instruction == "mma.sp.m16n8k32"
    blocks = job("gemm-bsr64@0.75-f16", 2, 256, 512)
    assert blocks.weight_bytes == 8 * (64 * 64 * 2 + 4)
    assert blocks.operations == 4 * blocks.instruction_operations == 2 * 2 * 256 * 512
    assert blocks.instruction == "mma.m16n8k16"


def test_only_large_layers_and_many_tokens_count_where_a_goal_says_so() -> None:
    goal = next(goal for goal in GOALS if goal.large)
    assert goal.counts(8192, 8192, 1)
    assert not goal.counts(4096, 4096, 1)
    goal = next(goal for goal in GOALS if goal.least_rows)
    assert goal.counts(4096, 4096, goal.least_rows)
    assert not goal.counts(4096, 4096, goal.least_rows - 1)


def test_the_command_line_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = chosen_jobs(arguments(["--regimes", "*bsr64*", "--rows", "16384"]))
    assert {j.regime.pattern for j in chosen} == {"bsr64x64@0.75", "bsr64x64@0.9"}
    assert {j.m for j in chosen} == {16384}
    main(["--list", "--quick", "--regimes", "decode-2:4-f16", "--rows", "16"])
    assert capsys.readouterr().out.splitlines() == [
        "decode-2:4-f16 m=16 8192x8192",
        "decode-2:4-f16 m=16 14336x4096",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--regimes", "gemm-4:8"], "'gemm-4:8' matches none of decode-2:4-f16"),
        (["--shapes", "64"], "expected NxK such as 4096x1024, got '64'"),
        (["--shapes", "64x64", "--quick"], "leave out --shapes or --quick"),
        (["--rows", "0"], "expected a whole number of at least 1, got '0'"),
    ],
)
def test_a_wrong_command_line_is_told(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments(given)
    assert message in capsys.readouterr().err


def test_nothing_to_measure_and_no_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="nothing to measure"):
        main(["--regimes", "decode-*", "--rows", "5"])
    for command in (main, gpu_sample.main):
        with pytest.raises(SystemExit, match="torch sees no GPU here"):
            command([])


# ---- timing --------------------------------------------------------------------------------------

L2 = 60 << 20


@pytest.mark.parametrize("call_s", [1e-6, 2e-5, 1e-3, 0.1])
@pytest.mark.parametrize("weight_bytes", [0, 1 << 20, 19 << 20, 1 << 30])
def test_a_turn_is_long_enough_and_overflows_l2(call_s: float, weight_bytes: int) -> None:
    calls, copies = calls_and_copies(call_s, weight_bytes, L2, most=512)
    assert calls % copies == 0
    assert calls * call_s >= TURN_S or calls >= 512
    # Every copy has left L2 before it is read again, in this turn or between turns.
    assert copies == calls or copies * weight_bytes >= OVERFLOW * L2
    assert copies == 1 or (copies - 1) * weight_bytes < OVERFLOW * L2


class Watch:
    """Runs at once and says a millisecond."""

    l2_bytes = 1000

    def seconds(self, run: Any, head_start_s: float = 0.0) -> float:
        run()
        return 1e-3


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Everything but the events and the graphs works on a CPU."""

    def refuse(calls: object) -> None:
        raise RuntimeError("no graphs here\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda name: None)
    monkeypatch.setattr(gpu_timing, "_captured", refuse)
    return Watch()


def test_calls_go_round_their_copies(no_gpu: Watch) -> None:
    order: list[int] = []
    numbers = itertools.count()

    def make() -> Call:
        number = next(numbers)
        return lambda: order.append(number) or torch.zeros(1)  # type: ignore[func-returns-value]

    turns = Turns(CallPath(make, weight_bytes=2000), no_gpu)  # type: ignore[arg-type]
    assert (turns.captured, turns.reason) == (False, "RuntimeError: no graphs here")
    order.clear()
    (seconds,) = turns.turn()
    copies = OVERFLOW * 1000 // 2000 + 1
    assert order[:copies] == list(range(copies))
    assert order[copies : 2 * copies] in ([], order[:copies])
    assert seconds == 1e-3 * 2 / len(order)  # the calls ran twice, once to warm up


def test_what_a_graph_computes_is_checked(no_gpu: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[Tensor] = []

    class Graph:
        def replay(self) -> None:
            replayed.append(y)

    y = torch.full((3,), torch.nan)
    path = CallPath(lambda: lambda: torch.ones(3), weight_bytes=10)
    monkeypatch.setattr(gpu_timing, "_captured", lambda calls: (Graph(), y))

    def check(result: Tensor) -> None:
        assert replayed, "checked before anything was computed"
        assert result.isfinite().all()

    with pytest.raises(AssertionError, match="assert"):
        Turns(path, no_gpu, check)  # type: ignore[arg-type]
    y.fill_(1)
    turns = Turns(path, no_gpu, check)  # type: ignore[arg-type]
    assert turns.captured
    calls, _ = calls_and_copies(1e-3 / 3, 10, no_gpu.l2_bytes, 512)
    assert turns.turn() == [1e-3 / calls]


def test_the_fastest_option_that_works_is_taken(no_gpu: Watch) -> None:
    times = iter([3.0, 3.0, 1.0, 1.0, 2.0, 2.0])
    no_gpu.seconds = lambda run, head_start_s=0.0: next(times)  # type: ignore[method-assign]

    def call(option: int) -> Tensor:
        if option == 0:
            raise RuntimeError("out of resources")
        return torch.zeros(1)

    options = [{"option": option} for option in range(4)]
    assert fastest(options, call, no_gpu) == {"option": 2}  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of resources"):
        fastest(options[:1], call, no_gpu)  # type: ignore[arg-type]


# ---- peers ---------------------------------------------------------------------------------------


def test_padding_adds_rows_of_zeros_where_there_are_too_few() -> None:
    x = torch.ones(3, 5)
    assert padded(x, 8).shape == (8, 5)
    assert padded(x, 8).sum() == 15
    assert padded(x, 3) is x


@pytest.mark.parametrize("tokens", [16, 4096, 16384])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_bsr_options_split_the_tokens_evenly(tokens: int, side: int) -> None:
    options = list(bsr_options(tokens, (side, side)))
    assert 2 < len(options) <= 9
    assert len({tuple(option.values()) for option in options}) == len(options)
    for option in options:
        assert tokens % option["SPLIT_N"] == 0
        assert tokens // option["SPLIT_N"] >= 16


def test_compiling_stops_when_its_time_is_up() -> None:
    with pytest.raises(gpu_peers.Unavailable, match="no time left to compile"):
        Compiler(0).build(torch.zeros(4, 4), torch.zeros(1, 4))


# ---- the whole way, on a CPU ---------------------------------------------------------------------

SMALL = Regime("decode-2:4-f16", "2:4", torch.bfloat16, (4,), ((64, 96),))


@pytest.fixture
def bench(no_gpu: Watch, monkeypatch: pytest.MonkeyPatch) -> gpu.Bench:
    monkeypatch.setattr(gpu, "_COPIED_BYTES", 1000)
    monkeypatch.setattr(gpu, "forced_path", lambda kernel, packed, x: gpu.public_path(packed, x))
    options = arguments(["--rounds", "3", "--kernels", "2", "--case-seconds", "0.01"])
    return gpu.Bench(torch.device("cpu"), no_gpu, options)  # type: ignore[arg-type]


def test_a_case_is_measured_against_its_peers(bench: gpu.Bench) -> None:
    failures: list[str] = []
    result = bench.measure(Job(SMALL, 4, 64, 96), failures)
    assert failures == []
    assert result.kernel == next(iter(result.forced))
    assert {"sparsekit", "cuBLAS", "cuBLASLt", *result.forced} == set(result.paths)
    assert set(result.speedup) == {"cuBLAS", "cuBLASLt"}
    assert set(result.unavailable) == {"cuSPARSELt", "torch CUTLASS", *result.paths}
    assert result.unavailable["sparsekit"] == "timed without a graph: RuntimeError: no graphs here"
    assert all(timed.rounds == 3 for timed in result.paths.values())
    assert result.copy_gbytes_per_s is not None


def test_a_wrong_result_is_no_result(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = CallPath(lambda: lambda: torch.zeros(4, 64, dtype=torch.bfloat16), 1)
    monkeypatch.setattr(gpu, "forced_path", lambda kernel, packed, x: wrong)
    failures: list[str] = []
    result = bench.measure(Job(SMALL, 4, 64, 96), failures)
    assert not result.forced
    assert result.choice is None
    assert len(failures) == 2
    assert "forced: AssertionError: the error against float64 is" in failures[0]
    monkeypatch.setattr(gpu, "public_path", lambda packed, x: wrong)
    with pytest.raises(AssertionError, match="the error against float64"):
        bench.measure(Job(SMALL, 4, 64, 96), failures)


def test_what_was_not_written_is_found() -> None:
    x, weight = torch.randn(40, 16, dtype=F16), torch.randn(8, 16, dtype=F16)
    y = x @ weight.T
    reference = Reference(x, weight)
    reference.check(y)
    for place, value, message in (
        ((20, 3), torch.nan, "NaN or an infinity"),
        ((39, 7), 3e4, "relative error"),
    ):
        broken = y.clone()
        broken[place] = value
        with pytest.raises(AssertionError, match=message):
            reference.check(broken)
    with pytest.raises(AssertionError, match="shape"):
        reference.check(y.t())


class FakeCuda:
    """What `main` asks torch.cuda for."""

    name, major, minor, multi_processor_count, L2_cache_size = "Some GPU", 9, 0, 132, L2


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeCuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "gpu_state", lambda: {"driver": "1"})
    monkeypatch.setattr(gpu, "Stopwatch", lambda l2_bytes: None)


def test_a_run_keeps_what_it_has(
    cuda: None,
    result: Result,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Measured:
        def __init__(self, *options: object) -> None:
            pass

        def measure(self, job: Job, failures: list[str]) -> Result:
            if job.m == 4:
                raise AssertionError("the error is large")
            return result

    monkeypatch.setattr(gpu, "Bench", Measured)
    given = ["--regimes", "decode-2:4-f16", "--shapes", "64x64", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(given)
    (figures,) = tmp_path.glob("*-some-gpu-sm90-gpu.json")
    content = json.loads(figures.read_text())
    assert len(content["results"]) == 3
    assert content["failures"] == [
        "decode-2:4-f16 m=4 64x64: AssertionError: the error is large",
    ]
    assert content["before"] == content["after"] == {"driver": "1"}
    assert "1.80x cuBLAS" in capsys.readouterr().out
    main([*given, "--seconds", "-1"])
    content = json.loads(figures.read_text())
    assert content["results"] == []
    assert len(content["left_out"]) == 4


def test_a_broken_gpu_ends_the_run(
    cuda: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*anything: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Broken:
        def __init__(self, *options: object) -> None:
            pass

        measure = fail

    monkeypatch.setattr(gpu, "Bench", Broken)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    (report,) = tmp_path.glob("*.md")
    text = report.read_text()
    assert text.count("illegal memory access") == 1
    assert "the GPU failed: the cases after this one are missing" in text


# ---- what other programs say ---------------------------------------------------------------------


def test_nvidia_smi_is_read() -> None:
    assert parse_smi("580.1, 1980, 3201, 120.5, 41\n") == {
        "driver": "580.1",
        "SM clock": "1980 MHz",
        "memory clock": "3201 MHz",
        "power": "120.5 W",
        "temperature": "41 °C",
    }
    assert "power" not in parse_smi("580.1, 1980, 3201, [N/A], 41")
    assert parse_smi("") == parse_smi("No devices were found") == {}


def test_rates_are_read_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "mma_rate.json"
    assert read_rates(None) == read_rates(path) == []
    path.write_text("")
    assert read_rates(path) == []
    path.write_text('{"gpu": "x", "rates": [{"tflops": 1.0}]}')
    assert read_rates(path) == [{"tflops": 1.0}]


# ---- the sample ----------------------------------------------------------------------------------


def test_the_sample_has_every_kernel_of_a_device() -> None:
    here = [k for k in sk.kernels() if k.device == "cpu" and k.available and k.format == "nm"]
    found = list(gpu_sample.samples(here, torch.device("cpu")))
    assert {sample.kernel.name for sample in found} <= {kernel.name for kernel in here}
    assert {s.sizes for s in found} == {*gpu_sample.PROBLEMS, *gpu_sample.IMAGES}
    assert len({sample.name for sample in found}) == len(found)


def test_a_sample_runs_and_is_checked() -> None:
    """With kernels of the CPU in the GPU's place."""
    cpu = torch.device("cpu")
    here = [k for k in sk.kernels() if k.name in ("conv2d_nm_f16_scalar", "matmul_nm_f16_scalar")]
    for sample in gpu_sample.samples(here, cpu):
        if sample.sizes in (gpu_sample.PROBLEMS[0], gpu_sample.IMAGES[0]):
            gpu_sample.run(sample, cpu)
