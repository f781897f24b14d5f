"""Terms that are no cross-entropy, and their gradients, against the formulas in float64; where p is 1, and at a tie."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.objectives import Term
from pipeline.data.batches import IGNORED
from pipeline.modeling import token_losses as module
from pipeline.modeling.token_losses import OutputLayer, shifted, token_losses
from tests.pipeline.modeling.predictions import (
    ERRORS,
    LABELS,
    SEQUENCES,
    WAYS,
    Created,
    V,
    assert_gradients_close,
    batch_of,
    divergence,
    exactly,
    gradients_of,
    leaves_of,
    log_probabilities,
    logits_for,
    losses_of,
    per_prediction,
    random,
)

TERMS: tuple[Term, ...] = ("unlikelihood", "margin", "jensen_shannon")


def teacher_for(term: Term, labels: Tensor, dtype: torch.dtype) -> Tensor | None:
    return logits_for(labels, seed=9, dtype=dtype) if term == "jensen_shannon" else None


def from_formula(term: Term, logits: Tensor, q: Tensor | None) -> list[Tensor]:
    """Of all predictions, one after another."""

    def of_prediction(log_p: Tensor, token: int, number: int, at: int) -> Tensor:
        if term == "unlikelihood":
            return -torch.stack([log_p[v].exp() for v in range(V) if v != token]).sum().log()
        if term == "margin":
            largest = max(range(V), key=lambda v: log_p[v].item())  # of equal ones the first
            return log_p[largest] - log_p.sum() / V
        assert q is not None
        return divergence(log_p.exp(), log_probabilities(q[number, at].double()).exp())

    return [x for row in per_prediction(logits, LABELS, of_prediction) for x in row]


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [1, 5 * V, 2**24])
@pytest.mark.parametrize("dtype", ERRORS)
def test_terms_equal_the_formula(
    monkeypatch: pytest.MonkeyPatch, term: Term, way: str, chunk: int, dtype: torch.dtype
) -> None:
    """Value to fp32 accuracy even for bf16, gradients to the accuracy of their own dtype. Some logits are equal."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    value_error, gradient_error = ERRORS[dtype]
    q, leaves = teacher_for(term, LABELS, dtype), leaves_of(way, LABELS, dtype)
    got = losses_of(leaves, LABELS, q, term=term)
    assert got.shape == LABELS.shape and got.dtype == torch.promote_types(dtype, torch.float32)
    exact, logits = exactly(leaves)
    flat, predicted = torch.stack(from_formula(term, logits, q)), shifted(LABELS) != IGNORED
    assert (got[~predicted] == 0).all()
    torch.testing.assert_close(got[predicted].double(), flat, rtol=value_error, atol=value_error)
    upstream = torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype) - 0.5
    mine = gradients_of((got * upstream).sum(), leaves)
    assert [gradient.dtype for gradient in mine] == [dtype] * len(leaves)
    assert_gradients_close(mine, gradients_of(upstream[predicted].double() @ flat, exact), gradient_error)
    assert (mine[0][~predicted] == 0).all()


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("way", WAYS)
def test_no_prediction_in_the_whole_micro_batch(way: str, term: Term) -> None:
    labels = batch_of([SEQUENCES[1], SEQUENCES[4]])
    leaves = leaves_of(way, labels, torch.float32)
    terms = losses_of(leaves, labels, teacher_for(term, labels, torch.float32), term=term)
    assert terms.requires_grad and (terms == 0).all()
    assert all((gradient == 0).all() for gradient in gradients_of(terms.sum(), leaves))


