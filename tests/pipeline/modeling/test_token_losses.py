"""Token losses and their gradients against the formulas in float64: from logits, from hidden states, in any chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.data.batches import IGNORED
from pipeline.modeling import token_losses as module
from pipeline.modeling.token_losses import OutputLayer, entropies, shifted, token_losses
from tests.pipeline.modeling.predictions import (
    ERRORS,
    LABELS,
    SEQUENCES,
    WAYS,
    Created,
    H,
    V,
    assert_gradients_close,
    batch_of,
    exactly,
    gradients_of,
    leaves_of,
    log_probabilities,
    logits_for,
    losses_of,
    per_prediction,
    random,
)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [1, 7, V, 3 * V + 1, 2**24])
@pytest.mark.parametrize("dtype", ERRORS)
def test_token_losses_equal_the_formula(
    monkeypatch: pytest.MonkeyPatch, soft: bool, way: str, chunk: int, dtype: torch.dtype
) -> None:
    """Value to fp32 accuracy even for bf16, gradients to the accuracy of their own dtype."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    value_error, gradient_error = ERRORS[dtype]
    q = logits_for(LABELS, seed=9, dtype=dtype) if soft else None
    leaves = leaves_of(way, LABELS, dtype)
    got = losses_of(leaves, LABELS, q)
    assert got.shape == LABELS.shape and got.dtype == torch.promote_types(dtype, torch.float32)

    def against(log_p: Tensor, token: int, number: int, at: int) -> Tensor:
        return -log_p[token] if q is None else -(log_probabilities(q[number, at].double()).exp() @ log_p)

    exact, logits = exactly(leaves)
    want = per_prediction(logits, LABELS, against)
    predicted = shifted(LABELS) != IGNORED
    assert (got[~predicted] == 0).all()
    flat = torch.stack([x for row in want for x in row])
    torch.testing.assert_close(got[predicted].double(), flat, rtol=value_error, atol=value_error)
    upstream = torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype) - 0.5
    mine = gradients_of((got * upstream).sum(), leaves)
    assert [gradient.dtype for gradient in mine] == [dtype] * len(leaves)
    assert_gradients_close(mine, gradients_of(upstream[predicted].double() @ flat, exact), gradient_error)
    assert (mine[0][~predicted] == 0).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [2 * V, 2**24])
