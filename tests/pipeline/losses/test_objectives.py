"""Each loss and its gradient against the formulas in float64: from logits, from hidden states, however it is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.batches import IGNORED
from pipeline.losses.objectives import OBJECTIVES, LossInputs, steering_vector
from pipeline.modeling import token_losses as objectives
from pipeline.modeling.token_losses import token_losses
from tests.pipeline.losses.formulas import FORMULAS, flat, of_tokens
from tests.pipeline.modeling.predictions import (
    ERRORS,
    LABELS,
    MASK,
    SEQUENCES,
    WAYS,
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
    mask_of,
    per_prediction,
    random,
)

BETAS = (0.05, 1.0, 4.0)


PAIRED = ("dpo", "dpo_idk", "altpo", "flat")  # two answers to each prompt in a batch


FROM_TOKENS = [name for name, objective in OBJECTIVES.items() if not objective.hidden]


def nlls_from_formula(logits: Tensor, labels: Tensor) -> list[list[Tensor]]:
    return per_prediction(logits, labels, lambda log_p, token, *_: -log_p[token])


def softplus(x: Tensor) -> Tensor:
    """-log σ(-x), without overflow."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


@dataclass
class Setting:
    """The inputs of the objectives beside the trained model's own output."""

    beta: float
    delta: float = 0.3
    labels: Tensor = LABELS
    mask: Tensor = MASK
    rows: Sequence[int] = range(len(SEQUENCES))  # which of the rows of what follows are in this micro-batch

    def reference(self, name: str, dtype: torch.dtype) -> Tensor | None:
        asks, width = OBJECTIVES[name].reference, self.labels.shape[1]
        if asks == "log_probs":
            return torch.tensor([20.0, 0.0, 3.0, 7.0, 0.0, 5.0], dtype=torch.float64)[list(self.rows)]
        if asks is None:
            return None
        size, seed = (V, 5) if asks == "logits" else (H, 6)
        return random(len(SEQUENCES), 20, size, seed=seed)[list(self.rows), :width].to(dtype)

    @property
    def exponents(self) -> tuple[float, float]:
        return 1 + self.beta, 1.5 * self.beta

    @property
    def divergence(self) -> Any:
        return {0.05: "tv", 1.0: "kl"}.get(self.beta, "pearson")

    @property
    def steering(self) -> Tensor:
        return steering_vector(H, 6.5, seed=3)


