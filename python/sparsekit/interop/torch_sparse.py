"""torch's sparse tensors: semi-structured (2:4 on GPUs), BSR, CSR and COO."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from sparsekit import _native
from sparsekit.pack import PackedWeight, pack
from sparsekit.patterns import NM, BlockSparse

_LAYOUTS = (torch.sparse_bsr, torch.sparse_csr, torch.sparse_coo)
# 4-bit codes: two ascending positions in a group of four, the lower one in the lower two bits.
_PAIRS = {first | second << 2: (first, second) for second in range(4) for first in range(second)}


def from_torch_sparse(tensor: Tensor, target: str = "auto") -> PackedWeight:
    """Pack a sparse tensor of torch: what is stored there is stored here, zeros included.

    Args:
        tensor: of `torch.sparse.to_sparse_semi_structured` (the CUTLASS form on any device; the
            cuSPARSELt form, whose layout is not documented, on a GPU where torch can multiply by
            it), or of layout BSR, CSR or COO; `[n, k]`, float32, bfloat16 or float16.
        target: see `sparsekit.pack`.

    Returns:
        2:4 (of float32 1:2) or blocks of the tensor's size, 1x1 for CSR and COO, on its device.

    Raises:
        ValueError: another tensor, or contents that do not fit together.
        NotImplementedError: a cuSPARSELt tensor on a CPU; no kernel on a GPU takes the pattern.
    """
    if isinstance(tensor, SparseSemiStructuredTensor):
        dense, mask = semi_structured_to_dense(tensor)
        pattern = NM(1, 2) if dense.dtype == torch.float32 else NM(2, 4)
        return pack(dense, pattern, mask=mask, target=target)
    if tensor.layout not in _LAYOUTS:
        raise ValueError(
            f"from_torch_sparse: expected a semi-structured, BSR, CSR or COO tensor, got "
            f"{tensor.layout}; sparsekit.pack takes dense weights"
        )
    return PackedWeight.from_canonical(_blocks(tensor), target, tensor.device)


def is_sparse(value: object) -> bool:
    """Whether it is a tensor that `from_torch_sparse` may take."""
    if not isinstance(value, Tensor):
        return False
    return isinstance(value, SparseSemiStructuredTensor) or value.layout in _LAYOUTS


def to_dense(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A sparse tensor as a dense one, and the mask of what it stores."""
    if isinstance(tensor, SparseSemiStructuredTensor):
        return semi_structured_to_dense(tensor)
    canonical = _blocks(tensor)
    ones = _native.Canonical(
        canonical.pattern,
        canonical.shape,
        canonical.dtype,
        torch.ones_like(canonical.values),
        canonical.indices,
        canonical.crow_indices,
    )
    dense, mask = _native.decompress(canonical), _native.decompress(ones) != 0
    return dense.to(tensor.device), mask.to(tensor.device)


# --- blocks -----------------------------------------------------------------------------------


def _blocks(tensor: Tensor) -> _native.Canonical:
    if tensor.dim() != 2:
        raise ValueError(f"from_torch_sparse: expected [n, k], got {list(tensor.shape)}")
    if tensor.dtype not in _native.DTYPES:
        raise ValueError(
            f"from_torch_sparse: values can be float32, bfloat16 or float16, got {tensor.dtype}; "
            "convert the tensor"
        )
    tensor = tensor.detach().cpu()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().to_sparse_csr()
    values = tensor.values()
    if tensor.layout == torch.sparse_csr:
        values = values[:, None, None]
    block = (values.shape[1], values.shape[2])
    shape = (tensor.shape[0], tensor.shape[1])
    code = _native.encode_pattern(BlockSparse(block))
    canonical = _native.Canonical(
        _native.decode_pattern(code, shape, len(values)),
        shape,
        tensor.dtype,
        values.contiguous(),
        _int32("col_indices", tensor.col_indices()),
        _int32("crow_indices", tensor.crow_indices()),
    )
    try:
        _native.validate(canonical)
    except ValueError as error:
        raise ValueError(f"from_torch_sparse: {error}") from None
    if not bool(canonical.values.isfinite().all()):
        raise ValueError("from_torch_sparse: a value is not finite")
    return canonical


def _int32(what: str, indices: Tensor) -> Tensor:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < 1 << 31:
        raise ValueError(f"from_torch_sparse: {what} are out of range")
    return indices.to(torch.int32).contiguous()


def to_torch_bsr(packed: PackedWeight) -> Tensor:
    """A block-sparse weight as a BSR tensor of torch, on its device.

    Raises:
        ValueError: it is no matrix of blocks, or blocks do not divide its sides, which torch wants.
    """
    pattern, shape = packed.pattern, packed.shape
    if not isinstance(pattern, BlockSparse) or len(shape) != 2:
        raise ValueError(
            f"to_torch_bsr: expected a matrix of blocks, got {pattern} of shape {list(shape)}"
        )
    if any(side % step for side, step in zip(shape, pattern.block_shape, strict=True)):
        raise ValueError(
            f"to_torch_bsr: torch wants whole blocks, {list(shape)} is no multiple of {pattern}"
        )
    canonical = packed.canonical()
    assert canonical.crow_indices is not None
    return torch.sparse_bsr_tensor(
        canonical.crow_indices, canonical.indices, canonical.values, shape, check_invariants=True
    ).to(packed.device)


# --- semi-structured --------------------------------------------------------------------------


