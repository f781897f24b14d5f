"""Adam's metric, and Adam's update: sums over the pieces of one rank. Gradients are read, nothing is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.synthesis.adam import AdamState
from pipeline.synthesis.kernels import compute_dtype, moving_average
from pipeline.synthesis.partition import Partition, Piece


def metric_products(pieces: Sequence[Piece], num_rows: int, scale: float, new_share: float) -> Tensor:
    """Inner products Σ x y / (√v̂ + ε) of what a rule compares, f and a, which is r or its average after this step.

    Returns:
        [num_rows, 3] float64: ff, fa, aa of each parameter, of the gradients times `scale`. Pieces without Adam's state
        add nothing.
    """
    total = torch.zeros(num_rows, 3, dtype=torch.float64, device=pieces[0].retain.device if pieces else "cpu")
    for state, indices in _alike([piece.adam for piece in pieces]):
        some = [pieces[index] for index in indices]
        vectors = [[piece.forget for piece in some], [piece.retain for piece in some]]
        vectors.append([piece.adam.second for piece in some if piece.adam is not None])
        if some[0].average is not None:
            vectors.append([piece.average for piece in some if piece.average is not None])
        partition = Partition([piece.row for piece in some], vectors, num_rows)
        if sums := partition.sums(_metric_products, scale, new_share, state.corrections[1], state.eps):
            total += torch.stack(sums, 1)
    return total


def update_products(parts: Sequence[tuple[int, Tensor]], states: Sequence[AdamState], num_rows: int) -> Tensor:
    """Of the update Δθ that Adam has just made: its product with the retain gradient, and its square.

    Δθ, new weights less old, follows from the moments after the step, so that no copy of the old weights is needed:
    Δθ = -u - lr λ θ_old with u = lr m̂ / (√v̂ + ε) and, for a weight decay λ, θ_old = (θ_new + u) / (1 - lr λ). Only the
    rounding of the new weights is not in it.

    Args:
        parts: of each piece, the index of its parameter and its retain gradient [n].
        states: of each piece, after the step, with the learning rate of the step.

    Returns:
        [num_rows, 2] float64: Σ r Δθ and Σ Δθ² of each parameter.
    """
    total = torch.zeros(num_rows, 2, dtype=torch.float64, device=states[0].first.device if states else "cpu")
    for state, indices in _alike(states):
        vectors = [[parts[index][1] for index in indices], [states[index].first for index in indices]]
        vectors.append([states[index].second for index in indices])
        if state.weight_decay:
            vectors.append([states[index].weights for index in indices])
        partition = Partition([parts[index][0] for index in indices], vectors, num_rows)
        numbers = (state.lr, *state.corrections, state.eps, state.weight_decay)
        if sums := partition.sums(_update_products, *numbers):
            total += torch.stack(sums, 1)
    return total


def _alike(states: Sequence[AdamState | None]) -> list[tuple[AdamState, list[int]]]:
    """The indices of the states, those together whose numbers are the same; with each group one of its states."""
    groups: dict[tuple[object, ...], list[int]] = {}
    first: dict[tuple[object, ...], AdamState] = {}
    for index, state in enumerate(states):
        if state is not None:
            groups.setdefault(state.numbers, []).append(index)
            first.setdefault(state.numbers, state)
    return [(first[numbers], indices) for numbers, indices in groups.items()]


def _metric_products(
    scale: float, new_share: float, correction: float, eps: float, f: Tensor, r: Tensor, v: Tensor, *m: Tensor
) -> Tensor:
    a = moving_average(scale, new_share, r, m[0]) if m else r
    weight = (v.to(compute_dtype(v)) / correction).sqrt_().add_(eps).reciprocal_().double()
    f_, a_ = f.double(), a.double()
    weighted = weight * f_
    return torch.stack([(weighted * f_).sum(1), (weighted * a_).sum(1), (a_ * a_).mul_(weight).sum(1)])


def _update_products(
    lr: float, correction1: float, correction2: float, eps: float, weight_decay: float, *vectors: Tensor
) -> Tensor:
    r, m, v, *w = vectors
    update = m * (-lr / correction1) / (v / correction2).sqrt_().add_(eps)
    if w:
        update -= (w[0] - update) * (lr * weight_decay / (1 - lr * weight_decay))
    products = (r * update).sum(1, dtype=torch.float64), update.square_().sum(1, dtype=torch.float64)
    return torch.stack(products)
