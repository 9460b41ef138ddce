import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import reconstructions
from bench.reconstructions import CHOICES, Result, main, measure, problems, tables
from sparsekit.demo import encoder


def test_the_error_is_that_of_the_layers_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    x = torch.randn(200, 32) @ torch.randn(32, 32)
    (problem,) = problems("net", model, [x], ["0"])
    weight = model[0].weight.detach().clone()
    results = {choice: measure(problem, "2:4", choice) for choice in CHOICES}
    assert torch.equal(model[0].weight, weight)  # the next one starts from the same weight
    kept = weight * x.square().mean(0).sqrt()
    keep = kept.abs().view(16, 8, 4).argsort(2).argsort(2).view(16, 32) >= 2
    lost = ((weight - weight * keep) @ x.t()).norm() / (weight @ x.t()).norm()
    assert results["wanda"].error == pytest.approx(float(lost), rel=1e-3)
    assert results["admm"].error < results["sparsegpt"].error < results["wanda"].error


def test_the_tables() -> None:
    results = [
        Result("net", "a", (4, 8), "2:4", choice, 0.5 - index / 10, 1.25)
        for index, choice in enumerate(CHOICES)
    ]
    (table,) = tables(results)
    assert table.title == "2:4"
    assert table.rows == [
        ("net a", "4x8", "0.5000", "0.4000", "0.3000", "**0.2000**", *["1.25"] * 4)
    ]
    assert len(table.columns) == len(table.rows[0])


def test_a_whole_run(tmp_path: Path) -> None:
    main(["--networks", "digits", "--patterns", "2:4", "--epochs", "1", "--out", str(tmp_path)])
    (figures,) = tmp_path.glob("*-reconstructions.json")
    (text,) = tmp_path.glob("*-reconstructions.md")
    results = json.loads(figures.read_text())["results"]
    assert len(results) == 4 * len(CHOICES)
    assert "| digits blocks.0.conv1 | 32x32x3x3 |" in text.read_text()


@pytest.mark.parametrize("network", ["minilm", "digits"])
def test_without_a_package_the_message_says_what_to_do(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*names: str) -> None:
        raise ImportError(f"demo: needs {', '.join(names)}")

    monkeypatch.setattr(encoder, "require", missing)
    with pytest.raises(SystemExit, match="demo: needs"):
        main(["--networks", network])


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--networks", "guess"])
    assert "invalid choice: 'guess'" in capsys.readouterr().err
    assert set(reconstructions.NETWORKS) == {"minilm", "digits"}
