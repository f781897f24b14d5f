"""Paper, section 2.2: each loss and its gradient against the formulas in float64, however the batch is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline import objectives
from pipeline.objectives import IGNORED, OBJECTIVES, Terms, shifted, token_nll

V = 11  # vocabulary
BETAS = (0.05, 1.0, 4.0)

# Token ids per sequence; `None` is a label that the data masks. Right-padded when they meet in a batch.
SEQUENCES: list[list[int | None]] = [
    [3, 1, 4, 1, 5, 9],
    [2],  # one token predicts nothing
    [6, 5],
    [3, None, None, 8, 9],
    [7, None, None],  # two positions, none of them predicted
    [0, 0, 10, 0],  # 0 is a token like any other
]


def batch_of(rows: Sequence[list[int | None]], width: int | None = None) -> Tensor:
    """[B, T] labels."""
    width = width or max(map(len, rows))
    return torch.tensor(
        [[IGNORED if token is None else token for token in row] + [IGNORED] * (width - len(row)) for row in rows]
    )


def logits_for(labels: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*labels.shape, V, generator=dice)).to(dtype)


def nlls_from_formula(logits: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """Per sequence the list of -log p of its predicted tokens: log Σ exp(z) - z_target, in float64, one at a time."""
    found: list[list[Tensor]] = []
    for row, tokens in zip(logits.double(), labels.tolist(), strict=True):
        mine = []
        for before, token in zip(row[:-1], tokens[1:], strict=True):
            if token != IGNORED:
                top = before.detach().max()
                mine.append((before - top).exp().sum().log() + top - before[token])
        found.append(mine)
    return found


def softplus(x: Tensor) -> Tensor:
    """-log σ(-x), without overflow."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


def loss_from_formula(
    name: str, logits: Tensor, labels: Tensor, reference: Tensor | None, beta: float, delta: float
) -> Tensor:
    """The loss over the whole batch as the paper writes it, section 2.2. -log σ(x) is softplus(-x)."""
    nlls = nlls_from_formula(logits, labels)
    tokens = [nll for row in nlls for nll in row]
    zero = logits.double().sum() * 0
    if name in ("ga", "nll"):
        return (-1 if name == "ga" else 1) * sum(tokens, zero) / len(tokens)
    terms = []
    for number, row in enumerate(nlls):
        total = sum(row, zero)
        if name == "npo":
            assert reference is not None
            margin = total - reference[number].double()
        else:
            assert name == "simnpo"
            margin = (total / len(row) if row else total) - delta
        terms.append(2 / beta * softplus(-beta * margin))
    return sum(terms, zero) / len(terms)


def ours(name: str, logits: Tensor, labels: Tensor, reference: Tensor | None, beta: float, delta: float) -> Tensor:
    """The sum of the terms of one micro-batch."""
    lengths = (labels[:, 1:] != IGNORED).sum(1)
    return OBJECTIVES[name].terms(Terms(token_nll(logits, labels), lengths, reference, beta, delta))


def count(name: str, labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum()) if OBJECTIVES[name].per == "token" else len(labels)


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


REFERENCE = torch.tensor([20.0, 0.0, 3.0, 7.0, 0.0, 5.0])


# ---------------------------------------------------------------------------------------------------------------------
# token_nll


@pytest.mark.parametrize("chunk", [1, V, 3 * V + 1, 2**24])
@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"),
    [(torch.float64, 1e-13, 1e-14), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 2**-8)],
)
def test_token_nll_equals_the_formula(
    monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype, value_error: float, gradient_error: float
) -> None:
    """Value to fp32 accuracy even for bf16 logits, gradient to the accuracy of the logits' own dtype."""
    monkeypatch.setattr(objectives, "_CHUNK", chunk)
    labels = batch_of(SEQUENCES)
    logits = logits_for(labels, dtype=dtype).requires_grad_()
    got = token_nll(logits, labels)
    assert got.shape == labels.shape and got.dtype == torch.promote_types(dtype, torch.float32)
    exact = logits.detach().double().requires_grad_()
    want = nlls_from_formula(exact, labels)
    targets = shifted(labels)
    for row, predicted, expected in zip(got, targets != IGNORED, want, strict=True):
        assert (row[~predicted] == 0).all()
        torch.testing.assert_close(
            row[predicted].tolist(), [x.item() for x in expected], rtol=value_error, atol=value_error
        )
    upstream = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype) - 0.5
    gradient = gradient_of((got * upstream).sum(), logits)
    weights = [u[p].double() for u, p in zip(upstream, targets != IGNORED, strict=True)]
    loss = sum(w @ torch.stack(x) for w, x in zip(weights, want, strict=True) if x)
    assert isinstance(loss, Tensor)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.double(), gradient_of(loss, exact), rtol=gradient_error, atol=min(gradient_error, 1e-6)
    )
    assert (gradient[targets == IGNORED] == 0).all()


