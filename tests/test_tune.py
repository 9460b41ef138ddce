"""The kernel that was measured to be the fastest runs from then on, here and in later processes."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsekit as sk
from sparsekit import _native, _ops, dispatch, preferences
from sparsekit.cache import warn_once
from sparsekit.gate import VerdictCache
from sparsekit.preferences import REACH, ranges
from sparsekit.testing import make_problem
from sparsekit.workload import LinearWorkload, kernel_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tuning(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is measured counts in these tests, and not beyond them."""
    monkeypatch.delenv("SPARSEKIT_TUNED")
    warn_once.cache_clear()
    preferences.load.cache_clear()
    yield
    preferences.load.cache_clear()
    _native.clear_preferences()


@pytest.fixture
def packed() -> sk.PackedWeight:
    return sk.pack(make_problem(1, 96, 160, "2:4").weight, "2:4")


def candidates(packed: sk.PackedWeight, m: int) -> tuple[str, list[str]]:
    """The kernel chosen for a problem, and the others that can run it."""
    answer = sk.explain(packed, m=m)
    assert answer.chosen is not None
    return answer.chosen.kernel, [c.kernel for c in answer.candidates if c.ok and not c.chosen]


def reason(packed: sk.PackedWeight, m: int) -> str:
    chosen = sk.explain(packed, m=m).chosen
    assert chosen is not None
    return chosen.reason.partition(";")[0]


