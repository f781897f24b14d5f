"""Terms of a prediction that are no cross-entropy: each with its value from all of the vocabulary, and its gradient.

`token_losses.py` computes the logits a part at a time, and calls these functions on each part: on some predictions with
the whole vocabulary in the forward pass, and on some vocabulary entries of all predictions in the backward pass. Two
numbers of each prediction, its state, go from one to the other, so that the gradient of a part needs no other part.

- `unlikelihood`: -log(1 - p) of the token y, log(1 + exp(z_y - s)) with s the logsumexp of the other logits. Computed
  so it is exact where 1 - p is less than a rounding, and log p has no digits left. Its gradient in z is p (e_y - q),
  with q the prediction without the token: the gradient of the cross-entropy with q as a fixed teacher (CE-U).
- `margin`: max z - mean z. Its gradient is e_k - 1/V with k the (first) largest logit.
- `jensen_shannon`: (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2 and a teacher's q. Its gradient is
  p (log(p/m) - KL(p||m)) / 2.

Shapes: n predictions, v vocabulary entries, V all of them. Logits are in fp32 or better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.config.objectives import Term


def terms_of_rows(term: Term, z: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """The terms of predictions with logits z [n, V].

    Args:
        targets: [n] int64, the tokens; for a negative one the term is not specified.
        teacher_logits: [n, V], for `jensen_shannon`.

    Returns:
        [n] the terms, [2, n] the state that `gradient_of_columns` needs.
    """
    if term == "unlikelihood":
        column = targets.clamp(min=0).unsqueeze(1)
        others = z.scatter(1, column, -math.inf).logsumexp(-1)
        gap = z.gather(1, column).squeeze(1) - others
        return torch.logaddexp(gap, torch.zeros_like(gap)), torch.stack([others, gap.sigmoid()])
    if term == "margin":
        largest, index = z.max(-1)
        state = torch.stack([index.to(z.dtype), torch.full_like(largest, 1 / z.shape[1])])  # exact below 2^24
        return largest - z.mean(-1), state
    assert teacher_logits is not None
    log_p, log_q = z.log_softmax(-1), teacher_logits.log_softmax(-1)
    divergence = (log_p.exp() * _log_p_over_m(log_q - log_p)).sum(-1)  # KL(p||m)
    other = (log_q.exp() * _log_p_over_m(log_p - log_q)).sum(-1)  # KL(q||m)
    return (divergence + other) / 2, torch.stack([z.logsumexp(-1), divergence])


def gradient_of_columns(
    term: Term, z: Tensor, start: int, targets: Tensor, log_q: Tensor | None, state: Tensor
) -> Tensor:
    """[n, v] the derivative of the terms by v columns of their logits.

    Args:
        z: [n, v], these columns.
        start: the vocabulary entry that the first of them belongs to.
        targets: [n] int64, the tokens.
        log_q: [n, v] these columns of the teacher's log-probabilities, for `jensen_shannon`.
        state: [2, n] as `terms_of_rows` returned it.
    """
    first, second = state.unsqueeze(2)
    if term == "jensen_shannon":
        assert log_q is not None
        log_p = z - first
        slope = _log_p_over_m(log_q - log_p).sub_(second)
        return log_p.exp_().mul_(slope).div_(2)
    if term == "margin":
        return one_hot(state[0].long() - start, z).sub_(second)
    own = one_hot(targets - start, z)
    others = (z - first).masked_fill_(own.bool(), -math.inf).exp_()
    return own.sub_(others).mul_(second)


def _log_p_over_m(ahead: Tensor) -> Tensor:
    """log(2 p / (p + q)) from log q - log p."""
    return math.log(2) - torch.logaddexp(ahead, torch.zeros((), dtype=ahead.dtype, device=ahead.device))


def one_hot(targets: Tensor, like: Tensor) -> Tensor:
    """[n, columns of `like`] with a 1 at each target that is among its columns."""
    inside = ((targets >= 0) & (targets < like.shape[1])).to(like.dtype)
    column = targets.clamp(0, like.shape[1] - 1)
    return torch.zeros_like(like).scatter_(1, column.unsqueeze(1), inside.unsqueeze(1))
