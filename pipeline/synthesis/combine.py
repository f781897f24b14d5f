"""Gradient synthesis: rules x scopes, from 2x2 Gramians to the combined gradient. Imports torch only.

The forget gradient f and the retain gradient r of one step meet on a *scope*: one element, one module (a parameter
tensor), one layer, or the whole model. A *rule* maps their Gramian there, [ff fr; fr rr], to the weights of the
combined gradient g. SAGO gates signs element by element (paper, section 3.4); PCGrad removes from the forget gradient
its component along the retain gradient where they conflict (section 3.3); `sum` is the weighted sum (equation 1).

The same code serves whole tensors (`synthesize`) and the shards of many ranks (`combine_` with an all-reduce): the
Gramians of the shards add up to those of the whole tensors, so one small reduction makes every rank decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pipeline.synthesis.elements import FORMS, uniform
from pipeline.synthesis.kernels import (
    Gate,
    form_,
    gate_,
    moving_average,
    needs_float64,
    sum_products,
    weighted,
    weighted_by_element,
)
from pipeline.synthesis.metric import metric_products
from pipeline.synthesis.partition import Partition, Piece
from pipeline.synthesis.rules import DEFAULTS, RULES, SCOPES, Gramian, Options, Weights
from pipeline.synthesis.windows import to_device, write

COMPILE_FROM = 2**27  # elements of a rank from which a compiled kernel pays for the time to compile it


@dataclass
class State:
    """What a rule remembers from step to step, beside the averages of the pieces. Alike on all ranks."""

    step: int = 0  # combinations so far, on which random numbers depend
    cosines: list[float] = field(default_factory=list)  # [units] the mean cosine of f and r, where a rule tracks it


@dataclass(frozen=True)
class Synthesis:
    """A rule at a scope with its weights.

    Under the metric `adam` the rule sees, and projects by, the inner products ⟨a, b⟩_P = Σ a b / (√v̂ + ε) in place of
    Σ a b, with Adam's own bias-corrected v̂ and ε: Adam turns g into -lr P g, momentum apart, so that ⟨g, r⟩_P ≥ 0 is
    what keeps the retain loss from rising. Every promise that a rule makes about norms, angles and products holds in
    this metric then; the geometry and clipping stay euclidean. On single elements P is a positive factor of all three
    products, which no rule's weights depend on: there the metric changes nothing, nor does it under `sum`. Pieces
    without Adam's state are measured as ever: those of SGD, and before the first step.

    Raises:
        ValueError: unknown rule, scope, metric or zero_forget, a scope that the rule does not have, an option without
            sense.
    """

    rule: str
    scope: str | None = None  # None: the rule's scope in the paper
    alpha: float = 1.0  # weight of the retain gradient
    gamma: float = 1.0  # weight of the forget gradient
    zero_forget: str = "literal"  # where f = 0, sago gives 0 (`literal`, the paper) or alpha r (`retain`)
    options: Options = DEFAULTS
    metric: Literal["euclidean", "adam"] = "euclidean"  # of the inner products that the rule sees

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("rule", self.rule, tuple(RULES)),
            ("scope", self.scope if self.scope is not None else SCOPES[0], SCOPES),
            ("zero_forget", self.zero_forget, ("literal", "retain")),
            ("metric", self.metric, ("euclidean", "adam")),
        ):
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")
        scopes = RULES[self.rule].scopes
        if self.resolved_scope not in scopes:
            raise ValueError(f"rule {self.rule!r} has no scope {self.scope!r}; valid: {', '.join(scopes)}")
        self.options.check()

    @property
    def resolved_scope(self) -> str:
        return self.scope or RULES[self.rule].scope

    @property
    def averages_retain(self) -> bool:
        return RULES[self.rule].averages_retain

    @property
    def new_share(self) -> float:
        """Of the present step in the rule's moving average."""
        return RULES[self.rule].new_share if self.options.new_share is None else self.options.new_share

    @property
    def rule_options(self) -> dict[str, float | str]:
        return {name: getattr(self.options, name) for name in RULES[self.rule].options}

    def weights(self, gramian: Gramian, target: float = 0.0) -> Weights:
        """The weights that the rule gives a unit, a group of elements in which conflict is judged together.

        `target` is the unit's mean cosine, of a rule that tracks it.
        """
        if self.rule == "sago" and self.zero_forget == "retain" and gramian.ff == 0:
            gramian = gramian._replace(fr=-1.0)  # retention decides where the forget gradient is 0
        tracked = {"target": target} if RULES[self.rule].tracks_cosine else {}
        return RULES[self.rule].weights(gramian, self.alpha, self.gamma, **self.rule_options, **tracked)

    @property
    def _in_metric(self) -> bool:
        return self.metric == "adam" and self.resolved_scope != "element"

    @property
    def columns(self) -> int:
        """Numbers of a parameter in the table that ranks add up."""
        return len(COLUMNS) + (len(METRIC_COLUMNS) if self._in_metric else 0)

    def combine_(
        self,
        pieces: Sequence[Piece],
        units: Sequence[int],
        reduce: Callable[[Tensor], object] = lambda table: None,
        scale: float = 1.0,
        state: State | None = None,
        *,
        keep_retain: bool = False,
    ) -> Tensor:
        """Overwrite every piece's `retain` with the combined gradient, and return the sums that describe the step.

        Args:
            pieces: this rank's parts of the parameters, in any order; a parameter may have none or several.
            units: for each parameter, the index of the unit it is judged in (unused at element scope).
            reduce: adds the table up over all ranks, in place: the one collective of the synthesis.
            scale: the loss scale of fp16, by which both gradients are multiplied here. So is the combined gradient.
                The state `average` outlives a scale and does not contain it.
            state: what the rule remembers, the same on all ranks, updated in place; None: this is its first step.
            keep_retain: overwrite every piece's `forget` with the retain gradient, which is read no more.

        Returns:
            table: [parameters, 10] float64, the columns of `COLUMNS`, of the gradients times `scale`; under Adam's
                metric [parameters, 13], with `METRIC_COLUMNS`. If it is not finite (`is_finite`), nothing that was
                combined may be used; module, layer and global scopes then do not change a piece.
        """
        state = State() if state is None else state
        partition = self._partition(pieces, len(units))
        table = torch.zeros(len(units), self.columns, dtype=torch.float64, device=partition.device)
        if self.resolved_scope == "element":
            self._combine_elements_(partition, table, state.step, keep_retain)
            reduce(table)
            state.step += 1
            return table.cpu()
        self._sum_products(partition, table, scale)
        if self._in_metric:
            table[:, METRIC] = metric_products(pieces, len(units), scale, self.new_share)
        reduce(table)
        table = table.cpu()  # the one read that waits for the device
        if is_finite(table):
            weights, cosines = self._weigh_units(units, table, scale, state.cosines)
            if is_finite(table):
                _combine_units_(partition, weights, scale, self.new_share, keep_retain)
                state.cosines[:] = cosines
        state.step += 1
        return table

    def _partition(self, pieces: Sequence[Piece], num_rows: int) -> Partition:
        vectors = [[piece.forget for piece in pieces], [piece.retain for piece in pieces]]
        if pieces and pieces[0].average is not None:
            vectors.append([piece.average for piece in pieces if piece.average is not None])
        is_large = self._compiles and sum(len(piece.retain) for piece in pieces) >= COMPILE_FROM
        starts = [piece.start for piece in pieces]
        return Partition([piece.row for piece in pieces], vectors, num_rows, starts=starts, is_large=is_large)

    @property
    def _compiles(self) -> bool:
        """Whether a compiled kernel has the same bits: it rounds products before it adds them, eager ones do not."""
        if self.resolved_scope != "element":
            return not self.averages_retain
        return self.rule not in FORMS and not any(w.f and w.r for w in (self._gate.clash, self._gate.agree))

    @property
    def _gate(self) -> Gate:
        clash, agree = self.weights(Gramian(1.0, -1.0, 1.0)), self.weights(Gramian(1.0, 1.0, 1.0))
        of_zeros = (self.weights(Gramian(0.0, 0.0, 1.0)), self.weights(Gramian(1.0, 0.0, 0.0)))
        return Gate(clash, agree, *(weights != agree for weights in of_zeros))

    def _combine_elements_(self, partition: Partition, table: Tensor, step: int, keep_retain: bool) -> None:
        """One pass: which of two mixtures an element gets depends on its signs alone, but for the rules in `FORMS`."""
        if self.rule not in FORMS:
            sums = partition.sums(gate_, self._gate, keep_retain=keep_retain)
        else:
            form = partial(FORMS[self.rule], self.alpha, self.gamma, **self.rule_options)
            draw = partial(uniform, self.options.seed, step) if RULES[self.rule].draws else None
            sums = partition.sums(form_, form, draw=draw, keep_retain=keep_retain)
        if sums:
            table[:, FF : CONFLICTS + 1] = torch.stack(sums, 1)

    def _sum_products(self, partition: Partition, table: Tensor, scale: float) -> None:
        """First pass of the other scopes: every product that the weights and the geometry depend on."""
        if sums := partition.sums(sum_products, scale, self.new_share):
            *products, table[:, CONFLICTS] = sums
            table[:, FF:GF] = torch.stack(products[:GF], 1)
            if self.averages_retain:
                table[:, FA : AA + 1] = torch.stack(products[GF:], 1)

    def _weigh_units(
        self, units: Sequence[int], table: Tensor, scale: float, cosines: list[float]
    ) -> tuple[list[tuple[float, float, float]], list[float]]:
        """Of each parameter (w_f, w_r, w_a) on f, r and the anchor a; of each unit its mean cosine after the step.

        Both from the complete Gramians of the units. The products with g follow: they are put in the table, and the
        gradients are not read a second time.
        """
        index = torch.tensor(units)
        ff, fr, rr, _, _, _, _, fa, ra, aa, *_ = table.unbind(1)
        anchored = torch.stack([ff, fa, aa] if self.averages_retain else [ff, fr, rr], 1)
        if table[:, METRIC].any():  # else no rank has a state of Adam
            anchored = table[:, METRIC]
        sums = anchored.new_zeros(max(units) + 1, 3).index_add_(0, index, anchored / scale**2).tolist()
        weights, after = [], []
        for row, before in zip(sums, cosines or [0.0] * len(sums), strict=True):
            gramian = Gramian(*row)
            w_f, w_anchor = self.weights(gramian, before).on(gramian)
            weights.append((w_f, self.alpha, w_anchor) if self.averages_retain else (w_f, w_anchor, 0.0))
            after.append(max((1 - self.new_share) * before + self.new_share * gramian.cosine, 0.0))
        w_f, w_r, w_a = torch.tensor(weights, dtype=torch.float64)[index].unbind(1)
        table[:, GF] = w_f * ff + w_r * fr + w_a * fa
        table[:, GR] = w_f * fr + w_r * rr + w_a * ra
        table[:, GG] = w_f * table[:, GF] + w_r * table[:, GR] + w_a * (w_f * fa + w_r * ra + w_a * aa)
        return [weights[unit] for unit in units], after


