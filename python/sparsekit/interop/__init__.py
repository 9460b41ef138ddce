"""Weights that other packages pruned or packed, and back.

`read` takes a model, a state dict or safetensors files and gives plain weights and masks, whatever
wrote them; the functions below do one of them each. What comes out is what `sparsekit.convert`,
`sparsekit.pack` and `sparsekit.prune.hold_masks` take.

- ASP (NVIDIA apex): `from_asp`.
- `torch.nn.utils.prune`: `from_torch_prune`, `to_torch_prune`.
- torch's semi-structured, BSR, CSR and COO tensors: `from_torch_sparse`, `to_torch_bsr`,
  `to_torch_semi_structured`.
- Checkpoints of compressed-tensors with bitmasks: `from_compressed_tensors`,
  `to_compressed_tensors`.
"""

from sparsekit.interop.bitmask import from_compressed_tensors, to_compressed_tensors
from sparsekit.interop.imported import Imported
from sparsekit.interop.masked import from_asp, from_torch_prune, to_torch_prune
from sparsekit.interop.read import read
from sparsekit.interop.torch_sparse import (
    from_torch_sparse,
    to_torch_bsr,
    to_torch_semi_structured,
)

__all__ = [
    "Imported",
    "from_asp",
    "from_compressed_tensors",
    "from_torch_prune",
    "from_torch_sparse",
    "read",
    "to_compressed_tensors",
    "to_torch_bsr",
    "to_torch_prune",
    "to_torch_semi_structured",
]
