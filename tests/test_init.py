"""The package's face: names, and an import that stays light."""

from __future__ import annotations

import subprocess
import sys

import torch

import sparsekit as sk


def test_every_name_is_there() -> None:
    assert sorted(sk.__all__) == sorted(set(sk.__all__))
    for name in sk.__all__:
        assert hasattr(sk, name)


def test_prune_is_a_function_and_a_package() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16))
    sk.prune(layer, "2:4", progress=False)
    assert sk.detect(layer[0].weight) == sk.NM(2, 4)
    import sparsekit.prune

    assert sparsekit.prune.distill is sk.prune.distill


def test_importing_needs_no_optional_package() -> None:
    code = (
        "import sys, sparsekit;"
        "heavy = {'transformers', 'timm', 'onnx', 'onnxruntime', 'matplotlib', 'scipy', 'typer'};"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