@pytest.mark.parametrize("chunk", [1, 2 * V, 2**24])
def test_token_nll_gradient_by_finite_differences(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(objectives, "_CHUNK", chunk)
    labels = batch_of(SEQUENCES[:3])
    logits = logits_for(labels, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_nll(z, labels), (logits,))


def test_a_position_is_predicted_by_the_one_before_it() -> None:
    """By hand: the first row of logits speaks about the second token, the last about nothing."""
    labels = torch.tensor([[0, 1, 2]])
    logits = torch.zeros(1, 3, 3)
    logits[0, 0, 1], logits[0, 1, 2], logits[0, 2, 0] = 5.0, 7.0, 9.0
    want = [math.log(1 + 2 * math.exp(-5)), math.log(1 + 2 * math.exp(-7)), 0.0]
    torch.testing.assert_close(token_nll(logits, labels)[0].tolist(), want, rtol=1e-5, atol=1e-7)
    assert shifted(labels).tolist() == [[1, 2, IGNORED]]
    assert labels.tolist() == [[0, 1, 2]]


def test_the_label_of_the_first_position_does_not_matter() -> None:
    labels = batch_of(SEQUENCES)
    other = labels.clone()
    other[:, 0] = IGNORED
    assert torch.equal(token_nll(logits_for(labels), labels), token_nll(logits_for(labels), other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_neither_overflow_nor_lose_the_gap(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 1, 2]])
    logits = torch.tensor([[[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 0.0]]], dtype=dtype).requires_grad_()
    nll = token_nll(logits, labels)
    gap = logits[0, 0, 0].item() - logits[0, 0, 1].item()
    torch.testing.assert_close(nll[0].tolist(), [gap, math.log(3), 0.0])
    gradient = gradient_of(nll.sum(), logits)[0].float()
    torch.testing.assert_close(gradient[0].tolist(), [1.0, -1.0, 0.0])
    torch.testing.assert_close(gradient[1].tolist(), [1 / 3, 1 / 3, -2 / 3], rtol=1e-2, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The losses


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("dtype", "error", "gradient_error"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 2**-7)],
)
def test_loss_and_gradient_equal_the_formula(
    monkeypatch: pytest.MonkeyPatch, name: str, beta: float, dtype: torch.dtype, error: float, gradient_error: float
) -> None:
    monkeypatch.setattr(objectives, "_CHUNK", 2 * V)
    labels, delta = batch_of(SEQUENCES), 0.3
    logits = logits_for(labels, dtype=dtype).requires_grad_()
    reference = REFERENCE.double() if OBJECTIVES[name].needs_reference else None
    loss = ours(name, logits, labels, reference, beta, delta) / count(name, labels)
    exact = logits.detach().double().requires_grad_()
    want = loss_from_formula(name, exact, labels, reference, beta, delta)
    assert loss.item() == pytest.approx(want.item(), rel=error)
    expected = gradient_of(want, exact)
    atol = gradient_error * expected.abs().max().item() / 10
    torch.testing.assert_close(gradient_of(loss, logits).double(), expected, rtol=gradient_error, atol=atol)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [2, 4], [1], [5], [3]])
