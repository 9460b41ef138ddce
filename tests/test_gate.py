"""Never slower than dense: the measurement, the verdict, the cache that survives anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekit as sk
from sparsekit import _native, gate, workload
from sparsekit.cache import warn_once
from sparsekit.gate import MIN_SPEEDUP, Verdict, VerdictCache, measure
from sparsekit.testing import assert_matmul_close, make_problem
from sparsekit.workload import LinearWorkload, dense_paths

VERDICT = Verdict(2.0, 1.0, 2.0, "torch", "matmul_nm_f32_scalar")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the measurement by a fixed verdict and counts the calls."""
    calls: list[int] = []

    def fake(layer: LinearWorkload) -> Verdict:
        calls.append(layer.m)
        return VERDICT

    monkeypatch.setattr(gate, "measure", fake)
    warn_once.cache_clear()
    return calls


@pytest.fixture
def packed() -> sk.PackedWeight:
    return sk.pack(make_problem(1, 33, 70, "2:4").weight, "2:4")


@pytest.mark.parametrize("activation", tuple(_native.ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_paths_compute_the_layer(dtype: torch.dtype, activation: str | None) -> None:
    problem = make_problem(9, 33, 70, "2:4", dtype)
    with torch.no_grad():
        paths = dense_paths(problem.weight, problem.bias, activation, problem.x)
        assert "torch" in paths
        assert ("oneDNN" in paths) == torch.backends.mkldnn.is_available()
        for call in paths.values():
            assert_matmul_close(call(), problem.x, problem.weight, problem.bias, activation)


def test_measure_gives_positive_times_and_names(packed: sk.PackedWeight) -> None:
    verdict = measure(LinearWorkload(packed, 4, torch.zeros(33), "gelu"))
    assert verdict.dense_ms > 0
    assert verdict.sparse_ms > 0
    assert verdict.speedup > 0
    assert verdict.dense_path in ("torch", "oneDNN")
    assert verdict.kernel in {kernel.name for kernel in sk.kernels()}
    assert verdict.fault == ""


def test_measure_leaves_the_random_state_alone(packed: sk.PackedWeight) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    measure(LinearWorkload(packed, 1))
    assert torch.equal(torch.rand(1), expected)


def test_a_wrong_kernel_never_wins(
    packed: sk.PackedWeight, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = workload.linear
    monkeypatch.setattr(workload, "linear", lambda *arguments: right(*arguments) * 1.5)
    verdict = measure(LinearWorkload(packed, 4))
    assert "the sparse result differs from dense by" in verdict.fault
    assert not verdict.wins
    cache = VerdictCache(tmp_path / "verdicts.json")
    assert cache.judge(LinearWorkload(packed, 4)).fault
    assert not cache.path.exists()


def test_a_win_needs_more_than_noise() -> None:
    def verdict(speedup: float, fault: str = "") -> Verdict:
        return Verdict(1.0, 1.0, speedup, "torch", "kernel", fault)

    assert verdict(MIN_SPEEDUP).wins
    assert not verdict(MIN_SPEEDUP - 0.01).wins
    assert not verdict(10.0, "wrong").wins


def test_noise_is_undecided() -> None:
    assert not gate._is_undecided([(2.0, 1.0)] * 7)
    assert not gate._is_undecided([(1.0, 1.0)] * 7)
    # The pairs say 1.0, the medians 1.2: a burst hit the two sides unevenly.
    noisy = [(3.0, 3.0), (3.0, 3.0), (9.0, 1.0), (3.0, 3.0), (1.0, 2.0), (1.0, 1.0)]
    assert gate._is_undecided(noisy)


# --- the cache --------------------------------------------------------------------------------


def test_verdicts_are_remembered_in_a_file(packed: sk.PackedWeight, counted: list[int]) -> None:
    cache = VerdictCache()
    assert cache.path == Path(os.environ["XDG_CACHE_HOME"]) / "sparsekit" / "verdicts.json"
    assert (
        cache.judge(LinearWorkload(packed, 4)) == cache.judge(LinearWorkload(packed, 4)) == VERDICT
    )
    assert VerdictCache().judge(LinearWorkload(packed, 4)) == VERDICT
    assert counted == [4]


def test_without_xdg_the_home_folder_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert VerdictCache().path == tmp_path / ".cache" / "sparsekit" / "verdicts.json"


def test_every_property_of_a_problem_counts(
    packed: sk.PackedWeight, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    cache = VerdictCache()
    cache.judge(LinearWorkload(packed, 4))
    cache.judge(LinearWorkload(packed, 5))
    cache.judge(LinearWorkload(packed, 4, torch.zeros(33)))
    cache.judge(LinearWorkload(packed, 4, None, "relu"))
    cache.judge(LinearWorkload(packed.to(torch.bfloat16), 4))
    cache.judge(LinearWorkload(sk.pack(torch.zeros(33, 70), "1:4"), 4))
    cache.judge(LinearWorkload(sk.pack(torch.zeros(34, 70), "2:4"), 4))
    cache.judge(LinearWorkload(sk.pack(torch.zeros(33, 70), "2:4", target="reference"), 4))
    try:
        torch.set_num_threads(threads + 1)
        cache.judge(LinearWorkload(packed, 4))
    finally:
        torch.set_num_threads(threads)
    expected = 9 if packed.format != "nm" else 8
    assert len(counted) == expected
    for change in (
        ("machine_fingerprint", lambda device: "another machine"),
        ("machine_fingerprint", lambda device: "a third machine"),
    ):
        monkeypatch.setattr(gate, *change)
        VerdictCache().judge(LinearWorkload(packed, 4))
    assert len(counted) == expected + 2


def test_the_fingerprint_names_cpu_torch_version_and_forced_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = gate.machine_fingerprint()
    assert f"torch {torch.__version__}" in text
    assert "sparsekit " in text
    monkeypatch.setenv("SPARSEKIT_KERNEL", "matmul_nm_f32_scalar")
    assert gate.machine_fingerprint() == f"{text}, kernel matmul_nm_f32_scalar"


def test_two_processes_add_to_the_same_file(packed: sk.PackedWeight, counted: list[int]) -> None:
    one, two = VerdictCache(), VerdictCache()
    one.judge(LinearWorkload(packed, 1))
    two.judge(LinearWorkload(packed, 2))
    both = VerdictCache()
    both.judge(LinearWorkload(packed, 1))
    both.judge(LinearWorkload(packed, 2))
    assert counted == [1, 2]


def valid_content(packed: sk.PackedWeight) -> str:
    cache = VerdictCache()
    cache.judge(LinearWorkload(packed, 4))
    return cache.path.read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace("2.0", '"fast"'),
        lambda text: text.replace("speedup", "speed"),
        lambda text: json.dumps({"version": 1, "machines": [1]}),
        lambda text: json.dumps({"version": 1, "machines": {"m": {"p": 3}}}),
        lambda text: "\udcff\x00",
    ],
)
def test_a_damaged_file_is_replaced_with_one_warning(
    damage: Any, packed: sk.PackedWeight, counted: list[int]
) -> None:
    text = valid_content(packed)
    path = VerdictCache().path
    path.write_bytes(damage(text).encode(errors="surrogateescape"))
    with pytest.warns(RuntimeWarning, match="is damaged and will be written anew"):
        cache = VerdictCache()
    cache.judge(LinearWorkload(packed, 4))  # a second warning would be an error
    assert counted == [4, 4]
    assert path.read_text() == text


def test_another_version_is_ignored_quietly(packed: sk.PackedWeight, counted: list[int]) -> None:
    text = valid_content(packed)
    path = VerdictCache().path
    path.write_text(text.replace('"version": 1', '"version": 2'))
    VerdictCache().judge(LinearWorkload(packed, 4))
    assert counted == [4, 4]


def test_an_unwritable_folder_costs_one_warning(
    packed: sk.PackedWeight, counted: list[int], tmp_path: Path
) -> None:
    # A file stands where the folder should be: not even root can write below it.
    (tmp_path / "file").write_text("")
    cache = VerdictCache(tmp_path / "file" / "verdicts.json")
    says = r"verdicts\.json cannot be used \(.*\); layers are measured again .* XDG_CACHE_HOME"
    with pytest.warns(RuntimeWarning, match=says):
        assert cache.judge(LinearWorkload(packed, 1)) == VERDICT
    # A second warning would be an error.
    assert (
        cache.judge(LinearWorkload(packed, 1)) == cache.judge(LinearWorkload(packed, 2)) == VERDICT
    )
    assert VerdictCache(cache.path).judge(LinearWorkload(packed, 3)) == VERDICT
    assert counted == [1, 2, 3]


def test_an_unreadable_file_costs_one_warning(
    packed: sk.PackedWeight, counted: list[int], tmp_path: Path
) -> None:
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        cache = VerdictCache(tmp_path)  # a folder where the file should be
    assert (
        cache.judge(LinearWorkload(packed, 1)) == cache.judge(LinearWorkload(packed, 1)) == VERDICT
    )
    assert counted == [1]


def test_a_failed_write_leaves_the_old_file(
    packed: sk.PackedWeight, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = valid_content(packed)
    cache = VerdictCache()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        cache.judge(LinearWorkload(packed, 5))
    assert cache.path.read_text() == text
    assert [file.name for file in cache.path.parent.iterdir()] == ["verdicts.json"]


def test_compare_is_a_table(counted: list[int]) -> None:
    text = gate.compare("2:4v4", 64, 128, [1, 32], torch.bfloat16)
    assert counted == [1, 32]
    head, *lines = text.splitlines()
    assert head.startswith("2:4v4 bfloat16, n=64, k=128, ")
    assert [line.split()[0] for line in lines[2:]] == ["1", "32"]
    assert all("2.00x" in line and "sparse wins" in line for line in lines[2:])