def loss_from_formula(name: str, states: Tensor, setting: Setting, reference: Tensor | None) -> Tensor:
    """The mean over the batch; `states` are float64 logits, or hidden states where the objective reads those."""
    zero, labels, beta, delta = states.sum() * 0, setting.labels, setting.beta, setting.delta
    if name in ("rmu", "embed_diff"):
        goal = setting.steering.double().expand_as(states) if name == "rmu" else reference
        assert goal is not None
        terms = [(states[b, t] - goal[b, t].double()).square().sum() / H for b, t in setting.mask.nonzero().tolist()]
        return sum(terms, zero) / len(terms)
    if name in ("undial", "kl"):
        assert reference is not None
        z = reference.double()

        def against_reference(log_p: Tensor, token: int, number: int, at: int) -> Tensor:
            penalty = torch.zeros(V, dtype=torch.float64)
            penalty[token] = beta if name == "undial" else 0
            log_q = log_probabilities(z[number, at] - penalty)
            return log_q.exp() @ ((0 if name == "undial" else log_q) - log_p)

        terms = [x for row in per_prediction(states, labels, against_reference) for x in row]
        return sum(terms, zero) / len(terms)
    nlls = nlls_from_formula(states, labels)
    if name in FORMULAS:
        terms = of_tokens(name, states, labels, reference, setting.exponents)
        return sum(terms, zero) / len(terms)
    if name == "flat":
        return sum(flat(nlls, setting.divergence), zero) / (len(nlls) // 2)
    tokens = [nll for row in nlls for nll in row]
    if name in ("ga", "nll", "idk"):  # the labels of idk are those of refusals
        return (-1 if name == "ga" else 1) * sum(tokens, zero) / len(tokens)
    if name == "wga":
        return -sum((math.exp(-nll.item()) ** beta * nll for nll in tokens), zero) / len(tokens)
    totals = [sum(row, zero) for row in nlls]
    if name == "simnpo":
        margins = [(total / len(row) if row else total) - delta for total, row in zip(totals, nlls, strict=True)]
    else:
        assert reference is not None
        margins = [total - ref.double() for total, ref in zip(totals, reference, strict=True)]
        if name in PAIRED:  # log-ratio of the preferred answer, in the second half, less that of the other
            half = len(margins) // 2
            margins = [-preferred + other for other, preferred in zip(margins[:half], margins[half:], strict=True)]
        else:
            assert name == "npo"
    return sum((2 / beta * softplus(-beta * margin) for margin in margins), zero) / len(margins)


def ours(name: str, leaves: list[Tensor], setting: Setting, reference: Tensor | None) -> Tensor:
    """The sum of the terms of one micro-batch, as the program computes it."""
    objective, labels = OBJECTIVES[name], setting.labels
    teacher = reference if objective.reference == "logits" else None
    penalty = setting.beta if objective.logit_penalty else 0.0
    (beta1, beta2), kind = setting.exponents, setting.divergence
    more = {"reference": reference, "beta1": beta1, "beta2": beta2, "divergence": kind}
    inputs = LossInputs(labels, setting.mask, setting.beta, setting.delta, **more)
    if objective.hidden:
        return objective.terms(replace(inputs, hidden_states=leaves[0], steering=setting.steering))
    return objective.terms(replace(inputs, token_losses=losses_of(leaves, labels, teacher, penalty, objective.term)))


def count(name: str, setting: Setting) -> int:
    """The terms of the mean."""
    per = OBJECTIVES[name].normalize_by
    if per == "sequence":
        return len(setting.labels) // (2 if name in PAIRED else 1)
    return int(setting.mask.sum() if per == "position" else (setting.labels[:, 1:] != IGNORED).sum())


@pytest.mark.parametrize(
    ("name", "way"),  # an objective of hidden states reads no logits
    [(name, way) for name in OBJECTIVES for way in (("hidden",) if OBJECTIVES[name].hidden else WAYS)],
)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", ERRORS)
def test_loss_and_gradient_equal_the_formula(
    monkeypatch: pytest.MonkeyPatch, name: str, beta: float, dtype: torch.dtype, way: str
) -> None:
    monkeypatch.setattr(objectives, "_CHUNK", 2 * V)
    error, gradient_error = ERRORS[dtype]
    setting = Setting(beta)
    reference = setting.reference(name, dtype)
    leaves = leaves_of(way, LABELS, dtype)
    if OBJECTIVES[name].hidden:
        leaves = leaves[:1]
    loss = ours(name, leaves, setting, reference) / count(name, setting)
    exact, logits = exactly(leaves)  # of hidden states alone: themselves
    want = loss_from_formula(name, logits, setting, reference)
    assert loss.item() == pytest.approx(want.item(), rel=error, abs=error)
    assert_gradients_close(gradients_of(loss, leaves), gradients_of(want, exact), gradient_error)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [2, 4], [1], [5], [3]])
