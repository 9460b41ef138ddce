from copy import deepcopy

import pytest
import torch
from torch import nn

import sparsekit as sk
from bench.digits import Digits, DigitsResNet, accuracy, load, train
from sparsekit.demo import encoder


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load()


@pytest.fixture(scope="module")
def dense(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    return train(DigitsResNet(), digits, epochs=3)


def test_the_parts_have_nothing_in_common(digits: Digits) -> None:
    assert digits.train_images.shape == (1198, 1, 8, 8)
    assert digits.test_images.shape == (599, 1, 8, 8)
    assert float(digits.train_images.min()) == 0
    assert float(digits.train_images.max()) == 1
    assert torch.equal(load().test_labels, digits.test_labels)
    pixels = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(pixels.unique(dim=0)) == 1797


def test_it_learns(dense: nn.Module, digits: Digits) -> None:
    assert not dense.training
    assert accuracy(dense, digits) > 0.8


def test_training_on_keeps_the_zeros(dense: nn.Module, digits: Digits) -> None:
    model = deepcopy(dense)
    report = sk.prune(model, "2:4", targets="blocks.*", progress=False)
    before = model.blocks[0].conv1.weight.clone()
    train(model, digits, 1, 1e-3, report.masks)
    after = model.blocks[0].conv1.weight
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)


def test_without_scikit_learn_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*names: str) -> None:
        raise ImportError(f"demo: needs {', '.join(names)}")

    monkeypatch.setattr(encoder, "require", missing)
    with pytest.raises(ImportError, match="needs sklearn"):
        load()