def test_gradients_by_finite_differences(monkeypatch: pytest.MonkeyPatch, soft: bool, way: str, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    labels = batch_of(SEQUENCES[1:4])
    q = logits_for(labels, seed=9, dtype=torch.float64) if soft else None
    leaves = leaves_of(way, labels, torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: losses_of(list(tensors), labels, q), leaves)


def test_a_position_is_predicted_by_the_one_before_it() -> None:
    """By hand: the first row of logits speaks about the second token, the last about nothing."""
    labels = torch.tensor([[0, 1, 2]])
    logits = torch.zeros(1, 3, 3)
    logits[0, 0, 1], logits[0, 1, 2], logits[0, 2, 0] = 5.0, 7.0, 9.0
    want = [math.log(1 + 2 * math.exp(-5)), math.log(1 + 2 * math.exp(-7)), 0.0]
    torch.testing.assert_close(token_losses(logits, labels)[0].tolist(), want, rtol=1e-5, atol=1e-7)
    through_the_head = token_losses(logits, labels, layer=OutputLayer(torch.eye(3)))
    torch.testing.assert_close(through_the_head[0].tolist(), want, rtol=1e-5, atol=1e-7)
    assert shifted(labels).tolist() == [[1, 2, IGNORED]]
    assert labels.tolist() == [[0, 1, 2]]


def test_the_label_of_the_first_position_does_not_matter() -> None:
    other = LABELS.clone()
    other[:, 0] = IGNORED
    assert torch.equal(token_losses(logits_for(LABELS), LABELS), token_losses(logits_for(LABELS), other))


@pytest.mark.parametrize("weight", [None, torch.eye(3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_neither_overflow_nor_lose_the_gap(dtype: torch.dtype, weight: Tensor | None) -> None:
    labels = torch.tensor([[0, 1, 2]])
    states = torch.tensor([[[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 0.0]]], dtype=dtype).requires_grad_()
    losses = token_losses(states, labels, layer=None if weight is None else OutputLayer(weight.to(dtype)))
    gap = states[0, 0, 0].item() - states[0, 0, 1].item()
    torch.testing.assert_close(losses[0].tolist(), [gap, math.log(3), 0.0])
    gradient = gradients_of(losses.sum(), [states])[0][0].float()
    torch.testing.assert_close(gradient[0].tolist(), [1.0, -1.0, 0.0])
    torch.testing.assert_close(gradient[1].tolist(), [1 / 3, 1 / 3, -2 / 3], rtol=1e-2, atol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_no_prediction_in_the_whole_micro_batch(way: str, soft: bool) -> None:
    """The losses are zeros with a gradient of zeros: under ZeRO every rank must run the same backward."""
    labels = batch_of([SEQUENCES[1], SEQUENCES[4]])
    leaves = leaves_of(way, labels, torch.float32)
    losses = losses_of(leaves, labels, logits_for(labels, seed=9) if soft else None)
    assert losses.requires_grad and (losses == 0).all()
    for leaf, gradient in zip(leaves, gradients_of(losses.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and (gradient == 0).all()


@pytest.mark.parametrize("frozen", [[1], [2], [1, 2]])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: list[int]) -> None:
    trained = leaves_of("hidden+bias", LABELS, torch.float64)
    want = gradients_of(losses_of(trained, LABELS).sum(), trained)
    leaves = [leaf.detach().requires_grad_(number not in frozen) for number, leaf in enumerate(trained)]
    with Created() as created:
        losses_of(leaves, LABELS).sum().backward()
    for number, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (number in frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, want[number])
    assert ((V, H) in created.shapes) == (1 not in frozen)


def test_only_the_head_trains() -> None:
    leaves = leaves_of("hidden+bias", LABELS, torch.float64)
    want = gradients_of(losses_of(leaves, LABELS).sum(), leaves[1:])
    leaves[0] = leaves[0].detach()
    for mine, exact in zip(gradients_of(losses_of(leaves, LABELS).sum(), leaves[1:]), want, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize(("dtype", "soft"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_nothing_of_the_size_of_the_logits_is_ever_made(dtype: torch.dtype, soft: bool) -> None:
    """Vocabulary of 131072: from hidden states, forward and backward make no tensor of tokens x vocabulary elements."""
    vocabulary, tokens, width = 2**17, 136, 4
    assert vocabulary * tokens > module._CHUNK > vocabulary * width
    labels = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    hidden = random(1, tokens, width).to(dtype).requires_grad_()
    weight = random(vocabulary, width, seed=1, scale=1.0).to(dtype).requires_grad_()
    q = torch.zeros(1, 1, 1, dtype=dtype).expand(1, tokens, vocabulary) if soft else None
    with Created() as created:
        token_losses(hidden, labels, layer=OutputLayer(weight), teacher_logits=q).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (vocabulary, width) in created.shapes, "the weight's gradient was seen being made"
    assert created.largest <= module._CHUNK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits_only_their_gradient_has_their_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4 * V)
    logits = logits_for(LABELS, dtype=dtype).requires_grad_()
    with Created() as created:
        token_losses(logits, LABELS).sum().backward()
    large = [shape for shape in created.shapes if math.prod(shape) >= logits.numel()]
    assert large == [(LABELS.numel(), V)]


@pytest.mark.parametrize("chunk", [1, 3 * V, 2**24])
@pytest.mark.parametrize("dtype", ERRORS)
def test_entropies_equal_the_formula(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    logits = logits_for(LABELS, dtype=dtype)
    want = per_prediction(logits, LABELS, lambda log_p, *_: -(log_p.exp() @ log_p))
    predicted = shifted(LABELS) != IGNORED
    got = entropies(logits, LABELS)
    assert got.dtype == torch.promote_types(dtype, torch.float32) and (got[~predicted] == 0).all()
    flat = torch.stack([x for row in want for x in row])
    torch.testing.assert_close(got[predicted].double(), flat, rtol=ERRORS[dtype][0], atol=ERRORS[dtype][0])


def test_a_small_beta_is_not_lost_in_the_dtype_of_the_teachers_logits() -> None:
    """At 20 the next number of bf16 is 20.125: UNDIAL's target would not move if beta were taken off there."""
    labels, logits = torch.tensor([[0, 1]]), torch.tensor([[[20.0, 20.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    states = torch.zeros(1, 2, 2, requires_grad=True)
    token_losses(states, labels, teacher_logits=logits, logit_penalty=0.05).sum().backward()
    q = 1 / (1 + math.exp(0.05))  # of the token, lowered
    assert states.grad is not None
    torch.testing.assert_close(states.grad[0, 0].tolist(), [q - 0.5, 0.5 - q], rtol=1e-4, atol=0)
