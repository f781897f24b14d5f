"""Forget and retain losses: pure functions of token negative log-likelihoods (paper, section 2.2).

Each returns the SUM over its micro-batch of the terms whose mean over the GLOBAL batch is the loss; the caller divides
by the number of terms in the global batch, so the result does not depend on how that batch was split.

Shapes: B sequences, T tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # label of a position that predicts nothing (padding, or masked by the data)
_CHUNK = 2**24  # logits looked at in fp32 at once


class _TokenNLL(torch.autograd.Function):
    """Cross-entropy per row of logits [N, V] in fp32, a bounded number of rows at a time in both directions.

    `torch.nn.functional.cross_entropy` on half-precision logits needs an fp32 copy of all of them; here only the
    gradient, in the logits' own dtype, has their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        nll = torch.empty(targets.shape, dtype=dtype, device=logits.device)
        for rows in _row_chunks(logits):
            nll[rows] = F.cross_entropy(logits[rows].to(dtype), targets[rows], ignore_index=IGNORED, reduction="none")
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        (upstream,) = gradients  # [N]
        gradient = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            wrong = logits[rows].to(upstream.dtype).softmax(-1)  # p - onehot(target), row by row
            target = targets[rows].clamp(min=0).unsqueeze(1)
            wrong.scatter_add_(1, target, torch.full_like(target, -1, dtype=wrong.dtype))
            counts = (targets[rows] != IGNORED) * upstream[rows]
            gradient[rows] = wrong.mul_(counts.unsqueeze(1)).to(gradient.dtype)
        return gradient, None


def _row_chunks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each predicted token.

    Args:
        logits: [B, T, V], any float dtype.
        labels: [B, T] int64, the input ids with `IGNORED` where nothing is predicted; position t is predicted by t-1.

    Returns:
        [B, T] in fp32 (float64 for float64 logits): entry t belongs to the token at t+1, 0 where it is ignored.
    """
    targets = shifted(labels)
    return _TokenNLL.apply(logits.flatten(0, 1), targets.flatten()).view(targets.shape)  # pyright: ignore


def shifted(labels: Tensor) -> Tensor:
    """[B, T] labels moved to the position that predicts them; the last position predicts nothing."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


@dataclass(frozen=True)
class Terms:
    """What an objective may look at, for one micro-batch."""

    nll: Tensor  # [B, T], from `token_nll`
    lengths: Tensor  # [B] predicted tokens per sequence, |x|
    reference: Tensor | None  # [B] nll_ref(x) of the frozen original model; None unless the objective asks for it
    beta: float
    delta: float


def ga(terms: Terms) -> Tensor:
    """Gradient ascent: -NLL per token (paper, section 2.2, L_GA). Unbounded below."""
    return -terms.nll.sum()


def npo(terms: Terms) -> Tensor:
    """-(2/beta) log sigma(beta (nll(x) - nll_ref(x))) per sequence, sums over tokens (paper, section 2.2, L_NPO)."""
    assert terms.reference is not None
    margin = terms.nll.sum(1) - terms.reference
    return (-2 / terms.beta * F.logsigmoid(terms.beta * margin)).sum()


def simnpo(terms: Terms) -> Tensor:
    """-(2/beta) log sigma(beta (nll(x)/|x| - delta)) per sequence (paper, section 2.2, L_SimNPO).

    The paper writes the margin outside the bracket: its gamma is beta delta here.
    """
    mean = terms.nll.sum(1) / terms.lengths.clamp(min=1)
    return (-2 / terms.beta * F.logsigmoid(terms.beta * (mean - terms.delta))).sum()


def nll(terms: Terms) -> Tensor:
    """Gradient descent on the retain set: NLL per token (paper, section 2.2, L_GD)."""
    return terms.nll.sum()


@dataclass(frozen=True)
class Objective:
    terms: Callable[[Terms], Tensor]  # sum over the micro-batch
    per: Literal["token", "sequence"]  # what the mean over the global batch counts
    needs_reference: bool = False


OBJECTIVES: dict[str, Objective] = {
    "ga": Objective(ga, "token"),
    "npo": Objective(npo, "sequence", needs_reference=True),
    "simnpo": Objective(simnpo, "sequence"),
    "nll": Objective(nll, "token"),
}
