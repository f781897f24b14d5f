"""Cross-entropy of tokens from hidden states, in pieces, without the logits ever whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batches import IGNORED

_CHUNK = 2**24  # logits looked at in fp32 at once


#
# With z the logits of a position: loss = logsumexp(z) - sum_v q_v z_v, and its gradient in z is softmax(z) - q.


class _FromLogits(torch.autograd.Function):
    """Of logits [N, V], a bounded number of rows in fp32 at a time in both directions.

    `torch.nn.functional.cross_entropy` on half-precision logits needs an fp32 copy of all of them; here only the
    gradient, in the logits' own dtype, has their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, soft: Tensor | None, lower: float) -> Tensor:
        ctx.save_for_backward(logits, targets, soft)
        ctx.lower = lower
        losses = logits.new_empty(len(targets), dtype=_wide_dtype(logits))
        for rows in _chunks(*logits.shape):
            q = None if soft is None else _penalized_teacher_logits(soft[rows], targets[rows], lower)
            losses[rows] = _cross_entropy(_wide(logits[rows]), targets[rows], q)
        return losses.masked_fill_(targets == IGNORED, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, soft = ctx.saved_tensors
        upstream = gradients[0].masked_fill(targets == IGNORED, 0)  # [N]
        gradient = torch.empty_like(logits)
        for rows in _chunks(*logits.shape):
            wrong = _wide(logits[rows]).softmax(-1)
            if soft is None:
                wrong -= _one_hot(targets[rows], wrong)
            else:
                wrong -= _penalized_teacher_logits(soft[rows], targets[rows], ctx.lower).softmax(-1)
            gradient[rows] = wrong.mul_(upstream[rows].unsqueeze(1)).to(gradient.dtype)
        return gradient, None, None, None


class _FromHidden(torch.autograd.Function):
    """Of hidden states [N, H] and the output layer's weight [V, H]: the logits never exist whole, in any dtype.

    Forward looks at some rows and the whole vocabulary at a time; backward computes the logits again, at all rows and
    some of the vocabulary, so that each row of the weight's gradient is one product and is rounded once. Of the soft
    targets, row `index[n]` belongs to hidden state n.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        soft: Tensor | None,
        index: Tensor,
        lower: float,
    ) -> Tensor:
        normalizers, losses = hidden.new_empty(2, len(hidden), dtype=_wide_dtype(hidden))
        for rows in _chunks(len(hidden), len(weight)):
            z = _wide(_logits(hidden[rows], weight, bias))
            normalizers[rows] = z.logsumexp(-1)
            q = None if soft is None else _penalized_teacher_logits(soft[index[rows]], targets[rows], lower)
            losses[rows] = _cross_entropy(z, targets[rows], q)
        ctx.save_for_backward(hidden, targets, soft, index, normalizers)
        ctx.lower = lower
        # The Parameter itself, not a saved tensor: under ZeRO-3 its data is gathered anew for the backward pass.
        ctx.weight, ctx.bias = weight, bias
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, soft, index, normalizers = ctx.saved_tensors
        (upstream,) = gradients  # [N]
        weight, bias = ctx.weight, ctx.bias
        grad_hidden = torch.zeros_like(hidden, dtype=_wide_dtype(hidden))
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        soft_normalizers = None if soft is None else _soft_normalizers(soft, index, targets, ctx.lower)
        for part in _chunks(len(weight), len(hidden)):
            wrong = _wide(_logits(hidden, weight[part], None if bias is None else bias[part]))
            wrong = wrong.sub_(normalizers.unsqueeze(1)).exp_()  # softmax, these columns of it
            if soft is None or soft_normalizers is None:
                wrong -= _one_hot(targets - part.start, wrong)
            else:
                q = _penalized_teacher_logits(soft[:, part][index], targets - part.start, ctx.lower)
                wrong -= q.sub_(soft_normalizers.unsqueeze(1)).exp_()
            wrong = wrong.mul_(upstream.unsqueeze(1)).to(hidden.dtype)
            grad_hidden += wrong @ weight[part]
            if grad_weight is not None:
                grad_weight[part] = wrong.T @ hidden
            if grad_bias is not None:
                grad_bias[part] = wrong.sum(0)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = hidden @ weight.T
    return product if bias is None else product + bias


def _cross_entropy(z: Tensor, targets: Tensor, soft: Tensor | None) -> Tensor:
    """[n] of logits z [n, V] and of q, in fp32 or better; rows whose target is IGNORED hold anything."""
    if soft is None:
        return F.cross_entropy(z, targets, reduction="none", ignore_index=IGNORED)
    return z.logsumexp(-1) - (soft.softmax(-1) * z).sum(-1)


def _one_hot(targets: Tensor, like: Tensor) -> Tensor:
    """[n, columns of `like`] with a 1 at each target that is among its columns."""
    inside = ((targets >= 0) & (targets < like.shape[1])).to(like.dtype)
    column = targets.clamp(0, like.shape[1] - 1)
    return torch.zeros_like(like).scatter_(1, column.unsqueeze(1), inside.unsqueeze(1))


def _soft_normalizers(soft: Tensor, index: Tensor, targets: Tensor, lower: float) -> Tensor:
    found = soft.new_empty(len(index), dtype=_wide_dtype(soft))
    for rows in _chunks(len(index), soft.shape[1]):
        found[rows] = _penalized_teacher_logits(soft[index[rows]], targets[rows], lower).logsumexp(-1)
    return found


def _penalized_teacher_logits(soft: Tensor, targets: Tensor, by: float) -> Tensor:
    """Some columns of the logits of q in fp32 or better, a copy; that of the target less `by`."""
    wide = soft.to(_wide_dtype(soft), copy=True)
    return wide.sub_(_one_hot(targets, wide), alpha=by) if by else wide


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _chunks(length: int, width: int) -> Iterator[slice]:
    """Of a [length, width] matrix: slices along its length that hold a bounded number of elements."""
    step = max(1, _CHUNK // max(width, 1))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def token_losses(
    states: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    soft: Tensor | None = None,
    lower: float = 0.0,
) -> Tensor:
    """Cross-entropy of each prediction: -log p of the token, or -sum_v q_v log p_v against soft targets.

    Args:
        states: [B, T, V] logits; or, with `weight`, [B, T, H] hidden states. Any float dtype.
        labels: [B, T] int64, the input ids with `IGNORED` where nothing is predicted; position t is predicted by t-1.
        weight, bias: [V, H] and [V], of the output layer that the hidden states go through.
        soft: [B, T, V] logits of q, without gradient.
        lower: what is taken off q's logit of each predicted token, in fp32 whatever the dtype of `soft` (UNDIAL).

    Returns:
        [B, T] in fp32 (float64 for float64 states): entry t belongs to the token at t+1, 0 where it is ignored.
    """
    targets, flat = shifted(labels), states.flatten(0, 1)
    q = None if soft is None else soft.flatten(0, 1)
    if weight is None:
        every: Any = _FromLogits.apply(flat, targets.flatten(), q, lower)
        return every.view(targets.shape)
    index = (targets.flatten() != IGNORED).nonzero().squeeze(1)  # padding and prompts cost nothing
    losses: Any = _FromHidden.apply(flat[index], weight, bias, targets.flatten()[index], q, index, lower)
    return losses.new_zeros(targets.numel()).index_copy(0, index, losses).view(targets.shape)


def entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T] entropy (nats) of softmax(logits) at the positions that predict a labelled token, 0 elsewhere."""
    targets, flat = shifted(labels), logits.flatten(0, 1)
    found = flat.new_empty(len(flat), dtype=_wide_dtype(flat))
    for rows in _chunks(*flat.shape):
        wide = _wide(flat[rows])
        found[rows] = _cross_entropy(wide, targets.flatten()[rows], wide)
    return found.masked_fill_(targets.flatten() == IGNORED, 0).view(targets.shape)


def shifted(labels: Tensor) -> Tensor:
    """[B, T] labels moved to the position that predicts them; the last position predicts nothing."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