def test_the_cut_into_micro_batches_does_not_matter(name: str, cuts: list[int]) -> None:
    """Neither the sum nor the gradient, although each micro-batch is padded to its own length."""
    whole = batch_of(SEQUENCES)
    logits = logits_for(whole, dtype=torch.float64).requires_grad_()
    reference = REFERENCE.double()
    total = ours(name, logits, whole, reference, 0.5, 0.1)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(SEQUENCES)], strict=True):
        labels = batch_of(SEQUENCES[start:end])
        parts.append(ours(name, logits[start:end, : labels.shape[1]], labels, reference[start:end], 0.5, 0.1))
    assert sum(part.item() for part in parts) == pytest.approx(total.item(), rel=1e-12)
    together = gradient_of(torch.stack(parts).sum(), logits)
    torch.testing.assert_close(together, gradient_of(total, logits), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_more_padding_changes_nothing(name: str) -> None:
    narrow, wide = batch_of(SEQUENCES), batch_of(SEQUENCES, width=13)
    logits = torch.full((*wide.shape, V), 50.0)
    logits[:, : narrow.shape[1]] = logits_for(narrow)
    logits[:, narrow.shape[1] :, 3] = -50.0
    a = ours(name, logits, wide, REFERENCE, 0.5, 0.1)
    b = ours(name, logits_for(narrow), narrow, REFERENCE, 0.5, 0.1)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("alone", [SEQUENCES[1], SEQUENCES[4]])
def test_a_sequence_without_predicted_tokens_moves_nothing(name: str, alone: list[int | None]) -> None:
    """Its term is finite, its gradient 0, and it adds no token to the mean."""
    labels = batch_of([alone])
    logits = logits_for(labels).requires_grad_()
    term = ours(name, logits, labels, torch.zeros(1), 0.5, 0.1)
    assert torch.isfinite(term)
    assert (gradient_of(term, logits) == 0).all()
    if OBJECTIVES[name].per == "token":
        assert term == 0 and count(name, labels) == 0


@pytest.mark.parametrize("beta", BETAS)
def test_npo_at_the_reference_is_the_gradient_of_ascent(beta: float) -> None:
    """Where nll = nll_ref the loss is (2/beta) log 2 and its gradient that of -nll, whatever beta."""
    labels = batch_of(SEQUENCES[:1])
    logits = logits_for(labels, dtype=torch.float64).requires_grad_()
    reference = token_nll(logits.detach(), labels).sum(1)
    loss = ours("npo", logits, labels, reference, beta, 0.0)
    assert loss.item() == pytest.approx(2 / beta * math.log(2), rel=1e-12)
    ascent = gradient_of(-token_nll(logits, labels).sum(), logits)
    torch.testing.assert_close(gradient_of(loss, logits), ascent, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["npo", "simnpo"])
def test_a_long_way_from_the_margin_the_loss_stays_finite(name: str) -> None:
    """log σ at ±10⁴: 0 once forgotten, linear (2 |margin|) before."""
    nll, lengths = torch.tensor([[1e4], [0.0]]), torch.tensor([1, 1])
    reference, delta = torch.tensor([0.0, 1e4]), 0.0 if name == "npo" else 1e4
    if name == "simnpo":
        nll = nll * 2  # margins of 1e4 and -1e4, as for npo
    got = [
        OBJECTIVES[name].terms(Terms(nll[i : i + 1], lengths[i : i + 1], reference[i : i + 1], 2.0, delta)).item()
        for i in (0, 1)
    ]
    assert got == pytest.approx([0.0, 2e4])


def test_simnpos_margin_is_inside_the_bracket() -> None:
    """-(2/β) log σ(β (nll/|x| - δ)): at nll/|x| = δ the value does not depend on δ, and it is not the token sum."""
    for delta in (0.5, 2.0):
        nll, lengths = torch.tensor([[delta, delta, delta, 0.0]]), torch.tensor([3])
        got = OBJECTIVES["simnpo"].terms(Terms(nll, lengths, None, 0.7, delta)).item()
        assert got == pytest.approx(2 / 0.7 * math.log(2), rel=1e-6)


def test_what_each_objective_needs_and_counts() -> None:
    """NPO alone looks at the frozen original; NPO and SimNPO are means over sequences."""
    assert {name for name, objective in OBJECTIVES.items() if objective.needs_reference} == {"npo"}
    assert {name for name, objective in OBJECTIVES.items() if objective.per == "sequence"} == {"npo", "simnpo"}
