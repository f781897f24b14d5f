"""Cross-entropy of tokens from logits, or from hidden states without the whole matrix of logits.

With z the logits of a position and q the distribution that its prediction is compared with (one-hot, or a teacher's):
loss = logsumexp(z) - sum_v q_v z_v, and its gradient in z is softmax(z) - q. Instead, an objective may need another
term of each prediction: those of `token_terms.py`.

Shapes: B sequences, T tokens, V vocabulary entries, H hidden width; N predictions, M = B T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.objectives import Term
from pipeline.data.batches import IGNORED
from pipeline.modeling.token_terms import gradient_of_columns, one_hot, terms_of_rows

_CHUNK = 2**24  # logits that are in fp32 at one time


class _Context(Protocol):
    """What autograd carries from forward to backward; torch's own type has no attributes of its user."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    penalty: float
    term: Term | None
    layer: OutputLayer

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


@dataclass(frozen=True)
class OutputLayer:
    """The layer that turns hidden states into logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    divert: Callable[[nn.Parameter, Tensor], None] | None = None  # gets the gradients of the two, if not autograd does

    def hand_over(self, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """What autograd gets of the gradients of weight and bias."""
        if self.divert is None:
            return gradients
        for parameter, gradient in zip((self.weight, self.bias), gradients, strict=True):
            if gradient is not None:
                assert isinstance(parameter, nn.Parameter)
                self.divert(parameter, gradient)
        return None, None


@dataclass(frozen=True)
class _Teacher:
    """q as logits: softmax of `logits`, of which the entry of the target is lowered by `penalty` first."""

    logits: Tensor  # [M, V], without gradient
    index: Tensor | None  # [N], the row of `logits` that belongs to each prediction; None: N is M, in the same order
    penalty: float

    def of_rows(self, rows: slice, targets: Tensor) -> Tensor:
        """[n, V] logits of q for predictions `rows`."""
        found = self.logits[rows if self.index is None else self.index[rows]]
        return _penalized_teacher_logits(found, targets[rows], self.penalty)

    def of_columns(self, part: slice, targets: Tensor) -> Tensor:
        """[N, v] of the logits of q, for the vocabulary entries `part`."""
        found = self.logits[:, part]
        found = found if self.index is None else found[self.index]
        return _penalized_teacher_logits(found, targets - part.start, self.penalty)

    def normalizers(self, targets: Tensor) -> Tensor:
        """[N] logsumexp of the logits of q."""
        found = self.logits.new_empty(len(targets), dtype=_wide_dtype(self.logits))
        for rows in _chunks(len(targets), self.logits.shape[1]):
            found[rows] = self.of_rows(rows, targets).logsumexp(-1)
        return found

    @staticmethod
    def save(ctx: _Context, teacher: _Teacher | None, *others: Tensor) -> None:
        """Save for the backward pass of an autograd function, so that autograd frees the logits right after it."""
        ctx.penalty = 0.0 if teacher is None else teacher.penalty
        tensors = (None, None) if teacher is None else (teacher.logits, teacher.index)
        ctx.save_for_backward(*tensors, *others)

    @staticmethod
    def restore(ctx: _Context) -> tuple[_Teacher | None, list[Tensor]]:
        """(teacher, other tensors) as `save` got them."""
        logits, index, *others = ctx.saved_tensors
        return None if logits is None else _Teacher(logits, index, ctx.penalty), others


class _FromLogits(torch.autograd.Function):
    """Losses of logits [N, V], with a bounded number of rows in fp32 at one time in both directions.

    `torch.nn.functional.cross_entropy` on half-precision logits needs an fp32 copy of all of them; here only the
    gradient, in the logits' own dtype, has their size.
    """

    @staticmethod
    def forward(ctx: _Context, logits: Tensor, targets: Tensor, teacher: _Teacher | None, term: Term | None) -> Tensor:
        _Teacher.save(ctx, teacher, logits, targets)
        ctx.term = term
        losses = logits.new_empty(len(targets), dtype=_wide_dtype(logits))
        for rows in _chunks(*logits.shape, term=term):
            q = None if teacher is None else teacher.of_rows(rows, targets)
            z = at_least_fp32(logits[rows])
            if term is None:
                losses[rows] = _cross_entropy(z, targets[rows], q)
            else:
                losses[rows], _ = terms_of_rows(term, z, targets[rows], q)
        return losses.masked_fill_(targets == IGNORED, 0)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        teacher, (logits, targets) = _Teacher.restore(ctx)
        upstream = gradients[0].masked_fill(targets == IGNORED, 0)  # [N]
        gradient = torch.empty_like(logits)
        for rows in _chunks(*logits.shape, term=ctx.term):
            z, q = at_least_fp32(logits[rows]), None if teacher is None else teacher.of_rows(rows, targets)
            if ctx.term is not None:
                _, state = terms_of_rows(ctx.term, z, targets[rows], q)
                log_q = None if q is None else q.log_softmax(-1)
                difference = gradient_of_columns(ctx.term, z, 0, targets[rows], log_q, state)
                difference.masked_fill_((targets[rows] == IGNORED).unsqueeze(1), 0)  # it may be infinite there
            else:
                difference = z.softmax(-1)
                difference -= one_hot(targets[rows], difference) if q is None else q.softmax(-1)
            gradient[rows] = difference.mul_(upstream[rows].unsqueeze(1)).to(gradient.dtype)
        return gradient, None, None, None


class _FromHidden(torch.autograd.Function):
    """Losses of hidden states [N, H] through an output layer's weight [V, H]; the logits never exist whole.

    Forward computes the logits of some rows and the whole vocabulary at one time. Backward computes them again, for
    all rows and some of the vocabulary, so that each row of the weight's gradient is one product and is rounded once.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        targets: Tensor,
        teacher: _Teacher | None,
        term: Term | None,
        layer: OutputLayer,
        *parameters: Tensor | None,
    ) -> Tensor:
        """parameters: those of the layer, for autograd to know of; the layer has them too."""
        weight, bias = layer.weight, layer.bias
        losses = hidden.new_empty(len(hidden), dtype=_wide_dtype(hidden))
        state = losses.new_empty(1 if term is None else 2, len(hidden))  # the normalizers, or of the term
        for rows in _chunks(len(hidden), len(weight), term=term):
            z = at_least_fp32(_logits(hidden[rows], weight, bias))
            q = None if teacher is None else teacher.of_rows(rows, targets)
            if term is None:
                losses[rows], state[0, rows] = _cross_entropy(z, targets[rows], q), z.logsumexp(-1)
            else:
                losses[rows], state[:, rows] = terms_of_rows(term, z, targets[rows], q)
        _Teacher.save(ctx, teacher, hidden, targets, state)
        ctx.term = term
        # The Parameters themselves, not saved tensors: under ZeRO-3 their data is gathered again for the backward pass.
        ctx.layer = layer
        return losses

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        teacher, (hidden, targets, state) = _Teacher.restore(ctx)
        (upstream,) = gradients  # [N]
        weight, bias = ctx.layer.weight, ctx.layer.bias
        grad_hidden = torch.zeros_like(hidden, dtype=_wide_dtype(hidden))
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[5] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[6] else None
        teacher_normalizers = None if teacher is None else teacher.normalizers(targets)
        for part in _chunks(len(weight), len(hidden), term=ctx.term):
            z = at_least_fp32(_logits(hidden, weight[part], None if bias is None else bias[part]))
            log_q = None
            if teacher is not None and teacher_normalizers is not None:
                log_q = teacher.of_columns(part, targets).sub_(teacher_normalizers.unsqueeze(1))
            if ctx.term is not None:
                difference = gradient_of_columns(ctx.term, z, part.start, targets, log_q, state)
            else:
                difference = z.sub_(state[0].unsqueeze(1)).exp_()  # softmax, these columns of it
                difference -= one_hot(targets - part.start, difference) if log_q is None else log_q.exp_()
            difference = difference.mul_(upstream.unsqueeze(1)).to(hidden.dtype)
            grad_hidden += difference @ weight[part]
            if grad_weight is not None:
                grad_weight[part] = difference.T @ hidden
            if grad_bias is not None:
                grad_bias[part] = difference.sum(0)
        of_layer = ctx.layer.hand_over(grad_weight, grad_bias)
        return grad_hidden.to(hidden.dtype), None, None, None, None, *of_layer


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = hidden @ weight.T
    return product if bias is None else product + bias


