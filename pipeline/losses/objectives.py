"""Forget and retain losses: pure functions of token losses or hidden states (paper, section 2.2, and the wider field).

Each returns the SUM over its micro-batch of the terms whose mean over the GLOBAL batch is the loss; the caller divides
by the number of terms in the global batch, so the result does not depend on how that batch was split.

Shapes: B sequences, T tokens, V vocabulary entries, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    token_losses: Tensor | None = None  # [B, T]; or, for an objective with `hidden`:
    hidden_states: Tensor | None = None  # [B, T, H] after `objective.layer`
    reference: Tensor | None = None  # what `Objective.reference` names, of the reference model for the same batch
    steering: Tensor | None = None  # [H] c u, the hidden state that RMU steers to

    @property
    def num_predicted_tokens(self) -> Tensor:
        """[B] predicted tokens per sequence, |x|."""
        return (shifted(self.labels) != IGNORED).sum(1)


def ga(inputs: LossInputs) -> Tensor:
    """Gradient ascent: -NLL per token (paper, section 2.2, L_GA). Unbounded below."""
    assert inputs.token_losses is not None
    return -inputs.token_losses.sum()


def wga(inputs: LossInputs) -> Tensor:
    """Weighted gradient ascent: -p^beta NLL per token, the weight held fixed (Wang et al., ICLR 2025, WGA).

    A token that is already forgotten has p near 0 and hardly changes any more.
    """
    assert inputs.token_losses is not None
    return -((-inputs.beta * inputs.token_losses.detach()).exp() * inputs.token_losses).sum()


def npo(inputs: LossInputs) -> Tensor:
    """-(2/beta) log sigma(beta (nll(x) - nll_ref(x))) per sequence, sums over tokens (paper, section 2.2, L_NPO)."""
    assert inputs.token_losses is not None and inputs.reference is not None
    return _preference(inputs.token_losses.sum(1) - inputs.reference, inputs.beta)


def dpo(inputs: LossInputs) -> Tensor:
    """-(2/beta) log sigma(beta (log-ratio of the preferred answer - log-ratio of the answer to forget)) per sequence.

    Log-ratios are to the reference model (Rafailov et al., 2023, as Zhang et al., 2024, section 3, use it to unlearn).
    `dpo_idk` is the same with a refusal preferred (Maini et al., 2024, call it preference optimization).
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
    "npo": npo,
    "simnpo": simnpo,
    "dpo": dpo,
    "dpo_idk": dpo,
    "idk": nll,
    "undial": undial,
    "rmu": rmu,
    "nll": nll,
    "kl": kl,
    "embed_diff": embed_diff,
}

OBJECTIVES = {name: Objective(**vars(needs), terms=TERMS[name]) for name, needs in NEEDS.items()}
