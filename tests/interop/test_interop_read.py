"""One reader for models, states and files, whatever was done to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_interop_bitmask import named, slowly
from test_interop_masked import X, asp_like, equal, net, torch_pruned
from test_interop_torch_sparse import pruned, semi_structured
from torch import nn

import sparsekit as sk
from sparsekit import interop


def test_a_plain_model_stays_as_it_is() -> None:
    model, other = net(), net()
    imported = interop.read(model)
    assert imported.masks == {}
    assert equal(imported.state, other.state_dict())
    assert str(imported) == "4 tensors, 0 pruned layers"


def test_models() -> None:
    for prune in (asp_like, torch_pruned):
        model = net()
        masks = prune(model)
        expected = model(X)
        imported = interop.read(model)
        assert equal(imported.masks, masks)
        assert imported.state.keys() == net().state_dict().keys()
        assert torch.equal(model(X), expected)


def test_one_method_after_the_other() -> None:
    model = net()
    masks = torch_pruned(model)
    for module in (model[0], model[2][0]):
        module.register_buffer("__weight_mma_mask", sk.mask(module.weight.detach(), "1:4"))
    expected = {"0": masks["0"] & model[0].get_buffer("__weight_mma_mask")}
    imported = interop.read(model)
    assert torch.equal(imported.masks["0"], expected["0"])
    assert torch.equal(model[0].weight != 0, expected["0"])
    assert sk.NM(1, 4).fits(imported.masks["2.0"])


def test_models_with_sparse_tensors() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 8)).half()
    weight = pruned((32, 64), torch.float16)
    blocks = torch.randn(64, 32).half() * sk.mask(torch.randn(64, 32), "bsr16x16@0.5")
    model[0].weight = nn.Parameter(semi_structured(weight), requires_grad=False)
    model[1].weight = nn.Parameter(blocks.to_sparse_bsr((16, 16)), requires_grad=True)
    imported = interop.read(model)
    assert list(imported.masks) == ["0", "1"]
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[1].weight, blocks)
    assert [layer.weight.requires_grad for layer in model] == [False, True, True]
    assert str(sk.detect(model[1].weight)) == "bsr16x16@0.5"
    model.float()(X[:, :1].expand(3, 64))


def test_tied_sparse_tensors_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].weight = model[1].weight = nn.Parameter(torch.eye(32).to_sparse_csr())
    imported = interop.read(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, torch.eye(32))
    assert list(imported.masks) == ["0", "1"]


def test_states_of_everything_at_once(tmp_path: Path) -> None:
    weight = torch.randn(8, 16)
    mask = sk.mask(weight, "2:4")
    state = {
        **named("packed", slowly(weight, mask, True)),
        "asp.weight": weight,
        "asp.__weight_mma_mask": mask,
        "pruned.weight_orig": weight,
        "pruned.weight_mask": mask.float(),
        "plain.weight": weight.clone(),
    }
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "f")
    sparse = {**state, "csr.weight": (weight * mask).to_sparse_csr(), "_extra_state": None}
    for source in (tmp_path / "f", sparse):
        imported = interop.read(source)  # type: ignore[arg-type]
        layers = ["packed", "asp", "pruned"] + ["csr"] * (source is sparse)
        assert set(imported.masks) == set(layers)
        for layer in layers:
            assert torch.equal(imported.masks[layer], mask)
            assert torch.equal(imported.state[f"{layer}.weight"], weight * mask)
            assert torch.equal(
                sk.pack(imported.state[f"{layer}.weight"], mask=mask).to_dense(), weight * mask
            )
        assert torch.equal(imported.state["plain.weight"], weight)


def test_a_bad_tensor_is_named() -> None:
    bad = torch.full((4, 4), torch.nan).to_sparse_csr()
    with pytest.raises(ValueError, match=r"'a\.weight': from_torch_sparse: a value is not finite"):
        interop.read({"a.weight": bad})
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(bad)
    with pytest.raises(ValueError, match=r"'0\.weight': from_torch_sparse: a value is not finite"):
        interop.read(model)
    assert model[0].weight.layout == torch.sparse_csr
