"""Terms of the plain loop that need more than the probability of one token, as their papers define them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def terms_of(name: str, model: Any, frozen: Any, ids: list[int], objective: dict[str, Any]) -> Tensor:
    """[len(ids) - 1] the term of each prediction, from all of its probabilities."""
    tokens = torch.tensor([ids])
    z = model(input_ids=tokens).logits[0, :-1].float()
    p = z.softmax(-1)
    if name == "ce_u":
        return -torch.log(1 - p.gather(1, tokens[0, 1:, None])[:, 0])
    if name == "pdu":
        return (z.max(-1).values - z.mean(-1)) ** 2
    if name == "jensun":
        target = objective["target_ids"]
        q = F.one_hot(torch.tensor([target[i % len(target)] for i in range(len(p))]), p.shape[1]).float()
    else:
        with torch.no_grad():
            q = frozen(input_ids=tokens).logits[0, :-1].float().softmax(-1)
    tiny = torch.finfo(p.dtype).tiny  # 0 log 0 = 0, also in the gradient
    log_p, log_q, log_m = (x.clamp_min(tiny).log() for x in (p, q, (p + q) / 2))
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2


def flat_term(answer: Tensor, refusal: Tensor, kind: str) -> Tensor:
    """Of the mean probabilities of the tokens of an answer to forget and of a refusal."""
    if kind == "tv":
        return (torch.tanh(answer) - torch.tanh(refusal)) / 2
    return (torch.exp(answer - 1) if kind == "kl" else answer**2 / 4 + answer) - refusal
