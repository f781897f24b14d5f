"""Membership inference: how familiar a text is to a model, and how well that tells two sets of texts apart."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MEMBERSHIP = ("loss", "zlib", "min_k", "min_k_plus")


def membership(
    text: str, ids: Tensor, logits: Tensor, *, lowest: float = 0.2, start: int = 1, end: int | None = None
) -> dict[str, float]:
    """Four scores of a text, each of which rises with its familiarity; NaN where no token is predicted.

    `loss`: mean log-likelihood a token. `zlib`: that by the bytes of the compressed text (Carlini et al. 2021).
    `min_k`: mean of the share `lowest` of the tokens' log-likelihoods (Shi et al. 2024). `min_k_plus`: the same of
    log-likelihoods less the mean of the predicted distribution, by its standard deviation (Zhang et al. 2025).

    Args:
        ids: [T] int64.
        logits: [T, V] float32; row t predicts token t + 1.
        start: the first token that counts; nothing predicts token 0.
        end: `min_k` and `min_k_plus` count tokens before it alone; None: all.
    """
    start = max(start, 1)
    if len(ids[start:end]) < 1:
        return dict.fromkeys(MEMBERSHIP, math.nan)
    log_p = logits[start - 1 : -1].log_softmax(dim=-1)
    p = log_p.exp()
    own = log_p.gather(1, ids[start:, None]).squeeze(1)
    mean = (p * log_p).sum(dim=1)
    variance = (p * (log_p - mean[:, None]).square()).sum(dim=1)
    # A uniform prediction has no variance, and own = mean.
    standardised = (own - mean) / variance.clamp_min(1e-12).sqrt()
    counted = len(ids[start:end])
    number = max(1, int(lowest * counted))
    likelihood = own.mean().item()
    return {
        "loss": likelihood,
        "zlib": likelihood / len(zlib.compress(text.encode())),
        "min_k": own[:counted].sort().values[:number].mean().item(),
        "min_k_plus": standardised[:counted].sort().values[:number].mean().item(),
    }


def auc(positives: list[float], negatives: list[float]) -> float:
    """The chance that one of `positives` is above one of `negatives`, a tie counting half (Mann-Whitney)."""
    from scipy.stats import rankdata

    ranks = rankdata([*positives, *negatives])[: len(positives)]
    above = float(ranks.sum()) - len(positives) * (len(positives) + 1) / 2
    return above / (len(positives) * len(negatives))
