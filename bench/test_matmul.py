"""`pytest bench --benchmark-only`: the chosen kernel of each layer beside every baseline."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import BASELINES
from bench.case import Case, machine, prepare
from bench.timing import Rivals, rounds_within, settle, timed_call


def test_matmul(case: Case, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    option = request.config.option
    torch.set_num_threads(option.threads)
    # A forced kernel is compared with dense alone.
    prepared = prepare(case, [b for b in BASELINES if b.dense or case.kernel is None])
    with torch.inference_mode():
        # torch's sparse formats are often slower than dense by far: one call says enough.
        slow = {name: timed_call(call) for name, call in prepared.sparse.items()}
        rivals = Rivals(prepared.dense)
        once = timed_call(prepared.ours) + sum(timed_call(c) for c in prepared.dense.values())

        def before_each_round() -> None:
            rivals.run_round()
            settle(prepared.ours)

        benchmark.pedantic(
            prepared.ours,
            setup=before_each_round,
            rounds=rounds_within(option.seconds, 5 * once),
        )
    assert benchmark.stats is not None, "run it with --benchmark-only"
    rivals.seconds["ours"] = list(benchmark.stats.stats.data)
    medians = rivals.medians()
    fastest = min(prepared.dense, key=lambda name: medians[name])
    rivals_ms = {name: medians[name] * 1e3 for name in prepared.dense}
    rivals_ms |= {name: seconds * 1e3 for name, seconds in slow.items()}
    benchmark.extra_info.update(
        machine=machine(),
        shape=case.shape.name,
        m=case.m,
        n=case.shape.n,
        k=case.shape.k,
        pattern=case.pattern,
        dtype=str(case.dtype).removeprefix("torch."),
        kernel=prepared.kernel,
        forced=case.kernel is not None,
        threads=torch.get_num_threads(),
        ms=medians["ours"] * 1e3,
        gflops=2e-9 * case.m * case.shape.n * case.shape.k / medians["ours"],
        speedup=rivals.speedup("ours", fastest),
        fastest_dense=fastest,
        rivals_ms=rivals_ms,
        unavailable=prepared.unavailable,
    )