def _cross_entropy(z: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """[n] of logits z [n, V] and of those of q, in fp32 or better; rows whose target is IGNORED have any value."""
    if teacher_logits is None:
        return F.cross_entropy(z, targets, reduction="none", ignore_index=IGNORED)
    return z.logsumexp(-1) - (teacher_logits.softmax(-1) * z).sum(-1)


def _penalized_teacher_logits(logits: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """A copy of some columns of a teacher's logits in fp32 or better, with `penalty` subtracted at each target."""
    wide = logits.to(_wide_dtype(logits), copy=True)
    return wide.sub_(one_hot(targets, wide), alpha=penalty) if penalty else wide


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is in a wider dtype."""
    return tensor.to(_wide_dtype(tensor))


def _chunks(length: int, width: int, *, term: Term | None = None) -> Iterator[slice]:
    """Slices along the length of a [length, width] matrix, each with a bounded number of elements.

    They are half as large for a term, which has twice as many intermediates as a cross-entropy.
    """
    step = max(1, _CHUNK // max(width if term is None else 2 * width, 1))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def token_losses(
    states: Tensor,
    labels: Tensor,
    *,
    layer: OutputLayer | None = None,
    teacher_logits: Tensor | None = None,
    logit_penalty: float = 0.0,
    term: Term | None = None,
) -> Tensor:
    """Cross-entropy of each prediction: -log p of the token, or -sum_v q_v log p_v for a teacher's distribution q.

    With a `term`, that term of each prediction instead.

    Args:
        states: [B, T, V] logits; or, with `layer`, [B, T, H] hidden states. Any float dtype.
        labels: [B, T] int64, the input ids with `IGNORED` where nothing is predicted; position t is predicted by t-1.
        layer: the output layer, applied to the hidden states.
        teacher_logits: [B, T, V] logits of q, without gradient.
        logit_penalty: subtracted from the teacher's logit of each predicted token, in fp32 whatever the dtype of
            `teacher_logits` (UNDIAL).
        term: see `token_terms`; `jensen_shannon` needs `teacher_logits`.

    Returns:
        [B, T] in fp32 (float64 for float64 states): entry t belongs to the token at t+1, 0 where it is ignored.
    """
    targets, flat = shifted(labels), states.flatten(0, 1)
    teacher = None if teacher_logits is None else _Teacher(teacher_logits.flatten(0, 1), None, logit_penalty)
    if layer is None:
        every: Tensor = _FromLogits.apply(flat, targets.flatten(), teacher, term)
        return every.view(targets.shape)
    index = (targets.flatten() != IGNORED).nonzero().squeeze(1)  # padding and prompts cost nothing
    teacher = None if teacher is None else replace(teacher, index=index)
    given = (flat[index], targets.flatten()[index], teacher, term, layer, layer.weight, layer.bias)
    losses: Tensor = _FromHidden.apply(*given)
    return losses.new_zeros(targets.numel()).index_copy(0, index, losses).view(targets.shape)


def token_scores(states: Tensor, labels: Tensor, layer: OutputLayer | None = None) -> Tensor:
    """The loss of each prediction, whether it has the largest logit, and the token that has; no gradient flows.

    Args:
        states, labels, layer: as in `token_losses`, whose losses these are.

    Returns:
        [3, B, T] in fp32 (float64 for float64 states), exact for ids up to 2^24: the losses; 1 where the token at t+1
        has the largest logit (of equal logits the first one counts), else 0; the id of the token that has. All are 0
        where nothing is predicted.
    """
    targets, flat = shifted(labels), states.detach().flatten(0, 1)
    index = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    wanted, found = targets.flatten()[index], flat.new_zeros(3, targets.numel(), dtype=_wide_dtype(flat))
    for rows in _chunks(len(index), flat.shape[1] if layer is None else len(layer.weight)):
        z = flat[index[rows]] if layer is None else _logits(flat[index[rows]], layer.weight, layer.bias)
        z = at_least_fp32(z)
        found[0, index[rows]] = _cross_entropy(z, wanted[rows], None)
        greedy = z.argmax(-1)
        found[1, index[rows]] = (greedy == wanted[rows]).to(found.dtype)
        found[2, index[rows]] = greedy.to(found.dtype)
    return found.view(3, *targets.shape)


def entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T] entropy (nats) of softmax(logits) at the positions that predict a labelled token, 0 elsewhere."""
    targets, flat = shifted(labels), logits.flatten(0, 1)
    found = flat.new_empty(len(flat), dtype=_wide_dtype(flat))
    for rows in _chunks(*flat.shape):
        wide = at_least_fp32(flat[rows])
        found[rows] = _cross_entropy(wide, targets.flatten()[rows], wide)
    return found.masked_fill_(targets.flatten() == IGNORED, 0).view(targets.shape)


def shifted(labels: Tensor) -> Tensor:
    """[B, T] labels moved to the position that predicts them; the last position predicts nothing."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
