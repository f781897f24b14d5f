"""Forget and retain losses: pure functions of token losses or hidden states (paper, section 2.2, and the wider field).

Each returns the SUM over its micro-batch of the terms whose mean over the GLOBAL batch is the loss; the caller divides
by the number of terms in the global batch, so the result does not depend on how that batch was split.

Shapes: B sequences, T tokens, V vocabulary entries, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.objectives import NEEDS, Needs
from pipeline.data.batches import IGNORED
from pipeline.modeling.token_losses import at_least_fp32, entropies, shifted


@dataclass(frozen=True)
class LossInputs:
    """What an objective computes its terms from, for one micro-batch of B sequences."""

    labels: Tensor  # [B, T]; 2B rows for a pairing: B answers to forget, then the B preferred ones
    mask: Tensor  # [B, T] attention mask: 1 on real tokens
    beta: float
    delta: float
    token_losses: Tensor | None = (
        None  # [B, T]; of an objective with a `term`: that of each prediction; or, for an objective with `hidden`:
    )
    hidden_states: Tensor | None = None  # [B, T, H] after `objective.layer`
    reference: Tensor | None = None  # what `Objective.reference` names, of the reference model for the same batch
    steering: Tensor | None = None  # [H] c u, the hidden state that RMU steers to
    beta1: float = 5.0
    beta2: float = 1.0
    divergence: Literal["tv", "kl", "pearson"] = "tv"

    @property
    def num_predicted_tokens(self) -> Tensor:
        """[B] predicted tokens per sequence, |x|."""
        return self.predicted.sum(1)

    @property
    def predicted(self) -> Tensor:
        """[B, T] whether the position predicts a token. Elsewhere `token_losses` is 0, and that is not p = 1."""
        return shifted(self.labels) != IGNORED


def ga(inputs: LossInputs) -> Tensor:
    """Gradient ascent: -NLL per token (paper, section 2.2, L_GA). Unbounded below."""
    assert inputs.token_losses is not None
    return -inputs.token_losses.sum()


def wga(inputs: LossInputs) -> Tensor:
    """Weighted gradient ascent: -p^beta NLL per token, the weight without gradient (Wang et al., ICLR 2025, WGA).

    A token that is already forgotten has p near 0 and hardly changes any more.
    """
    assert inputs.token_losses is not None
    return -((-inputs.beta * inputs.token_losses.detach()).exp() * inputs.token_losses).sum()


def satimp(inputs: LossInputs) -> Tensor:
    """-p^beta1 (1 - p)^beta2 NLL per token, the weight without gradient (Yang et al., 2025, SatImp).

    Neither what is forgotten (p near 0) nor what the model is sure of (p near 1) moves much.
    """
    assert inputs.token_losses is not None
    fixed = inputs.token_losses.detach()
    weight = (-inputs.beta1 * fixed).exp() * (-torch.expm1(-fixed)) ** inputs.beta2
    return -(weight * inputs.token_losses).sum()


def ce_u(inputs: LossInputs) -> Tensor:
    """-log(1 - p) per token, whose gradient is that of CE-U (Yang, 2025): see `modeling/token_terms.py`."""
    assert inputs.token_losses is not None
    return inputs.token_losses.sum()


def pdu(inputs: LossInputs) -> Tensor:
    """(max z - mean z)^2 per token, of its prediction's logits z (Entesari et al., 2025, the forget loss of PDU)."""
    assert inputs.token_losses is not None
    return inputs.token_losses.square().sum()


def jensun(inputs: LossInputs) -> Tensor:
    """JSD(p, e_y) per token, e_y one-hot at the token y of `objective.target` (Singh et al., 2025, JensUn).

    log 2 + (p log p - (1 + p) log(1 + p)) / 2 with p the probability of y: between 0 and log 2.
    """
    assert inputs.token_losses is not None
    nll = inputs.token_losses[inputs.predicted]
    p = (-nll).exp()
    return (math.log(2) - (nll * p + (1 + p) * p.log1p()) / 2).sum()


def flat(inputs: LossInputs) -> Tensor:
    """f(P(answer)) - g(P(refusal)) per pair, P the mean probability of an answer's tokens (Wang et al., 2025, FLAT).

    Minus the variational form of an f-divergence between refusals and answers: see `DIVERGENCES` for f and g.
    """
    assert inputs.token_losses is not None
    p = (-inputs.token_losses).exp() * inputs.predicted
    answer, refusal = (p.sum(1) / inputs.num_predicted_tokens.clamp(min=1)).chunk(2)
    conjugate, activation = DIVERGENCES[inputs.divergence]
    return (conjugate(answer) - activation(refusal)).sum()


# `objective.divergence`: the convex conjugate of the divergence after its activation, and the activation.
DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tv": (lambda p: p.tanh() / 2, lambda p: p.tanh() / 2),
    "kl": (lambda p: (p - 1).exp(), lambda p: p),
    "pearson": (lambda p: p.square() / 4 + p, lambda p: p),
}