def semi_structured_to_dense(tensor: SparseSemiStructuredTensor) -> tuple[Tensor, Tensor]:
    """The dense weight, and the mask of the positions that it stores.

    Raises:
        ValueError: contents that do not fit together.
        NotImplementedError: a cuSPARSELt tensor on a CPU.
    """
    if tensor.packed is None:
        raise ValueError(
            "from_torch_sparse: the semi-structured tensor is a transposed one; pass it before .t()"
        )
    meta = tensor.meta
    if not isinstance(tensor, SparseSemiStructuredTensorCUTLASS) or meta is None or meta.dim() != 2:
        if not tensor.is_cuda:
            raise NotImplementedError(
                "from_torch_sparse: cuSPARSELt does not document where its tensors keep their "
                "metadata; call .to_dense() on the GPU and pass that to sparsekit.pack"
            )
        dense = tensor.to_dense().detach()
        return dense, dense != 0
    return decode_cutlass(tensor.packed, meta, (tensor.shape[0], tensor.shape[1]))


def decode_cutlass(packed: Tensor, meta: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values and metadata in the layout of CUTLASS's sparse GEMM on sm80 to dense.

    A 4-bit code says which two of four 16-bit numbers are stored; of float32, which is two of
    them, it says which of two. A metadata word has the codes of four groups. Words are stored for
    pairs of columns, within one by rows; of 32 rows, row `8 i + j` comes at `4 j + i`; then each
    2x2 of words is transposed.

    Args:
        packed: `[n, k / 2]`, float32, bfloat16 or float16.
        meta: int16 `[n, k / 16]`, of float32 `[n, k / 8]`.
        shape: (n, k).

    Returns:
        The dense weight and the mask of the positions stored.

    Raises:
        ValueError: sizes, dtypes or codes that no such weight has.
    """
    n, k = shape
    single = packed.dtype == torch.float32
    words = k // (8 if single else 16)
    if packed.dtype not in _native.DTYPES or meta.dtype != torch.int16:
        raise ValueError(
            "from_torch_sparse: expected float32, bfloat16 or float16 values with int16 metadata, "
            f"got {packed.dtype} and {meta.dtype}"
        )
    if (
        min(n, k) < 1
        or n % 32
        or k % (16 if single else 32)
        or packed.shape != (n, k // 2)
        or meta.shape != (n, words)
    ):
        raise ValueError(
            f"from_torch_sparse: a semi-structured tensor {[n, k]} has values {[n, k // 2]} and "
            f"metadata {[n, words]} with n a multiple of 32, got {list(packed.shape)} and "
            f"{list(meta.shape)}"
        )
    # [column pair, 32 rows, j, i / 2, column, i % 2]; the last two changed places within a 2x2.
    tiles = meta.contiguous().view(words // 2, n // 32, 8, 2, 2, 2)
    in_order = tiles.permute(1, 3, 5, 2, 0, 4).reshape(n, words)
    shifts = torch.arange(0, 16, 4, device=meta.device)
    codes = ((in_order.int()[..., None] >> shifts) & 15).flatten(1)
    return _placed(packed, codes, single)


def _placed(packed: Tensor, codes: Tensor, single: bool) -> tuple[Tensor, Tensor]:
    n = len(packed)
    allowed = {4: 0, 14: 1} if single else _PAIRS
    known = torch.zeros(16, dtype=torch.bool, device=codes.device)
    known[list(allowed)] = True
    bad = ~known[codes]
    if bool(bad.any()):
        row, group = divmod(int(bad.flatten().to(torch.uint8).argmax()), codes.shape[1])
        raise ValueError(
            f"from_torch_sparse: the metadata of row {row}, group {group} is "
            f"{int(codes[row, group]):04b}, which is no choice of "
            f"{'1 of 2' if single else '2 of 4'}"
        )
    size = 2 if single else 4
    places = torch.zeros(16, size // 2, dtype=torch.long, device=codes.device)
    for code, place in allowed.items():
        places[code] = torch.tensor(place, device=codes.device)
    where = places[codes]  # [n, groups, values of a group]
    dense = packed.new_zeros(n, codes.shape[1], size)
    dense.scatter_(2, where, packed.detach().reshape(where.shape))
    mask = torch.zeros_like(dense, dtype=torch.bool).scatter_(2, where, True)
    return dense.flatten(1), mask.flatten(1)


def to_torch_semi_structured(packed: PackedWeight, device: torch.device | str = "cuda") -> Tensor:
    """A 2:4 weight as torch's semi-structured tensor, for its own kernels on a GPU.

    Args:
        packed: 2:4 in float16 or bfloat16 (sides as `torch.sparse.to_sparse_semi_structured` wants
            them), or 1:2 in float32 for its CUTLASS form.
        device: a GPU.

    Raises:
        ValueError: another pattern, a convolution, or no GPU.
        RuntimeError: torch refuses the sides or the dtype.
    """
    pattern, wanted = packed.pattern, NM(1, 2) if packed.dtype == torch.float32 else NM(2, 4)
    if (
        not isinstance(pattern, NM)
        or len(packed.shape) != 2
        or (pattern.n, pattern.m)
        != (
            wanted.n,
            wanted.m,
        )
    ):
        raise ValueError(
            f"to_torch_semi_structured: expected a {wanted} matrix in {packed.dtype}, got "
            f"{pattern} of shape {list(packed.shape)}"
        )
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"to_torch_semi_structured: torch makes these tensors on a GPU only, not on {device}"
        )
    return torch.sparse.to_sparse_semi_structured(packed.to_dense().to(device))