@pytest.mark.parametrize("way", ["logits", "hidden+bias"])
def test_the_cut_into_micro_batches_does_not_matter(name: str, cuts: list[int], way: str) -> None:
    """Neither the sum nor the gradients, although each micro-batch is padded to its own length."""
    leaves = leaves_of("hidden", LABELS, torch.float64)[:1]
    if not OBJECTIVES[name].hidden:
        leaves = leaves_of(way, LABELS, torch.float64)
    whole = Setting(0.5)
    total = ours(name, leaves, whole, whole.reference(name, torch.float64))
    pairs = len(SEQUENCES) // 2
    if name in PAIRED:
        cuts = [cut for cut in cuts if cut < pairs]
    parts = []
    for start, end in zip([0, *cuts], [*cuts, pairs if name in PAIRED else len(SEQUENCES)], strict=True):
        rows = [*range(start, end), *(range(pairs + start, pairs + end) if name in PAIRED else ())]
        mine = [SEQUENCES[row] for row in rows]
        part = Setting(0.5, labels=batch_of(mine), mask=mask_of(mine), rows=rows)
        states = leaves[0][rows, : part.labels.shape[1]]
        parts.append(ours(name, [states, *leaves[1:]], part, part.reference(name, torch.float64)))
    assert sum(part.item() for part in parts) == pytest.approx(total.item(), rel=1e-12)
    assert_gradients_close(gradients_of(torch.stack(parts).sum(), leaves), gradients_of(total, leaves), 1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_more_padding_changes_nothing(name: str) -> None:
    wide = Setting(0.5, labels=batch_of(SEQUENCES, width=13), mask=mask_of(SEQUENCES, width=13))
    width = H if OBJECTIVES[name].hidden else V
    states = torch.full((*wide.labels.shape, width), 50.0)
    narrow = random(*LABELS.shape, width)
    states[:, : LABELS.shape[1]] = narrow
    states[:, LABELS.shape[1] :, 3] = -50.0
    a = ours(name, [states], wide, wide.reference(name, torch.float32))
    b = ours(name, [narrow], Setting(0.5), Setting(0.5).reference(name, torch.float32))
    assert a.item() == pytest.approx(b.item(), rel=1e-6)


@pytest.mark.parametrize("name", FROM_TOKENS)
@pytest.mark.parametrize("alone", [SEQUENCES[1], SEQUENCES[4]])
def test_a_sequence_without_predicted_tokens_moves_nothing(name: str, alone: list[int | None]) -> None:
    """Its term is finite, its gradient 0, and it adds no token to the mean."""
    rows = [alone] * (2 if name in PAIRED else 1)
    setting = Setting(0.5, labels=batch_of(rows), mask=mask_of(rows), rows=[1, 4][: len(rows)])
    leaves = leaves_of("hidden", setting.labels, torch.float32)
    term = ours(name, leaves, setting, setting.reference(name, torch.float32))
    assert torch.isfinite(term)
    assert all((gradient == 0).all() for gradient in gradients_of(term, leaves))
    if OBJECTIVES[name].normalize_by == "token":
        assert term == 0 and count(name, setting) == 0


@pytest.mark.parametrize("beta", BETAS)
def test_npo_at_the_reference_is_the_gradient_of_ascent(beta: float) -> None:
    """Where nll = nll_ref the loss is (2/beta) log 2 and its gradient that of -nll, whatever beta."""
    setting = Setting(beta, labels=batch_of(SEQUENCES[:1]), mask=mask_of(SEQUENCES[:1]))
    logits = logits_for(setting.labels, dtype=torch.float64).requires_grad_()
    reference = token_losses(logits.detach(), setting.labels).sum(1)
    loss = ours("npo", [logits], setting, reference)
    assert loss.item() == pytest.approx(2 / beta * math.log(2), rel=1e-12)
    ascent = gradients_of(-token_losses(logits, setting.labels).sum(), [logits])
    assert_gradients_close(gradients_of(loss, [logits]), ascent, 1e-10)


def terms_of(states: Tensor, labels: Tensor, reference: Tensor | None, beta: float, delta: float = 0.0) -> LossInputs:
    return LossInputs(labels, torch.ones_like(labels), beta, delta, token_losses=states, reference=reference)


@pytest.mark.parametrize("name", ["npo", "simnpo", "dpo"])
def test_a_long_way_from_the_margin_the_loss_stays_finite(name: str) -> None:
    """log σ at ±10⁴: 0 once forgotten, linear (2 |margin|) before."""
    got = []
    for margin in (1e4, -1e4):
        losses, labels = torch.tensor([[margin, 0.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 1]])
        rows = 2 if name == "dpo" else 1
        reference = None if name == "simnpo" else torch.zeros(rows)
        got.append(OBJECTIVES[name].terms(terms_of(losses[:rows], labels[:rows], reference, 2.0)).item())
    assert got == pytest.approx([0.0, 2e4])


def test_simnpos_margin_is_inside_the_bracket() -> None:
    """-(2/β) log σ(β (nll/|x| - δ)): at nll/|x| = δ the value does not depend on δ, and it is not the token sum."""
    for delta in (0.5, 2.0):
        losses, labels = torch.tensor([[delta, delta, delta, 0.0]]), torch.tensor([[1, 1, 1, 1]])
        got = OBJECTIVES["simnpo"].terms(terms_of(losses, labels, None, 0.7, delta)).item()
        assert got == pytest.approx(2 / 0.7 * math.log(2), rel=1e-6)


def test_dpo_raises_the_second_half_and_lowers_the_first() -> None:
    losses = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]], requires_grad=True)
    labels = torch.ones(4, 2, dtype=torch.int64)
    loss = OBJECTIVES["dpo"].terms(terms_of(losses, labels, losses.detach().sum(1), 0.3))
    assert loss.item() == pytest.approx(2 * 2 / 0.3 * math.log(2), rel=1e-6)
    (gradient,) = gradients_of(loss, [losses])
    assert gradient[:, 0].tolist() == pytest.approx([-1.0, -1.0, 1.0, 1.0])


