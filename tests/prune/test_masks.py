"""Masks that hold during training, and their files."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsekit.patterns import NM
from sparsekit.prune import hold_masks, load_masks, prune, save_masks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.1),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, history_size=5),
    "lbfgs with line search": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def masks_of(model):
    return {name: NM(2, 4).mask(model.get_submodule(name).weight.detach().abs()) for name in "02"}


def train(model, optimizer, steps=5):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 3).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def zeros(model, masks):
    return all(
        bool((model.get_submodule(name).weight[~mask] == 0).all()) for name, mask in masks.items()
    )


@pytest.mark.parametrize("watched", [True, False], ids=["given", "any optimizer"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_zero_and_the_rest_learns(model, make, watched):
    masks = masks_of(model)
    optimizer = make(model.parameters())
    train(model, optimizer)  # Momentum from before the masks must not move the zeros either.
    handle = hold_masks(model, masks, optimizer if watched else None)
    before = model[0].weight.detach().clone()
    assert zeros(model, masks)
    train(model, optimizer)
    assert zeros(model, masks)
    assert not torch.equal(model[0].weight[masks["0"]], before[masks["0"]])
    handle.remove()
    train(model, optimizer)
    assert not zeros(model, masks)


def test_a_hand_written_update_keeps_zeros_too(model):
    masks = masks_of(model)
    with hold_masks(model, masks):
        (model(torch.ones(2, 8))).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        assert zeros(model, masks)


def test_a_gradient_that_is_not_finite_leaves_zeros_alone(model):
    masks = masks_of(model)
    with hold_masks(model, masks):
        (model(torch.full((2, 8), torch.inf))).sum().backward()
        assert bool((model[0].weight.grad[~masks["0"]] == 0).all())


def test_enforce_zeroes_what_was_written_by_hand(model):
    masks = masks_of(model)
    with hold_masks(model, masks) as handle:
        nn.init.ones_(model[0].weight)
        handle.enforce()
        assert torch.equal(model[0].weight.bool(), masks["0"])


def test_remove_takes_every_hook_off(model):
    optimizer = torch.optim.Adam(model.parameters())
    handle = hold_masks(model, masks_of(model), optimizer)
    assert optimizer._optimizer_step_post_hooks
    assert model[0].weight._backward_hooks
    handle.remove()
    handle.remove()
    assert not optimizer._optimizer_step_post_hooks
    assert not model[0].weight._backward_hooks


def test_another_optimizer_of_another_model_is_left_alone(model):
    other = nn.Linear(8, 8)
    with hold_masks(model, masks_of(model)):
        train(other, torch.optim.SGD(other.parameters(), 0.1))
    assert bool((other.weight != 0).all())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("7", (8, 8), "no layer '7'"),
        ("1", (8, 8), "no layer '1' with a weight"),
        ("0", (4, 8), r"mask of '0' has shape \[4, 8\], its weight has \[8, 8\]"),
    ],
)
def test_masks_of_another_model_are_refused(model, name, shape, message):
    with pytest.raises(ValueError, match=message):
        hold_masks(model, {name: torch.ones(shape, dtype=torch.bool)})


def test_fine_tuning_resumes_from_a_file(model, tmp_path):
    masks = prune(model, "2:4", progress=False).masks
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    with hold_masks(model, masks, optimizer) as held:
        train(model, optimizer, 3)
        save_masks(held.masks, tmp_path / "masks.safetensors")
        states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, 4)
    other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    its_optimizer = torch.optim.AdamW(other.parameters(), 0.1)
    other.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    with hold_masks(other, load_masks(tmp_path / "masks.safetensors"), its_optimizer):
        train(other, its_optimizer, 4)
    assert zeros(other, masks)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_masks_come_back_from_a_file(tmp_path):
    whole = torch.rand(6, 8) > 0.5
    # Views of one mask, a mask of the model itself, and one in another layout.
    masks = {"a.b": whole[:3], "c": whole.T, "": torch.rand(4, 2, 3, 3) > 0.5}
    masks[""] = masks[""].to(memory_format=torch.channels_last)
    save_masks(masks, tmp_path / "masks")
    loaded = load_masks(str(tmp_path / "masks"))
    assert {name: mask.dtype for name, mask in loaded.items()} == dict.fromkeys(masks, torch.bool)
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    assert [file.name for file in tmp_path.iterdir()] == ["masks"]


def test_files_that_are_no_masks(tmp_path):
    path = tmp_path / "masks"
    with pytest.raises(FileNotFoundError):
        load_masks(path)
    save_masks({"0": torch.ones(4, 4, dtype=torch.bool)}, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_masks(path)
    save_file({"0": torch.ones(4, 4)}, path)
    with pytest.raises(ValueError, match="expected sparsekit masks, the file holds None"):
        load_masks(path)
