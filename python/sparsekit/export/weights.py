"""The weight of a node: all constants of a layer as int32 numbers, docs/onnx.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit import _native
from sparsekit.export.nodes import (
    CANONICAL,
    GROUP_ALIGNMENT,
    SECTION_ALIGNMENT,
    SparseNode,
    Window,
    round_up,
)
from sparsekit.pack import PackedWeight, unpacked


def encode(
    canonical: _native.Canonical,
    bias: Tensor | None,
    activation: str | None,
    residual_first: bool,
    window: Window | None,
    weights: str = CANONICAL,
) -> tuple[SparseNode, Tensor]:
    """A node, and its weight as int32 `[words]`.

    Args:
        canonical: the weight, of the whole matrix.
        bias: one number for each row, of the weight's dtype, or None.
        activation: as in `sparsekit.linear`.
        residual_first: whether the residual is added before the activation.
        window: of a convolution, whose matrix the weight is.
        weights: "canonical", or "cuda" for the format of GPUs.

    Raises:
        NotImplementedError: no kernel on a GPU takes the weight.
        ValueError: a size that a node cannot say.
    """
    nnzb = 0 if canonical.crow_indices is None else len(canonical.indices)
    code = _native.encode_pattern(canonical.pattern)
    # Of blocks with the sparsity that is there, which may be another than was asked for.
    pattern = _native.decode_pattern(code, canonical.shape, nnzb)

    def node(format: str) -> SparseNode:
        return SparseNode(
            canonical.shape,
            pattern,
            nnzb,
            canonical.dtype,
            format,
            bias is not None,
            activation,
            residual_first,
            window,
        )

    described = node(CANONICAL)
    sections = [canonical.values, canonical.indices]
    if canonical.crow_indices is not None:
        sections.append(canonical.crow_indices)
    if weights != CANONICAL:
        packed = PackedWeight.from_canonical(canonical, weights, filters=described.filters)
        described, sections = node(packed.format), [packed.data]
    if bias is not None:
        sections.append(bias.detach().cpu())
    return described, _joined(sections)


def _joined(sections: Sequence[Tensor]) -> Tensor:
    starts, end = [], 0
    for section in sections:
        starts.append(round_up(end, SECTION_ALIGNMENT))
        end = starts[-1] + section.numel() * section.element_size()
    weight = torch.zeros(round_up(end, 4) // 4, dtype=torch.int32)
    for start, section in zip(starts, sections, strict=True):
        flat = section.contiguous().view(-1).view(torch.uint8)
        weight.view(torch.uint8)[start : start + flat.numel()] = flat
    return weight


def decode(node: SparseNode, weight: Tensor) -> tuple[_native.Canonical, Tensor | None]:
    """The canonical form and the bias that a weight holds.

    Raises:
        ValueError: it is no weight of this node; sizes, indices and packed bytes are checked.
    """
    if weight.dtype != torch.int32 or weight.dim() != 1:
        raise ValueError(
            f"{node.op_type}: expected weight as int32 [words], got "
            f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        )
    size = node.weight_size()
    if size is not None and weight.numel() != size:
        raise ValueError(
            f"{node.op_type}: a weight of n={node.shape[0]}, k={node.shape[1]}, {node.pattern} as "
            f"{node.format!r} takes {size} int32 numbers, got {weight.numel()}"
        )
    data = weight.contiguous().view(torch.uint8)
    try:
        if node.format == CANONICAL:
            canonical, end = _sections(node, data)
        else:
            canonical, end = _parts(node, data)
        _native.validate(canonical)
        if not bool(canonical.values.isfinite().all()):
            raise ValueError("a value is not finite")
        if node.format != CANONICAL:
            _check_packed(node, canonical, data[:end])
    except ValueError as error:
        raise ValueError(f"{node.op_type}: the weight is damaged: {error}") from None
    if not node.has_bias:
        return canonical, None
    start = round_up(end, SECTION_ALIGNMENT)
    bias = torch.empty(node.shape[0], dtype=node.dtype)
    bias.view(torch.uint8)[:] = data[start : start + node.bias_bytes()]
    return canonical, bias


def _sections(node: SparseNode, data: Tensor) -> tuple[_native.Canonical, int]:
    """The canonical arrays, and where they end."""
    canonical = _native.empty_canonical(node.pattern, node.dtype, node.shape, node.nnzb)
    end = 0
    for array in (canonical.values, canonical.indices, canonical.crow_indices):
        if array is not None:
            start = round_up(end, SECTION_ALIGNMENT)
            flat = array.view(-1).view(torch.uint8)
            end = start + flat.numel()
            flat[:] = data[start:end]
    return canonical, end


def _parts(node: SparseNode, data: Tensor) -> tuple[_native.Canonical, int]:
    """The canonical form of packed groups, not validated yet, and where they end."""
    groups, (n, k) = node.groups, node.shape
    step, rest = divmod(data.numel() - round_up(node.bias_bytes(), 4), groups)
    if groups == 1:  # between the weight and its bias there may be padding
        step = _native.format_bytes(node.format, node.pattern, node.dtype, (n, k), node.nnzb)
    elif rest or step % GROUP_ALIGNMENT or step <= 0:
        raise ValueError(f"{data.numel()} bytes are no {groups} groups of equal length")
    # Packed bytes are read from a cache line on.
    packed = data[: groups * step].clone()
    expected = (node.format, _native.encode_pattern(node.pattern), node.dtype, (n // groups, k))
    for part in packed.view(groups, step):
        info = _native.packed_info(part)
        found = (info.format, _native.encode_pattern(info.pattern), info.dtype, info.shape)
        if found != expected:
            raise ValueError(f"it holds {found}, the node says {expected}")
    canonical = unpacked(packed, groups)
    if canonical.crow_indices is not None and len(canonical.indices) != node.nnzb:
        raise ValueError(f"it holds {len(canonical.indices)} blocks, the node says {node.nnzb}")
    return canonical, groups * step


def _check_packed(node: SparseNode, canonical: _native.Canonical, data: Tensor) -> None:
    """Refuse packed bytes that are another weight for a GPU than for who unpacks them."""
    again = PackedWeight.from_canonical(canonical, "cuda", filters=node.filters)
    if again.format != node.format or not torch.equal(again.data, data):
        raise ValueError("its bytes are not those that packing makes")