COLUMNS = ("ff", "fr", "rr", "gf", "gr", "gg", "conflicts", "fa", "ra", "aa")


FF, FR, RR, GF, GR, GG, CONFLICTS, FA, RA, AA = range(10)


METRIC_COLUMNS = ("ff", "fa", "aa")  # in Adam's metric, of what the rule compares: a is r, or its average


METRIC = slice(len(COLUMNS), None)


def is_finite(table: Tensor) -> bool:
    """Whether both gradients are finite, and their combination has a norm that float32 can hold.

    A sum of squares in float64 is finite exactly when every float32 in it is.
    """
    squares = table[:, [FF, RR]]
    return bool(torch.isfinite(squares).all() and table[:, GG].sum() <= torch.finfo(torch.float32).max ** 2)


def _combine_units_(
    partition: Partition,
    weights: Sequence[tuple[float, float, float]],
    scale: float,
    new_share: float,
    keep_retain: bool,
) -> None:
    """Second pass: g = w_f f + w_r r + w_a a, with weights by row; the average becomes a."""
    uniform = len(set(weights)) == 1
    dtype = torch.float64 if any(map(needs_float64, weights)) else partition.compute_dtype
    table = to_device(partition.device, torch.tensor(weights, dtype=torch.float64).to(dtype))
    for segments, parts, (f, r, *m) in partition:
        anchor = moving_average(scale, new_share, r, m[0]) if m else None
        if uniform or len(segments.rows) == 1:
            g = weighted(weights[segments.rows[0]], f, r, anchor)
        else:
            by_segment = table.index_select(0, segments.rows_on_device).unbind(1)
            g = weighted_by_element([segments.spread(w) for w in by_segment], f, r, anchor)
        if keep_retain:
            write(parts[0], r)
        write(parts[1], g)
        if anchor is not None:
            write(parts[2], anchor.div_(scale))


def units_of(scope: str, layers: Sequence[Hashable]) -> list[int]:
    """For each parameter, the index of the unit in which its conflict is judged.

    `layers` has one entry per parameter: the layer it belongs to (only its length matters outside scope `layer`).
    """
    if scope == "global":
        return [0] * len(layers)
    if scope == "layer":
        index = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
        return [index[layer] for layer in layers]
    return list(range(len(layers)))