def test_wga_leaves_alone_what_is_forgotten() -> None:
    """The weight p^β is not differentiated: the gradient in the NLL is -p^β, not -p^β (1 - β nll)."""
    losses = torch.tensor([[0.1, 2.0, 50.0, 0.0]], requires_grad=True)
    loss = OBJECTIVES["wga"].terms(terms_of(losses, torch.ones(1, 4, dtype=torch.int64), None, 0.5))
    (gradient,) = gradients_of(loss, [losses])
    assert gradient[0, :3].tolist() == pytest.approx([-math.exp(-0.05), -math.exp(-1.0), -math.exp(-25.0)], rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("name", ["kl", "jsd"])
def test_at_the_reference_a_divergence_and_its_gradient_are_zero(name: str, way: str, dtype: torch.dtype) -> None:
    leaves = leaves_of(way, LABELS, dtype)
    reference = exactly(leaves)[1].detach().to(dtype)
    loss = ours(name, leaves, Setting(1.0), reference)
    rounding = 1e-13 if dtype == torch.float64 else 1e-5
    assert abs(loss.item()) < rounding
    assert all(gradient.abs().max() < rounding for gradient in gradients_of(loss, leaves))


def test_the_seed_decides_the_steering_vector() -> None:
    vector = steering_vector(64, 20.0, seed=4)
    assert vector.norm().item() == pytest.approx(20.0, rel=1e-6) and (vector >= 0).all()
    assert torch.equal(vector, steering_vector(64, 20.0, seed=4))
    assert not torch.equal(vector, steering_vector(64, 20.0, seed=5))


def test_what_each_objective_needs_and_counts() -> None:
    def where(what: Callable[[Any], bool]) -> set[str]:
        return {name for name, objective in OBJECTIVES.items() if what(objective)}

    assert where(lambda o: o.reference == "log_probs") == {"npo", "dpo", "dpo_idk", "altpo"}
    assert where(lambda o: o.reference == "logits") == {"undial", "kl", "jsd"}
    assert where(lambda o: o.logit_penalty) == {"undial"} and where(lambda o: o.has_target) == {"jensun"}
    assert where(lambda o: o.term) == {"ce_u", "pdu", "jsd"} and where(lambda o: o.weighs_retain) == {"pdu"}
    assert where(lambda o: o.reference == "hidden") == {"embed_diff"}
    assert where(lambda o: o.hidden) == where(lambda o: o.normalize_by == "position") == {"rmu", "embed_diff"}
    assert where(lambda o: o.normalize_by == "sequence") == {"npo", "simnpo", "dpo", "dpo_idk", "altpo", "flat"}
    assert {name: o.pairing for name, o in OBJECTIVES.items() if o.pairing} == {
        "dpo": "preferred", "altpo": "preferred", "dpo_idk": "refusal", "idk": "refusal", "flat": "refusal"
    }  # fmt: skip
    assert {name for name, o in OBJECTIVES.items() if o.num_answers == 2} == set(PAIRED)
