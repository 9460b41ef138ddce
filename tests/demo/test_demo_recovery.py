"""The recovery loss: zero for equal embeddings, and a preference for errors that cost no rank."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from sparsekit.demo.recovery import retrieval_loss

BANK = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
TEACHER = normalize(torch.tensor([[0.8, 0.6, 0.0, 0.0]]), dim=-1)


def test_equal_embeddings_cost_nothing() -> None:
    torch.testing.assert_close(retrieval_loss(BANK)(TEACHER, TEACHER), torch.tensor(0.0))


def test_of_two_errors_of_one_size_the_one_that_swaps_documents_costs_more() -> None:
    loss = retrieval_loss(BANK)
    swapped = torch.tensor([[0.6, 0.8, 0.0, 0.0]])
    # Same cosine to the teacher, but the same share of both documents is lost.
    cosine = float((swapped * TEACHER).sum())
    aside = cosine * TEACHER + torch.tensor([[0.0, 0, (1 - cosine**2) ** 0.5, 0]])
    torch.testing.assert_close((aside * TEACHER).sum(), (swapped * TEACHER).sum())
    assert float(loss(aside, TEACHER)) < float(loss(swapped, TEACHER))


def test_without_weight_it_is_the_cosine_alone() -> None:
    student = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(retrieval_loss(BANK, 0.0)(student, TEACHER), torch.tensor(0.4))


def test_gradients_reach_the_student() -> None:
    student = TEACHER.clone().requires_grad_()
    other = normalize(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), dim=-1)
    retrieval_loss(BANK)(student, other).backward()
    assert student.grad is not None
    assert float(student.grad.abs().sum()) > 0