@pytest.mark.parametrize("term", TERMS)
def test_nothing_of_the_size_of_the_logits_is_ever_made(term: Term) -> None:
    """Vocabulary of 131072: from hidden states, forward and backward make no tensor of tokens x vocabulary elements."""
    vocabulary, tokens, width = 2**17, 136, 4
    assert vocabulary * tokens > module._CHUNK > vocabulary * width
    labels = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    hidden = random(1, tokens, width).requires_grad_()
    weight = random(vocabulary, width, seed=1, scale=1.0).requires_grad_()
    q = torch.zeros(1, 1, 1).expand(1, tokens, vocabulary) if term == "jensen_shannon" else None
    with Created() as created:
        token_losses(hidden, labels, layer=OutputLayer(weight), teacher_logits=q, term=term).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (vocabulary, width) in created.shapes, "the weight's gradient was seen being made"
    assert created.largest <= module._CHUNK


@pytest.mark.parametrize("way", ["logits", "hidden"])
@pytest.mark.parametrize("gap", [0.0, 5.0, 16.0, 40.0, 1e4])
def test_unlikelihood_where_the_model_is_sure(way: str, gap: float) -> None:
    """In fp32, 1 - p has no digits left from a gap of 17 on; the value is that gap, and the gradient the token's p."""
    labels = torch.tensor([[0, 1]])
    states = torch.tensor([[[0.0, gap, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    layer = None if way == "logits" else OutputLayer(torch.eye(3))
    terms = token_losses(states, labels, layer=layer, term="unlikelihood")
    want = gap - math.log(2) + math.log1p(2 * math.exp(-gap))
    assert terms[0, 0].item() == pytest.approx(want, rel=1e-6)
    gradient, p = gradients_of(terms.sum(), [states])[0][0, 0], 1 / (1 + 2 * math.exp(-gap))
    torch.testing.assert_close(gradient.tolist(), [-p / 2, p, -p / 2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_unlikelihood_has_the_gradient_of_ce_u(way: str) -> None:
    """The definition of CE-U: cross-entropy with the model's own prediction, held fixed, without the token."""
    leaves = leaves_of(way, LABELS, torch.float64)
    got = gradients_of(losses_of(leaves, LABELS, term="unlikelihood").sum(), leaves)
    exact, logits = exactly(leaves)
    predicted, targets = shifted(LABELS) != IGNORED, shifted(LABELS)
    z, without = logits[predicted], logits.detach()[predicted].clone()
    without[torch.arange(len(z)), targets[predicted]] = -math.inf
    ce_u = F.cross_entropy(z, without.softmax(-1), reduction="sum")
    assert_gradients_close(got, gradients_of(ce_u, exact), 1e-12)


@pytest.mark.parametrize("far", [0.0, 30.0, 200.0, 1e4])
def test_jsd_is_bounded_and_its_gradient_finite(far: float) -> None:
    """0 where the two agree, log 2 where they share nothing; by hand for two entries."""
    labels, states = torch.tensor([[0, 1]]), torch.tensor([[[far, 0.0], [0.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, far], [0.0, 0.0]]])
    terms = token_losses(states, labels, teacher_logits=teacher, term="jensen_shannon")
    small = math.exp(-far) / (1 + math.exp(-far))
    shared = sum(x * math.log(2 * x) for x in (small, 1 - small) if x)  # of p and q, by the symmetry of the two
    assert terms[0, 0].item() == pytest.approx(shared, abs=1e-6)
    slope = small * (1 - small) / 2 * far  # p_1 p_2 / 2 (log p_1 - log p_2), because m is uniform
    torch.testing.assert_close(
        gradients_of(terms.sum(), [states])[0][0, 0].tolist(), [slope, -slope], rtol=1e-4, atol=1e-7
    )


def test_a_position_without_a_label_has_no_gradient_however_sure_the_model_is_there() -> None:
    z = torch.zeros(1, 4, 10)
    z[0, 0, 0] = 95.0  # of a prompt; e^95 is infinite in float32
    z.requires_grad_()
    token_losses(z, torch.tensor([[IGNORED, IGNORED, 3, IGNORED]]), term="unlikelihood").sum().backward()
    assert z.grad is not None and torch.isfinite(z.grad).all() and not z.grad[0, 0].any() and z.grad[0, 1].any()