@pytest.fixture
def another(packed: sk.PackedWeight) -> str:
    """A kernel that the cost model does not choose, for m from 1 to 8."""
    found = [set(candidates(packed, m)[1]) for m in (1, 2, 4, 8)]
    common = sorted(set.intersection(*found))
    if not common:
        pytest.skip("this CPU has one kernel for the problem")
    return common[0]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Replaces the timing: the kernels named here take so many seconds, all others one."""
    known: dict[str, float] = {}

    def fake(calls: dict[str, Any], device: torch.device, seconds: float) -> dict[str, float]:
        return {name: known.get(name, 1.0) for name in calls}

    monkeypatch.setattr(dispatch, "_medians", fake)
    return known


def stored_file() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"]) / "sparsekit" / "tuned.json"


def load_again() -> None:
    """What a new process does."""
    _native.clear_preferences()
    preferences.load.cache_clear()
    preferences.load(CPU)


# --- measuring --------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "bsr16x16@0.75"])
def test_every_kernel_that_can_run_is_timed(pattern: str) -> None:
    report = sk.tune(pattern, m=(8, 1), n=64, k=48, seconds=0.001)
    ((problem, device, rows),) = report.problems
    assert (problem.n, problem.k, problem.threads) == (64, 48, torch.get_num_threads())
    assert device == CPU
    assert [one.m for one in rows] == [1, 8]
    for one in rows:
        answer = sk.explain(pattern, m=one.m, n=64, k=48)
        assert {t.kernel for t in one.timings} == {c.kernel for c in answer.candidates if c.ok}
        assert all(t.us > 0 for t in one.timings)
        assert [t.us for t in one.timings] == sorted(t.us for t in one.timings)
        assert answer.chosen is not None
        assert answer.chosen.kernel == one.chosen
        assert answer.chosen.reason.startswith("chosen: measured; ")
        for timing in one.timings:
            assert timing.kernel in str(report)


def test_the_default_rows_are_measured(times: dict[str, float]) -> None:
    ((_, _, rows),) = sk.tune("2:4", n=16, k=16).problems
    assert tuple(one.m for one in rows) == dispatch.ROWS


def test_kernels_are_timed_in_turns_and_hopeless_ones_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    takes = {"a": 1.0, "b": 1.5, "slow": 2.5}

    def fake_clock(_: torch.device) -> Callable[[Callable[[], Any]], float]:
        return lambda call: takes[call()]

    def call_of(name: str) -> Callable[[], Any]:
        def call() -> str:
            order.append(name)
            return name

        return call

    monkeypatch.setattr(dispatch, "clock", fake_clock)
    medians = dispatch._medians({name: call_of(name) for name in takes}, CPU, seconds=15.0)
    assert medians == takes
    assert order == [
        *("a", "b", "slow"), *("b", "slow", "a"),  # who is first changes
        *("a", "b"), *("b", "a"), *("a", "b"),
    ]  # fmt: skip


def test_measuring_leaves_the_random_state_and_the_threads_alone(packed: sk.PackedWeight) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sk.tune(packed, m=1, seconds=0.001, threads=threads + 1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


# --- the choice -------------------------------------------------------------------------------


def test_the_measured_kernel_is_what_runs(
    packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    before = {m: candidates(packed, m)[0] for m in (1, 2, 4, 8, 33)}
    assert reason(packed, 4) == "chosen: estimated"
    times[another] = 0.5
    ((_, _, (one,)),) = sk.tune(packed, m=2).problems
    assert (one.chosen, one.estimated, one.behind) == (another, before[2], 1.0)
    assert one.counts_for == (1, 8)
    for m in (1, 2, 4, 8):
        assert (candidates(packed, m)[0], reason(packed, m)) == (another, "chosen: measured")
        x = torch.randn(m, 160, generator=torch.Generator().manual_seed(m))
        forced = _ops.linear_direct(x, packed.data, 96, kernel_id=another)
        for _ in range(3):
            assert torch.equal(sk.linear(x, packed), forced)
    assert (candidates(packed, 33)[0], reason(packed, 33)) == (before[33], "chosen: estimated")


def test_noise_does_not_change_the_choice(
    packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    estimated = candidates(packed, 4)[0]
    times.update({another: 0.5, estimated: 0.505})
    ((_, _, (one,)),) = sk.tune(packed, m=4).problems
    assert (one.chosen, one.behind) == (estimated, 0.0)
    assert reason(packed, 4) == "chosen: measured"
    times[estimated] = 0.52
    ((_, _, (one,)),) = sk.tune(packed, m=4).problems
    assert (one.chosen, one.behind) == (another, pytest.approx(0.04))


def test_the_report_says_what_the_cost_model_cost(
    packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    times[another] = 0.5
    text = str(sk.tune(packed, m=(1, 8)))
    assert f"2:4 f32 n=96 k=160 as {packed.format}" in text
    assert text.count("the cost model's choice, 100% behind") == 2
    assert "the cost model chose the fastest in 0 of 2; it was behind by up to 100%" in text
    _native.clear_preferences()
    times.clear()
    times[candidates(packed, 8)[0]] = 0.1
    text = str(sk.tune(packed, m=8))
    assert "chosen, by the cost model too" in text
    assert text.endswith("the cost model chose the fastest in 1 of 1")


def test_each_part_of_a_problem_counts(
    packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    threads = torch.get_num_threads()
    times[another] = 0.5
    sk.tune(packed, m=4, threads=threads + 1)
    assert reason(packed, 4) == "chosen: estimated"
    try:
        torch.set_num_threads(threads + 1)
        assert reason(packed, 4) == "chosen: measured"
    finally:
        torch.set_num_threads(threads)
    sk.tune(packed, m=4)
    assert reason(packed, 4) == "chosen: measured"
    for other in (sk.pack(torch.eye(97, 160), "2:4"), sk.pack(torch.eye(96, 160), "2:4v4")):
        assert reason(other, 4) == "chosen: estimated"
    assert reason(packed.to(torch.bfloat16), 4) == "chosen: estimated"


def test_a_forced_kernel_comes_first(
    packed: sk.PackedWeight,
    another: str,
    times: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimated = candidates(packed, 4)[0]
    times[another] = 0.5
    monkeypatch.setenv("SPARSEKIT_KERNEL", estimated)
    _native.reload_environment()
    try:
        assert f"SPARSEKIT_KERNEL={estimated} is set and comes first" in str(sk.tune(packed, m=4))
        assert candidates(packed, 4)[0] == estimated
        assert reason(packed, 4) == "chosen: forced by SPARSEKIT_KERNEL"
    finally:
        monkeypatch.undo()
        _native.reload_environment()


def test_a_verdict_about_another_kernel_is_not_believed(
    packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    cache = VerdictCache()
    before = cache.judge(LinearWorkload(packed, 4))
    assert before.kernel == kernel_for(packed, 4)
    times[another] = 0.5
    sk.tune(packed, m=4)
    assert cache.judge(LinearWorkload(packed, 4)).kernel == another


# --- ranges of m ------------------------------------------------------------------------------


def test_the_nearest_measured_m_counts() -> None:
    assert ranges([1, 8, 64, 256]) == {1: (1, 2), 8: (3, 22), 64: (23, 128), 256: (129, 1024)}
    assert ranges([6]) == {6: (2, 24)}
    assert ranges([1, 100]) == {1: (1, 4), 100: (25, 400)}
    assert ranges([2**31 - 1]) == {2**31 - 1: (2**29, 2**31 - 1)}


@given(st.lists(st.integers(1, 2**31 - 1) | st.integers(1, 40), min_size=1, unique=True))
def test_ranges_are_disjoint_and_nearest(rows: list[int]) -> None:
    found = ranges(rows)
    assert sorted(rows) == list(found)
    for m, (first, last) in found.items():
        assert 1 <= first <= m <= last < 2**31
        for end in (first, last):
            assert m <= end * REACH
            assert end <= m * REACH
            nearest = min(abs(math.log(end / other)) for other in rows)
            assert abs(math.log(end / m)) <= nearest + 1e-9
    ends = list(found.values())
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))


def test_a_later_measurement_replaces_its_own_m_alone(
    packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    times[another] = 0.5
    sk.tune(packed, m=(1, 8))
    assert candidates(packed, 1)[0] == candidates(packed, 8)[0] == another
    times.clear()
    ((_, _, (one,)),) = sk.tune(packed, m=8).problems
    assert one.counts_for == (3, 32)  # the half way to 1 is known from before
    assert candidates(packed, 1)[0] == another
    assert candidates(packed, 8)[0] == one.estimated
    load_again()
    assert candidates(packed, 1)[0] == another
    assert candidates(packed, 8)[0] == one.estimated
    assert reason(packed, 8) == "chosen: measured"


# --- the file ---------------------------------------------------------------------------------


def in_a_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sparsekit as sk, torch\n{code}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


EXPLAIN = "c = sk.explain('2:4', m=4, n=96, k=160).chosen; print(c.kernel, c.reason, sep=': ')"


def test_a_new_process_knows(
    packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    times[another] = 0.5
    sk.tune(packed, m=4)
    known = in_a_new_process(f"torch.set_num_threads({torch.get_num_threads()})\n{EXPLAIN}")
    assert known.startswith(f"{another}: chosen: measured; ")
    # A wrong variable fails where it is used, not at the import.
    code = "try: sk.explain('2:4', m=4, n=96, k=160)\nexcept ValueError as e: print(e)"
    assert "SPARSEKIT_ISA: expected" in in_a_new_process(code, SPARSEKIT_ISA="sse9")


def test_switched_off_it_is_stored_but_does_not_count(
    packed: sk.PackedWeight,
    another: str,
    times: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARSEKIT_TUNED", "0")
    times[another] = 0.5
    text = str(sk.tune(packed, m=4))
    assert text.endswith("SPARSEKIT_TUNED=0: estimates count in this process")
    assert reason(packed, 4) == "chosen: estimated"
    load_again()
    assert _native.preference_count() == 0
    monkeypatch.delenv("SPARSEKIT_TUNED")
    load_again()
    assert candidates(packed, 4)[0] == another


def edited(change: Callable[[str], str]) -> None:
    path = stored_file()
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    load_again()


@pytest.mark.parametrize("part", ["sparsekit ", "cores"])
def test_another_machine_or_version_is_left_alone(
    part: str, packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    times[another] = 0.5
    sk.tune(packed, m=4)
    edited(lambda text: text.replace(part, f"other {part}"))
    assert reason(packed, 4) == "chosen: estimated"
    sk.tune(packed, m=1)
    assert len(json.loads(stored_file().read_text())["machines"]) == 2
    edited(lambda text: text.replace('"version": 1', '"version": 2'))
    assert reason(packed, 1) == "chosen: estimated"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: "\udcff\x00",
        lambda text: text.replace('"us": 5', '"us": "5'),
        lambda text: text.replace('"m": 4', '"m": 4.0'),
        lambda text: text.replace('"m": 4', '"m": true'),
        lambda text: text.replace('"m": 4', '"m": 0'),
        lambda text: text.replace('"m": 4', '"m": 2147483648'),
        lambda text: text.replace('"estimated"', '"guessed"'),
        lambda text: text.replace('"2:4"', '"2;4"'),
        lambda text: text.replace('"f32"', '"f31"'),
        lambda text: text.replace('"problem"', '"question"'),
        lambda text: json.dumps({"version": 1, "machines": [1]}),
        lambda text: json.dumps({"version": 1, "machines": {"m": {"p": 3}}}),
    ],
)
def test_a_damaged_file_is_ignored_and_written_anew(
    damage: Callable[[str], str], packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    times[another] = 5e-6
    sk.tune(packed, m=4)
    text = stored_file().read_text()
    assert damage(text) != text
    with pytest.warns(RuntimeWarning, match="is damaged and will be written anew"):
        edited(damage)
    assert reason(packed, 4) == "chosen: estimated"
    sk.tune(packed, m=4)  # a second warning would be an error
    assert stored_file().read_text() == text


def test_a_kernel_that_is_gone_is_skipped(
    packed: sk.PackedWeight, another: str, times: dict[str, float]
) -> None:
    times[another] = 0.5
    sk.tune(packed, m=(1, 8))
    content = json.loads(stored_file().read_text())
    ((entry,),) = content["machines"].values()
    entry["measured"][0]["kernel"] = "matmul_of_yesterday"
    edited(lambda _: json.dumps(content))
    assert (reason(packed, 1), reason(packed, 8)) == ("chosen: estimated", "chosen: measured")


def test_what_no_kernel_takes_is_ignored_with_one_warning(
    packed: sk.PackedWeight, times: dict[str, float]
) -> None:
    sk.tune(packed, m=4)
    says = "the tuned kernels are ignored: .*; run sparsekit tune --clear"
    with pytest.warns(RuntimeWarning, match=says):
        edited(lambda text: text.replace('"f32"', '"bf16"'))
    assert _native.preference_count() == 0


def test_an_unwritable_folder_costs_one_warning(
    packed: sk.PackedWeight,
    another: str,
    times: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # A file stands where the folder should be: not even root can write below it.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    times[another] = 0.5
    with pytest.warns(RuntimeWarning, match="what is tuned counts in one process alone"):
        sk.tune(packed, m=1)
    sk.tune(packed, m=8)  # a second warning would be an error
    assert candidates(packed, 1)[0] == candidates(packed, 8)[0] == another


def test_another_process_s_measurements_are_kept(
    packed: sk.PackedWeight, times: dict[str, float]
) -> None:
    sk.tune(packed, m=1)
    first = json.loads(stored_file().read_text())
    sk.tune("1:4", m=1, n=16, k=16)
    both = json.loads(stored_file().read_text())
    for machine, entries in first["machines"].items():
        assert [entry for entry in both["machines"][machine] if entry in entries] == entries
        assert len(both["machines"][machine]) == len(entries) + 1


# --- models -----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = sk.nn.SparseLinear.from_dense(nn.Linear(32, 64), "2:4")
        self.same = sk.nn.SparseLinear.from_dense(nn.Linear(32, 64), "2:4")
        self.back = sk.nn.SparseLinear.from_dense(nn.Linear(64, 32), "2:4")
        self.unused = sk.nn.SparseLinear.from_dense(nn.Linear(8, 8), "2:4")
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.back(self.wide(x) + self.same(x=x[:1]))


def test_a_model_is_tuned_at_the_rows_that_its_layers_see(times: dict[str, float]) -> None:
    model = Model()
    model.dropout.eval()
    report = sk.tune(
        model,
        example_inputs=[torch.randn(5, 3, 32), {"x": torch.randn(2, 32)}, (torch.randn(0, 32),)],
    )
    seen = {(problem.n, problem.k): [one.m for one in rows] for problem, _, rows in report.problems}
    assert seen == {(64, 32): [1, 2, 3, 15], (32, 64): [2, 15]}
    assert model.training
    assert model.wide.training
    assert not model.dropout.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert reason(model.back.packed, 15) == "chosen: measured"
    assert reason(model.unused.packed, 15) == "chosen: estimated"


def test_models_are_refused_with_a_reason() -> None:
    model = nn.Sequential(sk.nn.SparseLinear.from_dense(nn.Linear(32, 64), "2:4"))
    with pytest.raises(ValueError, match="a model needs example_inputs="):
        sk.tune(model)
    with pytest.raises(ValueError, match="a model has its own m; leave m= out"):
        sk.tune(model, m=4, example_inputs=torch.randn(1, 32))
    with pytest.raises(ValueError, match="has no sparse linear layers; convert it first"):
        sk.tune(nn.Linear(2, 2), example_inputs=torch.randn(1, 2))
    with pytest.raises(ValueError, match="has no sparse linear layers; convert it first"):
        sk.tune(
            sk.nn.SparseConv1d.from_dense(nn.Conv1d(4, 4, 3)), example_inputs=torch.ones(1, 4, 5)
        )
    with pytest.raises(ValueError, match=r"convolution's, \[4, 4, 3\]; tune takes matrices"):
        sk.tune(sk.pack(torch.ones(4, 4, 3), "2:4"), m=4)
    with pytest.raises(ValueError, match="no sparse layer ran on the example inputs"):
        sk.tune(model, example_inputs=torch.randn(0, 32))
    with pytest.raises(RuntimeError):
        sk.tune(nn.Sequential(nn.Linear(3, 3), *model), example_inputs=torch.randn(1, 32))
    assert not model[0]._forward_pre_hooks


# --- arguments, doctor ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"m": 0}, "tune: expected one m or several, each at least 1, got 0"),
        ({"m": []}, "tune: expected one m or several"),
        ({"m": (1, -1)}, "tune: expected one m or several"),
        ({"n": None}, "pass n= and k="),
        ({"seconds": 0.0}, "tune: expected seconds > 0 and threads >= 1, got seconds=0.0"),
        ({"seconds": math.nan}, "tune: expected seconds > 0"),
        ({"threads": 0}, "threads=0"),
        ({"device": "meta"}, "expected a device of type cpu or cuda, got meta"),
        ({"example_inputs": torch.ones(1)}, "example_inputs= is for a model; pass m="),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sk.tune("2:4", **{"n": 16, "k": 16, **options})
    assert not stored_file().exists()


def test_a_packed_weight_is_tuned_where_it_is(packed: sk.PackedWeight) -> None:
    with pytest.raises(ValueError, match="n=32, the packed weight has n=96"):
        sk.tune(packed, n=32)
    if not _native.cuda_device_count():
        with pytest.raises(ValueError, match=r"device=cuda, the packed weight is on cpu; move it"):
            sk.tune(packed, device="cuda")


@pytest.mark.skipif(_native.cuda_device_count() > 0, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_reason() -> None:
    with pytest.raises(NotImplementedError):
        sk.tune("2:4", n=64, k=64, dtype=torch.float16, device="cuda")


def test_doctor_and_the_list_show_what_is_loaded(
    packed: sk.PackedWeight, another: str, times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def line() -> str:
        return next(x for x in dispatch.doctor().splitlines() if x.startswith("tuned kernels"))

    assert dispatch.tuned() == "nothing is tuned; sparsekit tune measures"
    assert line().endswith("0 ranges of m loaded")
    times[another] = 0.5
    sk.tune(packed, m=(1, 8))
    assert line().endswith("2 ranges of m loaded")
    text = dispatch.tuned()
    assert text.startswith(f"this CPU: {preferences.machine_of()}\n")
    assert text.count(another) == 2
    for cell in ("1 to 2", "3 to 32", "500000.0 at m=8", "1000000.0 µs"):
        assert cell in text
    preferences.clear()
    assert line().endswith("0 ranges of m loaded")
    assert reason(packed, 8) == "chosen: estimated"
    monkeypatch.setenv("SPARSEKIT_TUNED", "0")
    assert line().endswith("SPARSEKIT_TUNED=0: estimates count in this process")
    assert not stored_file().exists()


def test_measurements_name_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, version = _native.cpu_info(), _native.build_info()["version"]
    assert preferences.machine_of().endswith(f"{cpu['cores']} cores, sparsekit {version}")
    assert f", {cpu['isa']}, " in preferences.machine_of()
    facts = {"name": "Some GPU", "sm_count": 3, "driver_version": 13000}
    monkeypatch.setattr(_native, "cuda_info", lambda index: facts)
    name = preferences.machine_of(torch.device("cuda", 0))
    assert name == f"Some GPU, 3 SMs, driver for CUDA 13.0, sparsekit {version}"


@pytest.mark.gpu
def test_a_gpu_is_tuned_like_a_cpu() -> None:
    pattern, options = "2:4", {"n": 512, "k": 512, "dtype": torch.float16, "device": "cuda:0"}
    report = sk.tune(pattern, m=(1, 64), seconds=0.01, **options)
    ((problem, device, rows),) = report.problems
    assert (problem.threads, device) == (0, torch.device("cuda:0"))
    _native.clear_preferences()
    preferences.load.cache_clear()
    for one in rows:
        chosen = sk.explain(pattern, m=one.m, **options).chosen
        assert chosen is not None
        assert chosen.kernel == one.chosen
        assert chosen.reason.startswith("chosen: measured; ")
