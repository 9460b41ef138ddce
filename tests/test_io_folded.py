"""Files of converted networks whose batch normalisations are folded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_models import NETWORKS, always, network, run, shake
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.nn import FoldedBatchNorm, FusedActivation, SparseConv2d

MIXED = {"stem*": None, "*.project": None, "*": "2:4"}


def saved(name: str, folder: Path, pattern: Any = "2:4") -> tuple[nn.Module, Tensor, Path]:
    model, x = network(name)
    always(model, x, pattern, fold_batchnorm=True)
    path = folder / f"{name}.safetensors"
    sk.save(model, path)
    return model, x, path


def fresh(name: str) -> nn.Module:
    """The architecture with other numbers."""
    torch.manual_seed(7)
    return shake(NETWORKS[name][0](), seed=7).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_into_an_unconverted_model(name: str, tmp_path: Path) -> None:
    model, x, path = saved(name, tmp_path)
    other = fresh(name)
    sk.load(other, path, progress=False)
    assert torch.equal(run(other, x), run(model, x))
    assert repr(other) == repr(model)
    assert other.state_dict().keys() == model.state_dict().keys()


def test_with_dense_layers_that_were_folded(tmp_path: Path) -> None:
    model, x, path = saved("mobilenet", tmp_path, MIXED)
    assert isinstance(model.stem[0], nn.Conv2d)
    assert isinstance(model.blocks[0].expand, SparseConv2d)
    other = fresh("mobilenet")
    other.blocks[0].depth.weight.requires_grad_(False)
    sk.load(other, path, progress=False)
    assert isinstance(other.stem[1], FoldedBatchNorm)
    assert isinstance(other.blocks[0].act1, FusedActivation)
    assert other.stem[0].bias.requires_grad
    assert not other.blocks[0].depth.bias.requires_grad
    # Dense convolutions beside sparse ones are in channels_last here as well.
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert mine.stride() == theirs.stride()
    assert torch.equal(run(other, x), run(model, x))


def test_into_a_converted_model(tmp_path: Path) -> None:
    model, x, path = saved("resnet", tmp_path)
    other = fresh("resnet")
    always(other, x, fold_batchnorm=True, fuse="all")
    sk.load(other, path, progress=False)
    torch.testing.assert_close(run(other, x), run(model, x))


def test_a_normalisation_that_activates(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    def block() -> nn.Module:
        layers = [nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)]
        acts = [timm.layers.BatchNormAct2d(8), timm.layers.BatchNormAct2d(8)]
        return shake(nn.Sequential(layers[0], acts[0], layers[1], acts[1])).eval()

    torch.manual_seed(0)
    model, x = block(), torch.randn(2, 8, 4, 4)
    # One keeps its activation, of the other it moves into the layer.
    always(model, x, {"0": "2:4", "*": None}, fold_batchnorm=True)
    path = tmp_path / "block.safetensors"
    sk.save(model, path)
    other = block()
    sk.load(other, path, progress=False)
    assert isinstance(other[1].act, FusedActivation)
    assert type(other[3].act) is nn.ReLU
    assert torch.equal(run(other, x), run(model, x))


def test_what_is_in_a_file(tmp_path: Path) -> None:
    _, _, path = saved("yolo", tmp_path)
    summary = sk.inspect(path)
    assert summary.folded[:2] == ["stem.bn", "block.first.bn"]
    assert "7 fused activations, 7 folded batch normalisations" in str(summary)


def test_a_file_without_the_entry_still_loads(tmp_path: Path) -> None:
    model, x = network("resnet")
    always(model, x)
    path = tmp_path / "old.safetensors"
    sk.save(model, path)
    edit(path, lambda metadata, _: metadata.pop("folded"))
    other = fresh("resnet")
    sk.load(other, path, progress=False)
    assert torch.equal(run(other, x), run(model, x))


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def set_folded(value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    text = value if isinstance(value, str) else json.dumps(value)
    return lambda metadata, _: metadata.update(folded=text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_folded("{"), "damaged metadata: 'folded' is no JSON list of names"),
        (set_folded({"bn": 1}), "damaged metadata: 'folded' is no JSON list of names"),
        (set_folded([1]), "damaged metadata: 'folded' is no JSON list of names"),
        (set_folded(["pool"]), "folds a batch normalisation at 'pool', the model has a MaxPool2d"),
        (set_folded(["gone"]), "folds a batch normalisation at 'gone', the model has nothing"),
        (set_folded([""]), "folds a batch normalisation at '', the model has nothing"),
        # Two biases and one normalisation: the second bias came from nowhere.
        (set_folded(["bn"]), "does not fit the model: missing layer1.0.bn1.bias"),
        (
            lambda _, tensors: tensors.update({"stem.bias": torch.zeros(3)}),
            r"has a bias of 'stem' of shape \[3\], not \[16\]",
        ),
        (
            lambda _, tensors: tensors.update({"stem.bias": tensors["stem.bias"].half()}),
            "has a bias of 'stem' that is not torch.float32",
        ),
    ],
)
def test_damaged_files_are_refused_whole(
    change: Callable[[dict[str, Any], dict[str, Tensor]], Any], says: str, tmp_path: Path
) -> None:
    _, _, path = saved("resnet", tmp_path)
    edit(path, change)
    other = fresh("resnet")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    text = repr(other)
    with pytest.raises(ValueError, match=says):
        sk.load(other, path, progress=False)
    assert repr(other) == text
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_folded_model_does_not_take_a_file_with_statistics(tmp_path: Path) -> None:
    model, x = network("resnet")
    always(model, x)
    path = tmp_path / "plain.safetensors"
    sk.save(model, path)
    always(model, x, fold_batchnorm=True)
    other, _ = network("resnet")
    always(other, x, fold_batchnorm=True)
    with pytest.raises(ValueError, match=r"missing layer1\.0\.conv1\.bias.* unexpected bn\.bias"):
        sk.load(other, path, progress=False)
