"""What a layer's weight is multiplied with: tokens, or the patches of images under the filters."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.prune.layers import Prunable

PIXELS = 1 << 16

# Patches are made in blocks of about this many elements, so that memory does not grow with the
# images: a 3x3 filter reads each pixel nine times.
_BLOCK = 1 << 24


def geometry(module: Prunable) -> Hashable:
    """Equal for layers that make the same rows of one input."""
    if isinstance(module, nn.Linear):
        return ()
    return (
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.padding_mode,
    )


def patches(module: nn.Conv1d | nn.Conv2d, x: Tensor, pixels: int = PIXELS) -> Iterator[Tensor]:
    """The patches of the input that each output pixel of a convolution is computed from.

    Args:
        module: its kernel size, stride, padding, padding mode, dilation and groups count.
        x: `[N, C, *size]` or `[C, *size]`.
        pixels: when there are more output pixels, this many are drawn from them evenly, always
            the same ones.

    Yields:
        `[groups, rows, taps · C / groups]`, a block of pixels at a time, the channels of a tap
        side by side as in `Layer.matrices`.
    """
    dims = len(module.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The kernels of a Conv1d are one pixel high, and so are its images.
    kernel, stride, dilation = (
        _pair(sizes) for sizes in (module.kernel_size, module.stride, module.dilation)
    )
    channels, taps = x.shape[1], kernel[0] * kernel[1]
    split = (module.groups, channels // module.groups)
    borders = _borders(module)
    size = [full + sum(border) for full, border in zip(x.shape[2:], borders, strict=True)]
    height, width = size if dims == 2 else (1, *size)
    down = (height - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    across = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    if min(len(x), down, across) < 1:
        return  # torch says what is wrong with it
    chosen = _spread(len(x) * down * across, pixels).to(x.device)
    tap = torch.arange(taps, device=x.device)
    offset = tap // kernel[1] * dilation[0] * width + tap % kernel[1] * dilation[1]

    images = max(1, _BLOCK // (channels * height * width))
    for first in range(0, len(x), images):
        part = F.pad(x[first : first + images], [s for b in borders[::-1] for s in b], mode)
        flat = part.movedim(1, -1).reshape(-1, channels)
        start, stop = (image * down * across for image in (first, first + len(part)))
        mine = chosen[(chosen >= start) & (chosen < stop)] - start
        image, pixel = mine // (down * across), mine % (down * across)
        row, column = pixel // across * stride[0], pixel % across * stride[1]
        corner = (image * height + row) * width + column
        for block in corner.split(max(1, _BLOCK // (taps * channels))):
            index = (block[:, None] + offset).flatten()
            seen = flat.index_select(0, index).view(len(block), taps, *split)
            yield seen.permute(2, 0, 1, 3).flatten(2)


def _borders(module: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """Pixels added before and after each dimension."""
    if module.padding == "valid":
        return [(0, 0) for _ in module.kernel_size]
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(whole // 2, whole - whole // 2) for whole in total]
    return [(int(side), int(side)) for side in module.padding]


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (1, sizes[0])


def _spread(total: int, most: int) -> Tensor:
    """At most `most` of the numbers below `total`, ascending: one from each of equal parts.

    Drawn at random within its part, because a fixed step would meet the width of the images and
    see a few of their columns alone.
    """
    if total <= most:
        return torch.arange(total)
    edges = torch.arange(most + 1) * total // most
    draw = torch.randint(1 << 62, (most,), generator=torch.Generator().manual_seed(0))
    return edges[:-1] + draw % edges.diff()
