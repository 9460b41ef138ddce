"""Quality as retrieval: the first paragraph of a docstring must find the rest of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.demo.corpus import Docstring
from sparsekit.demo.encoder import embed


@dataclass(frozen=True)
class Embeddings:
    """Queries and documents of the test half; row i of one belongs to row i of the other.

    Attributes:
        queries: float32 [pairs, hidden], rows of length 1.
        documents: float32 [pairs, hidden], rows of length 1.
    """

    queries: Tensor
    documents: Tensor


def embed_pairs(
    encoder: nn.Module, tokenizer: Any, pairs: Sequence[Docstring], label: str, progress: bool
) -> Embeddings:
    """Embeds both halves of every pair in one pass."""
    texts = [pair.query for pair in pairs] + [pair.document for pair in pairs]
    rows = embed(encoder, tokenizer, texts, label=label, progress=progress)
    return Embeddings(rows[: len(pairs)], rows[len(pairs) :])


def recall(queries: Tensor, documents: Tensor, at: int) -> float:
    """Share of queries whose own document is among the `at` most similar ones.

    Args:
        queries: [pairs, hidden].
        documents: [pairs, hidden]; row i is the right answer to query i.
        at: How many candidates count.

    Returns:
        Fraction in 0..1. A tie counts against the query, so constant embeddings score 0, not 1.

    Raises:
        ValueError: Different numbers of queries and documents, or none.
    """
    if queries.shape != documents.shape or queries.shape[0] == 0:
        raise ValueError(
            f"recall: expected as many documents as queries and at least one, came "
            f"{list(queries.shape)} and {list(documents.shape)}; pass one document per query."
        )
    similarity = queries.double() @ documents.double().T
    own = similarity.diagonal().unsqueeze(1)
    # The own document is equal to itself, hence the 1.
    rank = (similarity >= own).sum(1) - 1
    return (rank < at).double().mean().item()


def mean_cosine(embeddings: Embeddings, dense: Embeddings) -> float:
    """Mean cosine between a model's embeddings and the dense model's, over all texts."""
    ours = torch.cat([embeddings.queries, embeddings.documents]).double()
    theirs = torch.cat([dense.queries, dense.documents]).double()
    return nn.functional.cosine_similarity(ours, theirs).mean().item()


def quality(embeddings: Embeddings, dense: Embeddings) -> dict[str, float]:
    """The three figures of the report: `recall_at_1`, `recall_at_10`, `cosine`."""
    return {
        "recall_at_1": recall(embeddings.queries, embeddings.documents, 1),
        "recall_at_10": recall(embeddings.queries, embeddings.documents, 10),
        "cosine": mean_cosine(embeddings, dense),
    }
