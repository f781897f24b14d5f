"""Synthesis of a forget and a retain gradient, for any training loop: two lists of whole tensors in, one out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.synthesis.adam import AdamState
from pipeline.synthesis.combine import State, Synthesis, is_finite, units_of
from pipeline.synthesis.partition import Piece
from pipeline.synthesis.rules import DEFAULTS, Options


def synthesize(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    *,
    rule: str,
    scope: str | None = None,
    alpha: float = 1.0,
    gamma: float = 1.0,
    zero_forget: str = "literal",
    layers: Sequence[Hashable] | None = None,
    average: Sequence[Tensor] | None = None,
    options: Options = DEFAULTS,
    state: State | None = None,
    adam: Sequence[AdamState] | None = None,
) -> list[Tensor]:
    """Combine two lists of whole gradients (paper, Algorithm 1 line 6).

    Args:
        forget, retain: one tensor per parameter, equal shapes, any float dtype.
        rule: a key of `RULES`.
        scope: element | module | layer | global; None is the rule's scope in the paper.
        alpha, gamma: weights of the retain and of the forget gradient.
        zero_forget: what SAGO does where the forget gradient is exactly 0: `literal` (0) or `retain`.
        layers: for scope `layer`, which layer each tensor belongs to.
        average: for rules `gru` and `bloop`, the moving average: contiguous tensors like `retain`, zero before the
            first step, updated in place. None: this is the first step.
        options: what some rules read beside alpha and gamma.
        state: for rules `gradvac` and `graddrop`, what they remember, `State()` before the first step, updated in
            place. None: this is the first step.
        adam: Adam's state of each tensor before the step, flat, for Adam's metric (`Synthesis`); None: euclidean.

    Returns:
        The combined gradients, new tensors with the shapes and dtypes of `retain`.

    Raises:
        ValueError: unknown rule or scope, a scope that the rule does not have, an option without sense, lists that do
            not match, scope `layer` without `layers`, an `average` that is not like `retain`.
        FloatingPointError: a non-finite value in either gradient or in their combination, also one that does not fit
            its dtype.
    """
    metric = "euclidean" if adam is None else "adam"
    synthesis = Synthesis(rule, scope, alpha, gamma, zero_forget, options, metric)
    if [f.shape for f in forget] != [r.shape for r in retain]:
        raise ValueError("forget and retain must hold tensors of the same shapes in the same order")
    named = 0 if layers is None else len(layers)
    if named != len(retain) and (layers is not None or synthesis.resolved_scope == "layer"):
        raise ValueError(f"`layers` must name the layer of each of {len(retain)} tensors, not of {named}")
    if not retain:
        return []
    if synthesis.averages_retain and average is None:
        average = [torch.zeros_like(r, memory_format=torch.contiguous_format) for r in retain]
    if average is not None and [m.shape for m in average] != [r.shape for r in retain]:
        raise ValueError(f"`average` of rule {rule!r} must hold one tensor like each retain gradient, zero at first")
    combined = [r.detach().clone(memory_format=torch.contiguous_format) for r in retain]
    averages = [m.view(-1) for m in average or ()] if synthesis.averages_retain else [None] * len(combined)
    starts = [0, *accumulate(r.numel() for r in retain)][:-1]
    states = [None] * len(combined) if adam is None else adam
    parts = enumerate(zip(forget, combined, averages, starts, states, strict=True))
    pieces = [Piece(row, f.detach().reshape(-1), g.view(-1), m, at, s) for row, (f, g, m, at, s) in parts]
    units = units_of(synthesis.resolved_scope, layers or range(len(combined)))
    table = synthesis.combine_(pieces, units, state=state)
    # A narrower dtype than float32 may hold less than the sums of the table, which are of what was not yet rounded.
    if not is_finite(table) or not all(bool(g.isfinite().all()) for g in combined):
        raise FloatingPointError("a gradient or the combination holds inf or NaN; skip this step")
    return combined
