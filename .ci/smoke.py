"""What an installed wheel must do on its own: pack, multiply, agree with dense, save and load."""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

import sparsekit as sk

torch.manual_seed(0)
for pattern in ("2:4", "2:4v4", sk.BlockSparse((16, 16), sparsity=0.75)):
    for dtype in (torch.float32, torch.bfloat16):
        # Small integers: every partial sum is exact, so the result must be equal, not close.
        weight = torch.randint(-4, 5, (96, 80)).to(dtype)
        x = torch.randint(-4, 5, (7, 80)).to(dtype)
        packed = sk.pack(weight, pattern=pattern)
        dense = packed.to_dense()
        assert torch.equal(dense, weight * sk.mask(weight, pattern)), pattern
        exact = torch.nn.functional.linear(x.double(), dense.double()).to(dtype)
        assert torch.equal(sk.linear(x, packed), exact), (pattern, dtype)

x = torch.randn(4, 64)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
sk.prune(model, "2:4", progress=False)
sk.convert(model, example_inputs=x, gate="always")
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    before = model(x)
    path = Path(folder) / "model.safetensors"
    sk.save(model, path)
    sk.load(model, path)
    assert torch.equal(model(x), before)
print("smoke test passed:", version("sparsekit-kernels"))