def npo(inputs: LossInputs) -> Tensor:
    """-(2/beta) log sigma(beta (nll(x) - nll_ref(x))) per sequence, sums over tokens (paper, section 2.2, L_NPO)."""
    assert inputs.token_losses is not None and inputs.reference is not None
    return _preference(inputs.token_losses.sum(1) - inputs.reference, inputs.beta)


def dpo(inputs: LossInputs) -> Tensor:
    """-(2/beta) log sigma(beta (log-ratio of the preferred answer - log-ratio of the answer to forget)) per sequence.

    Log-ratios are to the reference model (Rafailov et al., 2023, as Zhang et al., 2024, section 3, use it to unlearn).
    `dpo_idk` is the same with a refusal preferred (Maini et al., 2024, call it preference optimization), `altpo` with
    an alternative answer, which the model may have written before (Mekala et al., 2024, AltPO).
    """
    assert inputs.token_losses is not None and inputs.reference is not None
    rejected, preferred = (inputs.token_losses.sum(1) - inputs.reference).chunk(2)
    return _preference(rejected - preferred, inputs.beta)


def simnpo(inputs: LossInputs) -> Tensor:
    """-(2/beta) log sigma(beta (nll(x)/|x| - delta)) per sequence (paper, section 2.2, L_SimNPO).

    The paper writes the margin outside the bracket: its gamma is beta delta here.
    """
    assert inputs.token_losses is not None
    mean_nll = inputs.token_losses.sum(1) / inputs.num_predicted_tokens.clamp(min=1)
    return _preference(mean_nll - inputs.delta, inputs.beta)


def _preference(margin: Tensor, beta: float) -> Tensor:
    return (-2 / beta * F.logsigmoid(beta * margin)).sum()


def nll(inputs: LossInputs) -> Tensor:
    """Gradient descent on the retain set: NLL per token (paper, section 2.2, L_GD).

    `idk` is the same on refusals of the questions to forget (Maini et al., 2024, L_idk): see `Needs.replaces`.
    """
    assert inputs.token_losses is not None
    return inputs.token_losses.sum()


def undial(inputs: LossInputs) -> Tensor:
    """Cross-entropy per token with the reference model's prediction, whose logit of the token is lowered by beta.

    Self-distillation with adjusted logits (Dong et al., NAACL 2025, UNDIAL).
    """
    assert inputs.token_losses is not None
    return inputs.token_losses.sum()


def kl(inputs: LossInputs) -> Tensor:
    """KL(p_ref || p) per predicted token: the cross-entropy with p_ref less p_ref's own entropy."""
    assert inputs.token_losses is not None and inputs.reference is not None
    return (inputs.token_losses - entropies(inputs.reference, inputs.labels)).sum()


def jsd(inputs: LossInputs) -> Tensor:
    """JSD(p, p_ref) per predicted token (Singh et al., 2025, the retain loss of JensUn)."""
    assert inputs.token_losses is not None
    return inputs.token_losses.sum()


def rmu(inputs: LossInputs) -> Tensor:
    """||h(x) - c u||^2 / H per token, h the hidden state after a layer (Li et al., 2024, L_forget)."""
    assert inputs.steering is not None
    return _squared_distance(inputs, inputs.steering)


def embed_diff(inputs: LossInputs) -> Tensor:
    """||h(x) - h_ref(x)||^2 / H per token (Li et al., 2024, L_retain)."""
    assert inputs.reference is not None
    return _squared_distance(inputs, inputs.reference)


def _squared_distance(inputs: LossInputs, goal: Tensor) -> Tensor:
    assert inputs.hidden_states is not None
    square = (at_least_fp32(inputs.hidden_states) - at_least_fp32(goal)).square().mean(-1)  # [B, T]
    return (square * inputs.mask).sum()


def steering_vector(size: int, coefficient: float, seed: int) -> Tensor:
    """[size] c u: a fixed unit vector with entries from U[0, 1) before normalising (RMU), times the coefficient."""
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return coefficient * u / u.norm()


@dataclass(frozen=True, kw_only=True)
class Objective(Needs):
    """A loss and what it needs."""

    terms: Callable[[LossInputs], Tensor]  # sum over the micro-batch


TERMS: dict[str, Callable[[LossInputs], Tensor]] = {
    "ga": ga,
    "wga": wga,
    "satimp": satimp,
    "ce_u": ce_u,
    "npo": npo,
    "simnpo": simnpo,
    "dpo": dpo,
    "dpo_idk": dpo,
    "altpo": dpo,
    "flat": flat,
    "idk": nll,
    "jensun": jensun,
    "pdu": pdu,
    "undial": undial,
    "rmu": rmu,
    "nll": nll,
    "kl": kl,
    "jsd": jsd,
    "embed_diff": embed_diff,
}

OBJECTIVES = {name: Objective(**vars(needs), terms=TERMS[name]) for name, needs in NEEDS.items()}
