import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekit as sk
from bench import digits as digits_module
from bench.digits import Digits, DigitsResNet, Result, accuracy, load, main, measure, table, train
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


@pytest.mark.parametrize(
    ("pattern", "method"), [("2:4", "magnitude"), ("2:4v4", "wanda"), ("bsr16x16@0.5", "sparsegpt")]
)
def test_the_converted_network_is_right_as_often(
    dense: nn.Module, digits: Digits, pattern: str, method: str
) -> None:
    weight = next(dense.parameters()).clone()
    result = measure(dense, digits, pattern, method, tuning_epochs=1)
    assert (result.pattern, result.method, result.sparse_layers) == (pattern, method, 7)
    assert result.converted == result.tuned > 0.5
    # The next method starts from the same network.
    assert torch.equal(next(dense.parameters()), weight)


def test_training_on_keeps_the_zeros(dense: nn.Module, digits: Digits) -> None:
    model = deepcopy(dense)
    report = sk.prune(model, "2:4", targets="blocks.*", progress=False)
    before = model.blocks[0].conv1.weight.clone()
    train(model, digits, 1, 1e-3, report.masks)
    after = model.blocks[0].conv1.weight
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)


def test_another_result_is_an_error(
    dense: nn.Module, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits_module, "_SAME", -1.0)
    with pytest.raises(AssertionError, match="2:4, magnitude: scores are off by"):
        measure(dense, digits, "2:4", "magnitude", tuning_epochs=1)


def test_the_table() -> None:
    found = table(0.99, [Result("2:4", "wanda", 0.9, 0.98, 0.98, 7)])
    assert found.rows == [("2:4", "wanda", "99.0%", "90.0%", "98.0%", "98.0%", "7")]
    assert len(found.columns) == 7


def test_a_whole_run(tmp_path: Path) -> None:
    command = ["--patterns", "2:4", "--methods", "magnitude", "--epochs", "1"]
    main([*command, "--tuning-epochs", "1", "--out", str(tmp_path)])
    (figures,), (text,) = tmp_path.glob("*-digits.json"), tmp_path.glob("*-digits.md")
    (result,) = json.loads(figures.read_text())["results"]
    assert result["converted"] == result["tuned"]
    assert "| 2:4 | magnitude |" in text.read_text()


def test_without_scikit_learn_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*names: str) -> None:
        raise ImportError(f"demo: needs {', '.join(names)}")

    monkeypatch.setattr(encoder, "require", missing)
    with pytest.raises(SystemExit, match="needs sklearn"):
        main([])


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--methods", "guess"])
    assert "invalid choice: 'guess'" in capsys.readouterr().err
