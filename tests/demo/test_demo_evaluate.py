"""Retrieval quality on embeddings made by hand."""

from __future__ import annotations

import pytest
import torch

from sparsekit.demo.evaluate import Embeddings, mean_cosine, quality, recall


def test_perfect_embeddings_find_every_document() -> None:
    eye = torch.eye(5)
    assert recall(eye, eye, 1) == 1.0


def test_the_rank_decides() -> None:
    documents = torch.eye(4)
    # Query 0 prefers document 1, then 0; query 1 finds its own; 2 and 3 have theirs last.
    queries = torch.tensor(
        [[0.6, 0.8, 0, 0], [0, 1, 0, 0], [0.7, 0.6, 0.1, 0.2], [0.7, 0.6, 0.2, 0.1]]
    )
    assert [recall(queries, documents, at) for at in (1, 2, 3, 4)] == [0.25, 0.5, 0.5, 1.0]


def test_constant_embeddings_find_nothing() -> None:
    same = torch.ones(12, 3)
    assert recall(same, same, 1) == 0.0
    assert recall(same, same, 10) == 0.0


@pytest.mark.parametrize(("queries", "documents"), [((3, 2), (4, 2)), ((0, 2), (0, 2))])
def test_unequal_or_empty_sets_are_refused(
    queries: tuple[int, int], documents: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"expected as many documents as queries and at least one"):
        recall(torch.ones(queries), torch.ones(documents), 1)


def test_cosine_is_the_mean_over_queries_and_documents() -> None:
    dense = Embeddings(torch.eye(2), torch.eye(2))
    turned = Embeddings(torch.eye(2), torch.eye(2).flip(0))
    assert mean_cosine(dense, dense) == 1.0
    assert mean_cosine(turned, dense) == 0.5
    # Length does not matter.
    assert mean_cosine(Embeddings(2 * torch.eye(2), 3 * torch.eye(2)), dense) == 1.0


def test_quality_holds_the_three_figures() -> None:
    dense = Embeddings(torch.eye(2), torch.eye(2))
    swapped = Embeddings(torch.eye(2), torch.eye(2).flip(0))
    assert quality(swapped, dense) == {"recall_at_1": 0.0, "recall_at_10": 1.0, "cosine": 0.5}
