"""The studies of pruning: the journal, the trials, the tables."""

import json
from pathlib import Path

import pytest
import torch

from bench import digits as task
from bench.pruning import digits, minilm, report
from bench.pruning.__main__ import main
from bench.pruning.journal import Journal
from sparsekit.prune import METHODS, TRAINING_METHODS


def test_a_journal_knows_what_it_was_told(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    Journal(path).add({"method": "magnitude", "seed": 1}, {"accuracy": 0.5})
    again = Journal(path)
    assert {"seed": 1, "method": "magnitude"} in again
    assert {"seed": 2, "method": "magnitude"} not in again
    assert list(again) == [({"method": "magnitude", "seed": 1}, {"accuracy": 0.5})]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).add({"seed": 1}, {"accuracy": 0.5})
    with path.open("a") as file:
        file.write('{"asked": {"seed"')
    again = Journal(path)
    again.add({"seed": 2}, {"accuracy": 0.6})
    assert len(list(Journal(path))) == 2


def test_a_damaged_line_before_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"asked": 1}\n{"asked": {}, "found": {}}\n')
    with pytest.raises(ValueError, match="line 1 is no result"):
        Journal(path)


def test_every_method_is_tried() -> None:
    todo = list(digits.trials(["2:4"], 2))
    assert len({json.dumps(trial.asked, sort_keys=True) for trial in todo}) == len(todo)
    assert {trial.method for trial in todo if trial.when == "after"} == set(METHODS)
    assert {trial.method for trial in todo if trial.when == "during"} == {
        *TRAINING_METHODS,
        "lottery",
    }
    assert set(digits.BEFORE) <= set(METHODS)
    names = {trial.method for trial in minilm.trials(["2:4"], ["2:4"], 5)}
    assert names == {name for name, method in METHODS.items() if method.needs != "gradients"}


def test_the_stages_of_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "EPOCHS", 2)
    monkeypatch.setattr(digits, "TUNING_EPOCHS", 1)
    data = task.load()
    for trial in (
        digits.Trial("after", "wanda", "2:4v4", 0),
        digits.Trial("before", "snip", "2:4", 0),
        digits.Trial("during", "gradual", "bsr4x4@0.5", 0),
    ):
        found = digits._run(trial, data, tmp_path)
        assert found["recovered"] > 0.4
    assert (tmp_path / "digits-2-0.pt").exists()
    first = digits.dense(0, data, tmp_path)
    again = digits.dense(0, data, tmp_path)
    assert torch.equal(first.output.weight, again.output.weight)


def test_the_tables_and_plots(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for seed, right in ((0, 0.9), (1, 0.94)):
        for pattern in ("bsr1x1@0.5", "bsr1x1@0.9"):
            journal.add(
                digits.Trial("after", "wanda", pattern, seed).asked,
                {"dense": 0.99, "pruned": 0.5, "statistics": 0.8, "recovered": right},
            )
            journal.add(digits.Trial("during", "rigl", pattern, seed).asked, {"recovered": right})
    journal.add(
        minilm.Trial("sparsegpt", "2:4", "least_squares", permuted=True, steps=9).asked,
        {"recall_at_1": 0.5, "recall_at_10": 0.8, "cosine": 0.9, "error": 0.1, "seconds": 120.0},
    )
    for name, ms, found in (
        ("2:4", 50.0, {"cosine": 0.9, "recall_at_1": 0.5, "recall_at_10": 0.8}),
        ("plan 70%", 45.0, {"cosine": 0.95, "recall_at_1": 0.6, "recall_at_10": 0.9, "layers": {}}),
        ("plan 80%", 55.0, {"cosine": 0.97, "recall_at_1": 0.6, "recall_at_10": 0.9, "layers": {}}),
        ("dense, torch", 60.0, None),
    ):
        journal.add({"study": "pareto", "time of": name}, {"ms": ms})
        if found is not None:
            journal.add({"study": "pareto", "choice": name, "method": "admm"}, found)
    front = report.pareto_table(list(journal))
    assert front is not None
    assert front.rows[0] == ("dense, torch", "60.0", "1.00x", "", "", "")
    assert front.rows[-1] == ("plan 70%", "45.0", "1.33x", "95.0", "60.0", "90.0")
    tables = {
        table.title: table
        for table in [
            *report.digits_tables(list(journal)),
            *report.minilm_tables(list(journal)),
        ]
    }
    tuned = tables["The same, trained on for 4 epochs under the masks"]
    assert tuned.rows == [("wanda", "92.0 ± 2.8", "92.0 ± 2.8")]
    assert tables["Recovered by distillation"].rows == [
        ("2:4", "sparsegpt + least_squares + permuted", "9", "50.0", "80.0", "0.900", "2")
    ]
    main(["report", "--work", str(tmp_path), "--out", str(tmp_path / "out")])
    (text,) = (tmp_path / "out").glob("*-pruning.md")
    assert "| wanda | 92.0 ± 2.8 | 92.0 ± 2.8 |" in text.read_text()
    (figures,) = (tmp_path / "out").glob("*.json")
    assert len(json.loads(figures.read_text())["results"]) == 16
    for kind in ("sparsity", "latency"):
        (picture,) = (tmp_path / "out").glob(f"*-{kind}.png")
        assert picture.stat().st_size > 10_000


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["guess"])
    assert "invalid choice: 'guess'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["digits", "--share", "3/2"])
    assert "expected I/N such as 1/2, got '3/2'" in capsys.readouterr().err
