"""Masks of ASP and of torch.nn.utils.prune, in models and in state dicts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import sparsekit as sk
from sparsekit import interop

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Sequential(nn.Linear(24, 8)))


def asp_like(model: nn.Module, prune: bool = True, pruned_values: bool = True) -> dict[str, Tensor]:
    """What ASP leaves in a model: buffers beside every weight, and zeros."""
    masks = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight
        mask = sk.mask(weight, "2:4") if prune else torch.ones_like(weight).bool()
        module.register_buffer("__weight_mma_mask", mask)
        if pruned_values:
            module.register_buffer("__weight_mma_pruned_p", (weight * ~mask).detach())
        with torch.no_grad():
            weight.mul_(mask)
        masks[name] = mask
    return masks


def torch_pruned(model: nn.Sequential) -> dict[str, Tensor]:
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    torch_prune.random_unstructured(model[0], "bias", amount=4)
    torch_prune.custom_from_mask(model[2][0], "weight", sk.mask(model[2][0].weight, "2:4"))
    return {"0": model[0].weight_mask.bool(), "2.0": model[2][0].weight_mask.bool()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- ASP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruned_values", [True, False])
def test_asp_models(pruned_values: bool) -> None:
    model = net()
    masks = asp_like(model, pruned_values=pruned_values)
    expected = model(X)
    imported = interop.from_asp(model)
    assert equal(imported.masks, masks)
    assert imported.state.keys() == net().state_dict().keys() == model.state_dict().keys()
    assert torch.equal(model(X), expected)
    report = sk.convert(model, example_inputs=X, gate="always", progress=False)
    assert report.sparse == ["0", "2.0"]
    assert str(imported) == "4 tensors, 2 pruned layers, 50.0% of their weights zero"


def test_asp_masks_that_were_not_applied_are() -> None:
    model = net()
    mask = asp_like(model)["0"]
    with torch.no_grad():
        model[0].weight[~mask] = torch.nan  # a product with 0 would not take it away
    state = interop.from_asp(dict(model.state_dict())).state
    interop.from_asp(model)
    for weight in (model[0].weight, state["0.weight"]):
        assert torch.equal(weight != 0, mask)


def test_asp_states() -> None:
    model = net()
    masks = asp_like(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "2.0.__weight_mma_pruned_p" in state
    names = list(state)
    imported = interop.from_asp(state)
    assert list(state) == names
    assert equal(imported.masks, masks)
    assert equal(imported.state, interop.from_asp(model).state)


def test_asp_before_it_computed_masks_prunes_nothing() -> None:
    model = net()
    asp_like(model, prune=False)
    before = model[0].weight.clone()
    imported = interop.from_asp(model)
    assert imported.masks == {}
    assert torch.equal(model[0].weight, before)
    assert not any("mma" in name for name in imported.state)


def test_asp_parameters_by_other_names_and_the_root() -> None:
    attention = nn.MultiheadAttention(8, 2)
    mask = sk.mask(attention.in_proj_weight, "2:4")
    attention.register_buffer("__in_proj_weight_mma_mask", mask.to(torch.uint8))
    imported = interop.from_asp(attention)
    assert imported.masks == {}
    assert torch.equal(attention.in_proj_weight != 0, mask)
    root = nn.Linear(8, 8)
    root.register_buffer("__weight_mma_mask", sk.mask(root.weight, "2:4"))
    assert list(interop.from_asp(root.state_dict()).masks) == [""]
    assert list(interop.from_asp(root).masks) == [""]


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(24, 8), r"the mask of '0\.weight' has shape \[24, 8\], the .* \[24, 16\]"),
        (torch.full((24, 16), 0.5), r"the mask of '0\.weight' holds values other than 0 and 1"),
        (torch.full((24, 16), torch.nan), r"the mask of '0\.weight' holds values other than"),
    ],
)
def test_asp_masks_that_do_not_fit(mask: Tensor, says: str) -> None:
    model = net()
    asp_like(model)
    model[0]._buffers["__weight_mma_mask"] = mask
    before = copy.deepcopy(model.state_dict())
    for source in (model, dict(model.state_dict())):
        with pytest.raises(ValueError, match=says):
            interop.from_asp(source)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) or "mma" in n for n in before)


def test_asp_masks_of_nothing() -> None:
    model = net()
    model.register_buffer("__gone_mma_mask", torch.ones(3))
    for source in (model, dict(model.state_dict())):
        with pytest.raises(ValueError, match="there is a mask for 'gone', but no such parameter"):
            interop.from_asp(source)


# --- torch.nn.utils.prune ---------------------------------------------------------------------


def test_torch_prune_models() -> None:
    model = net()
    masks = torch_pruned(model)
    expected = model(X)
    imported = interop.from_torch_prune(model)
    assert equal(imported.masks, masks)
    assert model.state_dict().keys() == net().state_dict().keys()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert isinstance(model[0].weight, nn.Parameter)
    assert int((model[0].bias == 0).sum()) == 4
    assert torch.equal(model(X), expected)


def test_torch_prune_several_times_in_a_row() -> None:
    model = net()
    torch_prune.l1_unstructured(model[0], "weight", amount=0.3)
    torch_prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    mask = model[0].weight_mask.bool()
    imported = interop.from_torch_prune(model)
    assert torch.equal(imported.masks["0"], mask)
    assert torch.equal(model[0].weight != 0, mask)


def test_torch_prune_states() -> None:
    model = net()
    masks = torch_pruned(model)
    imported = interop.from_torch_prune(model.state_dict())
    assert equal(imported.masks, masks)
    assert equal(imported.state, interop.from_torch_prune(model).state)


def test_other_names_that_end_alike_are_left_alone() -> None:
    state = {"a.weight_orig": torch.ones(2), "b.attn_mask": torch.ones(3), "_orig": torch.ones(1)}
    imported = interop.from_torch_prune(state)
    assert equal(imported.state, state)
    assert imported.masks == {}
    spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    names = spectral.state_dict().keys()
    assert interop.from_torch_prune(spectral).state.keys() == names


def test_torch_prune_masks_that_do_not_fit() -> None:
    model = net()
    torch_pruned(model)
    model[2][0]._buffers["weight_mask"] = torch.ones(8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for source in (model, dict(model.state_dict())):
        with pytest.raises(ValueError, match=r"mask of '2\.0\.weight' has shape \[8, 8\]"):
            interop.from_torch_prune(source)
    assert equal(dict(model.state_dict()), before)
    state = {"w_orig": torch.ones(2), "w_mask": torch.ones(2), "w": torch.ones(2)}
    with pytest.raises(ValueError, match="there are both 'w' and 'w_orig'"):
        interop.from_torch_prune(state)
    del model[2][0]._buffers["weight_mask"]
    with pytest.raises(ValueError, match=r"'2\.0\.weight' has a hook that prunes and no mask"):
        interop.from_torch_prune(model)


def test_masks_to_torch_prune_and_back() -> None:
    model = net()
    report = sk.prune(model, "2:4", method="magnitude", progress=False)
    interop.to_torch_prune(model, report.masks)
    assert torch_prune.is_pruned(model)
    with torch.no_grad():
        model[0].weight_orig.add_(1)
    model(X)
    assert torch.equal(model[0].weight != 0, report.masks["0"])
    assert equal(interop.from_torch_prune(model).masks, report.masks)


def test_masks_that_torch_prune_cannot_take() -> None:
    model = net()
    mask = torch.ones(24, 16, dtype=torch.bool)
    for masks, says in (
        ({"0": mask, "gone": mask}, "the model has no layer 'gone'"),
        ({"0": mask, "1": mask}, r"a mask for '1\.weight', but no such parameter"),
        ({"0": mask, "2.0": mask}, r"mask of '2\.0\.weight' has shape \[24, 16\]"),
    ):
        with pytest.raises(ValueError, match=says):
            interop.to_torch_prune(model, masks)
    assert not torch_prune.is_pruned(model)
