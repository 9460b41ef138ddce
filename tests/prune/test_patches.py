"""The input patches of convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekit.prune import patches as module
from sparsekit.prune.calibration import Calibration, read_batches
from sparsekit.prune.layers import Layer
from sparsekit.prune.patches import _spread, patches

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(3, 2)),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 6, 5, padding=2, padding_mode="circular"),
    nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)),
    nn.Conv2d(4, 6, (4, 2), padding="same", padding_mode="replicate"),
    nn.Conv2d(4, 6, 3, padding="valid"),
    nn.Conv2d(4, 6, 1, stride=2),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv1d(4, 6, 3, padding=2, dilation=2),
    nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"),
    nn.Conv1d(4, 6, 4, stride=3, groups=2),
]


def images(conv, count=3, size=(9, 11)):
    make = torch.Generator().manual_seed(0)
    size = size[: len(conv.kernel_size)]
    return torch.randn(count, conv.in_channels, *size, generator=make)


def rows_of(conv, x, **options):
    return torch.cat(list(patches(conv, x, **options)), 1)


def outputs_of(conv, rows):
    """The convolution of patches, `[pixels, channels]`."""
    weight = conv.weight.flatten(2).transpose(1, 2).flatten(1)
    return (rows @ weight.unflatten(0, (conv.groups, -1)).mT).permute(1, 0, 2).flatten(1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_patches_times_filters_are_the_convolution(conv):
    conv, x = conv.double(), images(conv).double()
    expected = (conv(x) - conv.bias.view(-1, *[1] * len(conv.kernel_size))).movedim(1, -1)
    flat = expected.reshape(-1, 6)
    torch.testing.assert_close(outputs_of(conv, rows_of(conv, x)), flat)
    torch.testing.assert_close(outputs_of(conv, rows_of(conv, x[0])), flat[: len(flat) // 3])
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert torch.equal(rows_of(conv, last), rows_of(conv, x))
    conv.float()


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_small_blocks_give_the_same_rows(conv, monkeypatch):
    x = images(conv)
    for pixels in (1, 50, 1 << 16):
        whole = rows_of(conv, x, pixels=pixels)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_BLOCK", 100)
            blocks = list(patches(conv, x, pixels))
        assert len(blocks) > 1  # one image at a time, of which some have no pixel
        assert all(block.numel() <= 100 for block in blocks)
        assert torch.equal(torch.cat(blocks, 1), whole)


def test_pixels_are_drawn_evenly_and_always_the_same():
    drawn = _spread(1000, 64)
    assert torch.equal(drawn, _spread(1000, 64))
    # One in each of 64 equal parts.
    assert torch.equal(((drawn + 1) * 64 - 1) // 1000, torch.arange(64))
    assert len(((drawn.diff() - 1000 / 64).abs() > 1).nonzero()) > 10  # no fixed step
    assert _spread(10, 10).tolist() == _spread(10, 64).tolist() == list(range(10))


def test_drawn_rows_are_those_of_their_pixels():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), images(CONVOLUTIONS[0])
    rows = rows_of(conv, x, pixels=64)
    assert rows.shape[1] == 64
    assert torch.equal(rows, rows_of(conv, x)[:, _spread(3 * 9 * 11, 64)])


def test_drawn_pixels_have_nearly_the_moments_of_all():
    make = torch.Generator().manual_seed(1)
    x = F.avg_pool2d(torch.randn(4, 4, 64, 64, generator=make), 3, 1)  # neighbours are alike
    conv = nn.Conv2d(4, 6, 3)
    found = []
    for pixels in (1 << 16, 3000):
        with Calibration(conv, read_batches([x]), [Layer("", [conv])], pixels=pixels) as run:
            found.append(run.moments(run.groups[0])[0])
    assert (found[0] - found[1]).norm() < 0.1 * found[0].norm()
    assert not torch.equal(*found)


def test_no_rows_of_images_smaller_than_the_filters():
    assert list(patches(nn.Conv2d(4, 6, 3), torch.zeros(1, 4, 2, 9))) == []
    assert list(patches(nn.Conv2d(4, 6, 3), torch.zeros(0, 4, 9, 9))) == []
