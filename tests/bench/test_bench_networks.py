"""Networks of convolutions, how they are made ready, and what memory they take."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekit as sk
from bench import memory, networks, vision
from bench.baselines import Unavailable
from bench.detector import CLASSES, Detector
from sparsekit.demo import latency


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    torch.manual_seed(0)
    return networks.settled(Detector(), 64)


def test_the_detector_scores_every_pixel_of_three_scales(detector: nn.Module) -> None:
    with torch.no_grad():
        scores = detector(torch.randn(1, 3, 64, 96))
    assert scores.shape == (1, 4 + CLASSES, 8 * 12 + 4 * 6 + 2 * 3)
    assert 2.5e6 < sum(p.numel() for p in detector.parameters()) < 3.5e6


def test_settled_statistics_are_those_of_the_images(detector: nn.Module) -> None:
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 51
    assert all(float((norm.running_var - 1).abs().max()) > 0.1 for norm in norms)
    assert not detector.training


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "detector"])
def test_folding_leaves_no_normalisation_and_the_same_result(name: str) -> None:
    (model,) = (each for each in networks.MODELS if each.name == name)
    network, inputs = model.build(), networks.images(64, 1)
    copy = networks.folded(network, inputs)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    assert not any(isinstance(module, sk.nn.SparseConv2d) for module in copy.modules())
    with torch.no_grad():
        torch.testing.assert_close(copy(*inputs), network(*inputs), rtol=1e-3, atol=1e-3)
        # The statistics matter: as timm makes them, a whole block may put out zeros.
        assert float(network(*inputs).std()) > 0.01


def test_a_normalisation_that_stays_is_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)).eval()
    with pytest.raises(ValueError, match=r"every batch normalisation to fold.*\['0'\]"):
        networks.folded(model, networks.images(8, 1))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=(1, 2), dilation=2, groups=8, bias=False),
    ],
)
@torch.no_grad()
def test_prepacked_filters_compute_the_same(conv: nn.Conv2d) -> None:
    packed = vision.PrepackedConv2d(conv, torch.float32)
    for side in (9, 9, 12):
        x = torch.randn(2, 8, side, side).contiguous(memory_format=torch.channels_last)
        y = packed(x)
        torch.testing.assert_close(y, conv(x))
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding_mode": "reflect"}])
def test_paddings_that_onednn_does_not_know_leave_it_out(options: dict[str, str]) -> None:
    with pytest.raises(latency.Unavailable, match="given numbers of zeros alone"):
        vision.PrepackedConv2d(nn.Conv2d(8, 8, 3, **options), torch.float32)  # type: ignore[arg-type]


def test_engines_in_channels_last_get_such_images(tmp_path: Path) -> None:
    seen = []

    def build(inputs: latency.Inputs, folder: Path) -> latency.Run:
        seen.extend(inputs)
        return lambda: inputs[0]

    engine = vision.in_channels_last(latency.Engine("torch", False, build))
    engine.build(networks.images(8, 2), tmp_path)
    assert engine.name == "torch, channels_last"
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is told by /proc")


@linux
def test_the_peak_is_that_of_the_model_alone(tmp_path: Path) -> None:
    held = torch.ones(1 << 27)  # half a GiB of this process, which the other must not inherit
    idle = memory.peak_mib(nn.Identity(), (torch.ones(1),), 1, tmp_path)
    assert 50 < idle < 512
    enlarged = nn.Upsample(scale_factor=8)  # of 4 MiB, 256
    peak = memory.peak_mib(enlarged, (torch.ones(1, 1, 1024, 1024),), 1, tmp_path)
    assert 256 <= peak - idle < 300
    del held


@linux
def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"measures memory failed: .*mat1 and mat2"):
        memory.peak_mib(nn.Linear(3, 2), (torch.ones(1, 4),), 1, tmp_path)
