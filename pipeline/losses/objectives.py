"""Forget and retain losses: pure functions of token losses or hidden states (paper, section 2.2, and the wider field).

Each returns the SUM over its micro-batch of the terms whose mean over the GLOBAL batch is the loss; the caller divides
by the number of terms in the global batch, so the result does not depend on how that batch was split.

Shapes: B sequences, T tokens, V vocabulary entries, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batches import IGNORED
from pipeline.modeling.token_losses import _wide, entropies, shifted


@dataclass(frozen=True)
class LossInputs:
    """What an objective may look at, for one micro-batch of B sequences."""

    states: Tensor  # [B, T] token losses; or [B, T, H] hidden states after `layer`, for objectives that read those
    labels: Tensor  # [B, T]; 2B rows for preferences: B answers to forget, then the B to prefer
    mask: Tensor  # [B, T] attention mask: 1 on real tokens
    original: Tensor | None  # what the frozen original says of the batch, as `Objective.asks` names it
    beta: float
    delta: float
    steering: Tensor | None  # [H] c u, where RMU steers to

    @property
    def lengths(self) -> Tensor:
        """[B] predicted tokens per sequence, |x|."""
        return (shifted(self.labels) != IGNORED).sum(1)


def ga(terms: LossInputs) -> Tensor:
    """Gradient ascent: -NLL per token (paper, section 2.2, L_GA). Unbounded below."""
    return -terms.states.sum()


def wga(terms: LossInputs) -> Tensor:
    """Weighted gradient ascent: -p^beta NLL per token, the weight held fixed (Wang et al., ICLR 2025, WGA).

    A token that is already forgotten has p near 0 and is left alone.
    """
    return -((-terms.beta * terms.states.detach()).exp() * terms.states).sum()


def npo(terms: LossInputs) -> Tensor:
    """-(2/beta) log sigma(beta (nll(x) - nll_ref(x))) per sequence, sums over tokens (paper, section 2.2, L_NPO)."""
    assert terms.original is not None
    return _preference(terms.states.sum(1) - terms.original, terms.beta)


def dpo(terms: LossInputs) -> Tensor:
    """-(2/beta) log sigma(beta (log-ratio of the preferred answer - log-ratio of the answer to forget)) per sequence.

    Log-ratios are to the frozen original (Rafailov et al., 2023, as Zhang et al., 2024, section 3, use it to unlearn).
    `dpo_idk` is the same with a refusal preferred (Maini et al., 2024, call it preference optimization).
    """
    assert terms.original is not None
    rejected, preferred = (terms.states.sum(1) - terms.original).chunk(2)
    return _preference(rejected - preferred, terms.beta)


def simnpo(terms: LossInputs) -> Tensor:
    """-(2/beta) log sigma(beta (nll(x)/|x| - delta)) per sequence (paper, section 2.2, L_SimNPO).

    The paper writes the margin outside the bracket: its gamma is beta delta here.
    """
    return _preference(terms.states.sum(1) / terms.lengths.clamp(min=1) - terms.delta, terms.beta)


def _preference(margin: Tensor, beta: float) -> Tensor:
    return (-2 / beta * F.logsigmoid(beta * margin)).sum()


def nll(terms: LossInputs) -> Tensor:
    """Gradient descent on the retain set: NLL per token (paper, section 2.2, L_GD).

    `idk` is the same on refusals of the questions to forget (Maini et al., 2024, L_idk): see `Objective.replaces`.
    """
    return terms.states.sum()


def undial(terms: LossInputs) -> Tensor:
    """Cross-entropy per token with the original's prediction, its logit of the token lowered by beta.

    Self-distillation with adjusted logits (Dong et al., NAACL 2025, UNDIAL).
    """
    return terms.states.sum()


def kl(terms: LossInputs) -> Tensor:
    """KL(p_ref || p) per predicted token: the cross-entropy with p_ref less p_ref's own entropy."""
    assert terms.original is not None
    return (terms.states - entropies(terms.original, terms.labels)).sum()


def rmu(terms: LossInputs) -> Tensor:
    """||h(x) - c u||^2 / H per token, h the hidden state after a layer (Li et al., 2024, L_forget)."""
    assert terms.steering is not None
    return _squared_distance(terms, terms.steering)


def embed_diff(terms: LossInputs) -> Tensor:
    """||h(x) - h_ref(x)||^2 / H per token (Li et al., 2024, L_retain)."""
    assert terms.original is not None
    return _squared_distance(terms, terms.original)


def _squared_distance(terms: LossInputs, goal: Tensor) -> Tensor:
    square = (_wide(terms.states) - _wide(goal)).square().mean(-1)  # [B, T]
    return (square * terms.mask).sum()


def steering_vector(size: int, coefficient: float, seed: int) -> Tensor:
    """[size] c u: a fixed unit vector with entries from U[0, 1) before normalising (RMU), times the coefficient."""
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return coefficient * u / u.norm()


@dataclass(frozen=True)
class Objective:
    terms: Callable[[LossInputs], Tensor]  # sum over the micro-batch
    per: Literal["token", "sequence", "position"]  # what the mean over the global batch counts: predicted tokens, ...
    asks: Literal["likelihoods", "logits", "hidden"] | None = None  # of the frozen original
    hidden: bool = False  # reads hidden states after a layer; nothing beyond that layer is computed
    lowers: bool = False  # beta is taken off the original's logit of each predicted token
    pairing: Literal["preferred", "refusal"] | None = None  # a second answer to each prompt
    replaces: bool = False  # that second answer is the only one that the model sees

    @property
    def num_answers(self) -> int:
        """Sequences that the model sees for each one of a batch."""
        return 2 if self.pairing is not None and not self.replaces else 1


OBJECTIVES: dict[str, Objective] = {
    "ga": Objective(ga, "token"),
    "wga": Objective(wga, "token"),
    "npo": Objective(npo, "sequence", asks="likelihoods"),
    "simnpo": Objective(simnpo, "sequence"),
    "dpo": Objective(dpo, "sequence", asks="likelihoods", pairing="preferred"),
    "dpo_idk": Objective(dpo, "sequence", asks="likelihoods", pairing="refusal"),
    "idk": Objective(nll, "token", pairing="refusal", replaces=True),
    "undial": Objective(undial, "token", asks="logits", lowers=True),
    "rmu": Objective(rmu, "position", hidden=True),
    "nll": Objective(nll, "token"),
    "kl": Objective(kl, "token", asks="logits"),
    "embed_diff": Objective(embed_diff, "position", asks="hidden", hidden=True),
}
