"""What recovery compares: the embedding itself, and what it is similar to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.05
"""Similarities are divided by this before the softmax: the nearest few documents count."""


def retrieval_loss(documents: Tensor, weight: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    """A distillation loss that keeps the order in which documents are found.

    Equal cosines to the dense embedding can be worth different recalls: an error along the
    directions that tell documents apart costs ranks, any other does not. So beside the cosine the
    student has to reproduce the teacher's distribution over a bank of documents, as in SEED (Fang
    et al., 2021).

    Args:
        documents: [bank, hidden], rows of length 1: dense embeddings of training texts.
        weight: Weight of the KL divergence beside the cosine's loss.

    Returns:
        `(student, teacher) -> scalar`, both [batch, hidden] with rows of length 1.
    """

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        distance = 1 - functional.cosine_similarity(student, teacher, dim=-1).mean()
        ours = (student @ documents.T / TEMPERATURE).log_softmax(-1)
        theirs = (teacher @ documents.T / TEMPERATURE).log_softmax(-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        return distance + weight * divergence

    return loss
