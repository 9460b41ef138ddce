"""What is measured of a convolution: every dense way computes it, each from x as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import sparsekit as sk
from sparsekit import _native, workload
from sparsekit.gate import VerdictCache, measure
from sparsekit.workload import ConvWorkload, LinearWorkload, activate

LAYERS: dict[str, dict[str, Any]] = {
    "3x3": {"padding": 1},
    "stride": {"stride": 2, "padding": (1, 0)},
    "uneven": {"weight": (32, 16, 2, 4), "padding": "same"},
    "1x1": {"weight": (32, 16, 1, 1)},
    "1x1 stride": {"weight": (32, 16, 1, 1), "stride": (1, 2)},
    "groups": {"weight": (32, 8, 3, 3), "groups": 2},
    "1d": {"weight": (32, 16, 5), "size": (2, 16, 19), "padding": 2},
    "1d uneven": {"weight": (32, 16, 4), "size": (2, 16, 19), "padding": "same", "dilation": 3},
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def layer(name: str = "3x3", dtype: torch.dtype = torch.float32, **options: Any) -> ConvWorkload:
    arguments = {**LAYERS[name], **options}
    shape, groups = arguments.pop("weight", (32, 16, 3, 3)), arguments.pop("groups", 1)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = sk.pack(weight, "2:4", groups=groups)
    return ConvWorkload(packed, arguments.pop("size", (2, 16, 7, 6)), **arguments)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("channels_last", [True, False])
@each_layer
def test_all_paths_compute_the_layer(name: str, channels_last: bool) -> None:
    bias = torch.randn(32, generator=torch.Generator().manual_seed(1))
    for activation in _native.ACTIVATIONS:
        work = layer(name, bias=bias, activation=activation, channels_last=channels_last)
        x = work.input()
        assert x.shape == work.size
        assert (x.stride(1) == 1) == channels_last
        groups = LAYERS[name].get("groups", 1)
        convolve = functional.conv1d if name.startswith("1d") else functional.conv2d
        right = activate(
            convolve(
                x.double(),
                work.packed.to_dense().double(),
                bias.double(),
                work.stride,  # type: ignore[arg-type]
                work.padding,  # type: ignore[arg-type]
                work.dilation,  # type: ignore[arg-type]
                groups,
            ),
            activation,
        )
        with torch.no_grad():
            calls = {**work.dense_paths(x), "ours": work.sparse(x)}
            assert {"torch", "torch channels_last"} <= calls.keys()
            assert ("oneDNN" in calls) == torch.backends.mkldnn.is_available()
            for call in calls.values():
                torch.testing.assert_close(call().double(), right, rtol=1e-4, atol=1e-4)
        assert work.rows == right.numel() // 32


def test_each_path_starts_from_x_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the dense model in NCHW gets x in NCHW for nothing."""
    seen: list[bool] = []
    right = functional.conv2d

    def spy(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.is_contiguous())
        return right(x, *rest)

    monkeypatch.setattr(functional, "conv2d", spy)
    for channels_last, expected in ((True, [True, False]), (False, [True, True])):
        work = layer(channels_last=channels_last)
        paths = work.dense_paths(work.input())
        seen.clear()
        paths["torch"]()
        paths["torch channels_last"]()
        assert seen == expected


@each_layer
def test_measure_gives_positive_times_and_names(name: str) -> None:
    work = layer(name, bias=torch.zeros(32), activation="relu")
    verdict = measure(work)
    assert min(verdict.dense_ms, verdict.sparse_ms, verdict.speedup) > 0
    assert verdict.dense_path in ("torch", "torch channels_last", "oneDNN")
    assert verdict.fault == ""
    op = {info.name: info.op for info in sk.kernels()}[verdict.kernel]
    assert op == work.op == ("matmul" if name == "1x1" else "conv2d")


def test_a_wrong_kernel_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    right = workload.conv2d
    monkeypatch.setattr(workload, "conv2d", lambda *arguments: right(*arguments) * 1.5)
    verdict = measure(layer())
    assert "the sparse result differs from dense by" in verdict.fault
    assert not verdict.wins


def test_every_difference_is_another_verdict() -> None:
    bias = torch.zeros(32)
    packed = sk.pack(torch.ones(32, 16, 6), "2:4")
    works = [
        layer(),
        layer(size=(1, 16, 7, 6)),
        layer(size=(2, 16, 6, 7)),
        layer(padding=0),
        layer(padding=(1, 0)),
        layer(padding="same", weight=(32, 16, 2, 2)),
        layer(padding=1, weight=(32, 16, 2, 2)),
        layer(stride=2),
        layer(dilation=(1, 2)),
        layer(weight=(32, 8, 3, 3), groups=2),
        layer(bias=bias),
        layer(activation="relu"),
        layer(channels_last=False),
        layer(dtype=torch.bfloat16),
        layer("1d"),
        LinearWorkload(sk.pack(torch.ones(32, 16), "2:4"), 84),
        ConvWorkload(packed, (2, 16, 9)),
        ConvWorkload(packed, (2, 16, 9), activation="silu"),
    ]
    keys = [work.key for work in works]
    assert len(set(keys)) == len(keys)
    assert layer(padding=1).key == layer(padding=(1, 1)).key == layer(padding="same").key


def test_a_verdict_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = VerdictCache(tmp_path / "verdicts.json")
    verdict = cache.judge(layer())
    monkeypatch.setattr(workload, "conv2d", None)  # nothing is measured any more
    assert cache.judge(layer()) == verdict
    assert VerdictCache(tmp_path / "verdicts.json").judge(layer()) == verdict
