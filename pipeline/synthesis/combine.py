"""Gradient synthesis: rules x scopes, from 2x2 Gramians to the combined gradient. Imports torch only.

The forget gradient f and the retain gradient r of one step meet on a *scope*: one element, one module (a parameter
tensor), one layer, or the whole model. A *rule* maps their Gramian there, [ff fr; fr rr], to the weights of the
combined gradient g. SAGO gates signs element by element (paper, section 3.4); PCGrad removes from the forget gradient
its component along the retain gradient where they conflict (section 3.3); `sum` is the weighted sum (equation 1).

The same code serves whole tensors (`synthesize`) and the shards of many ranks (`combine_` with an all-reduce): the
Gramians of the shards add up to those of the whole tensors, so one small reduction makes every rank decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.synthesis.rules import NEW_SHARE, RULES, SCOPES, Gramian, Weights


class Piece(NamedTuple):
    """The part of one parameter's two gradients that this rank has: 1-D tensors of equal length and dtype.

    `forget` and `average` may be in host memory; the computation runs on the device of `retain`.
    """

    row: int  # index of the parameter
    forget: Tensor  # [n]
    retain: Tensor  # [n]; becomes the combined gradient
    average: Tensor | None = None  # [n] for rules that average the retain gradient: the state m, updated in place


@dataclass(frozen=True)
class Synthesis:
    """A rule at a scope with its weights.

    Raises:
        ValueError: unknown rule, scope or zero_forget.
    """

    rule: str
    scope: str | None = None  # None: the rule's scope in the paper
    alpha: float = 1.0  # weight of the retain gradient
    gamma: float = 1.0  # weight of the forget gradient
    zero_forget: str = "literal"  # where f = 0, sago gives 0 (`literal`, the paper) or alpha r (`retain`)

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("rule", self.rule, tuple(RULES)),
            ("scope", self.scope if self.scope is not None else SCOPES[0], SCOPES),
            ("zero_forget", self.zero_forget, ("literal", "retain")),
        ):
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")
        if self.averages_retain and self.scope == "element":
            raise ValueError(f"rule {self.rule!r} has no scope 'element'; valid: {', '.join(SCOPES[1:])}")

    @property
    def resolved_scope(self) -> str:
        return self.scope or RULES[self.rule].scope

    @property
    def averages_retain(self) -> bool:
        return RULES[self.rule].averages_retain

    def weights(self, gramian: Gramian) -> Weights:
        """The weights that the rule gives a unit, a group of elements in which conflict is judged together."""
        if self.zero_forget == "retain" and gramian.ff == 0:
            gramian = gramian._replace(fr=-1.0)  # retention decides where the forget gradient is 0
        return RULES[self.rule].weights(gramian, self.alpha, self.gamma)

    def combine_(
        self,
        pieces: Sequence[Piece],
        units: Sequence[int],
        reduce: Callable[[Tensor], object] = lambda table: None,
        scale: float = 1.0,
    ) -> Tensor:
        """Overwrite every piece's `retain` with the combined gradient, and return the sums that describe the step.

        Args:
            pieces: this rank's parts of the parameters, in any order; a parameter may have none or several.
            units: for each parameter, the index of the unit it is judged in (unused at element scope).
            reduce: adds the table up over all ranks, in place: the one collective of the synthesis.
            scale: the loss scale of fp16, by which both gradients are multiplied here. So is the combined gradient,
                because every rule is homogeneous. The state `average` outlives a scale and does not contain it.

        Returns:
            table: [parameters, 10] float64, the columns of `COLUMNS`, of the gradients times `scale`. If it is not
                finite (`is_finite`), nothing that was combined may be used; module, layer and global scopes then do
                not change `retain` and `average`.
        """
        device = pieces[0].retain.device if pieces else None
        table = torch.zeros(len(units), len(COLUMNS), dtype=torch.float64, device=device)
        if self.resolved_scope == "element":
            self._combine_elements_(pieces, table)
            reduce(table)
        else:
            _sum_products(pieces, table, scale)
            reduce(table)
            if is_finite(table):
                self._combine_units_(pieces, units, table, scale)
        return table

    def _combine_elements_(self, pieces: Sequence[Piece], table: Tensor) -> None:
        """One pass: which of two mixtures an element gets depends on its signs alone."""
        clash, agree = self.weights(Gramian(1.0, -1.0, 1.0)), self.weights(Gramian(1.0, 1.0, 1.0))
        for piece in pieces:
            row = piece.row
            for f, r, _ in _chunks(piece):
                opposed = opposite_signs(f, r)
                table[row, CONFLICTS] += opposed.sum()
                if self.zero_forget == "retain":
                    opposed |= f == 0
                g = torch.where(opposed, _mix_elements(clash, f, r), _mix_elements(agree, f, r))
                table[row, :CONFLICTS] += _inner_products(f, r, g)
                r.copy_(g)

    def _combine_units_(self, pieces: Sequence[Piece], units: Sequence[int], table: Tensor, scale: float) -> None:
        """Second pass: the Gramians are complete, so each unit has weights (w_f, w_r, w_a) on f, r, anchor a."""
        index = torch.tensor(units, device=table.device)
        anchored = [FF, FA, AA] if self.averages_retain else [FF, FR, RR]
        sums = table.new_zeros(max(units) + 1, 3).index_add_(0, index, table[:, anchored])  # [units, 3]
        weights = []
        for row in sums.tolist():
            gramian = Gramian(*row)
            w_f, w_anchor = self.weights(gramian).on(gramian)
            weights.append((w_f, self.alpha, w_anchor) if self.averages_retain else (w_f, w_anchor, 0.0))
        # The products with g follow from the Gramian and the weights: the gradients are not read a second time.
        w_f, w_r, w_a = torch.tensor(weights, dtype=torch.float64, device=table.device)[index].unbind(1)
        ff, fr, rr, fa, ra, aa = (table[:, column] for column in (FF, FR, RR, FA, RA, AA))
        table[:, GF] = w_f * ff + w_r * fr + w_a * fa
        table[:, GR] = w_f * fr + w_r * rr + w_a * ra
        table[:, GG] = w_f * table[:, GF] + w_r * table[:, GR] + w_a * (w_f * fa + w_r * ra + w_a * aa)
        if not is_finite(table):
            return
        for piece in pieces:
            on_f, on_r, on_anchor = weights[units[piece.row]]
            for f, r, m in _chunks(piece):
                if m is None:
                    r.copy_(_weighted(on_f, f, on_r, r))
                else:
                    anchor = _anchor(r, m, scale)
                    r.copy_(_weighted(on_f, f, on_r, r).add_(anchor, alpha=on_anchor))
                    m.copy_(anchor.div_(scale))


COLUMNS = ("ff", "fr", "rr", "gf", "gr", "gg", "conflicts", "fa", "ra", "aa")


FF, FR, RR, GF, GR, GG, CONFLICTS, FA, RA, AA = range(10)


def is_finite(table: Tensor) -> bool:
    """Whether both gradients are finite, and their combination has a norm that float32 can hold.

    A sum of squares in float64 is finite exactly when every float32 in it is.
    """
    squares = table[:, [FF, RR]]
    return bool(torch.isfinite(squares).all() and table[:, GG].sum() <= torch.finfo(torch.float32).max ** 2)


def opposite_signs(f: Tensor, r: Tensor) -> Tensor:
    """Strict conflict per element (bool). Never by the product f·r, which underflows to 0."""
    return f.sign() * r.sign() < 0


def _sum_products(pieces: Sequence[Piece], table: Tensor, scale: float) -> None:
    """First pass of module, layer and global scopes: every product that the weights and the geometry depend on."""
    for piece in pieces:
        row = table[piece.row]
        for f, r, m in _chunks(piece):
            row[CONFLICTS] += opposite_signs(f, r).sum()
            if m is None:
                row[:GF] += _inner_products(f, r)
            else:
                row[[FF, FR, RR, FA, RA, AA]] += _inner_products(f, r, _anchor(r, m, scale))


def _anchor(retain: Tensor, average: Tensor, scale: float) -> Tensor:
    """GRU's moving average after this step, on the device of the retain gradient, and times `scale` like it."""
    new = retain.to(_compute_dtype(retain))
    return average.to(new.device, new.dtype).mul((1 - NEW_SHARE) * scale).add_(new, alpha=NEW_SHARE)


def _chunks(piece: Piece) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(f, r, m) in bounded parts: their temporaries fit the cache of a CPU, and are small beside a partition on a GPU.

    r and m are views; f is one too unless it is in host memory, from where one part at a time is copied.
    """
    size = 2**16 if piece.retain.device.type == "cpu" else 2**22
    retain = piece.retain.split(size)
    average = [None] * len(retain) if piece.average is None else piece.average.split(size)
    for f, r, m in zip(piece.forget.split(size), retain, average, strict=True):
        yield f.to(r.device, non_blocking=True), r, m


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _weighted(w_f: float, f: Tensor, w_r: float, r: Tensor) -> Tensor:
    """w_f f + w_r r, a new tensor in fp32 or better, whatever the gradients' dtype."""
    # Projecting a large gradient off a tiny one takes a weight that float32 may not hold.
    dtype = _compute_dtype(r) if max(abs(w_f), abs(w_r)) < 1e30 else torch.float64
    if w_f == 0:  # as SAGO's two mixtures, each of one gradient alone
        return r.to(dtype) * w_r
    if w_r == 0:
        return f.to(dtype) * w_f
    return (r.to(dtype) * w_r).add_(f.to(dtype), alpha=w_f)


def _mix_elements(weights: Weights, f: Tensor, r: Tensor) -> Tensor:
    """`weights` where every element is a scope of its own: projecting off a non-zero number leaves 0."""
    mixed = _weighted(weights.f, f, weights.r, r)
    if weights.f_off_r:
        mixed += torch.where(r == 0, f * weights.f_off_r, 0)
    if weights.r_off_f:
        mixed += torch.where(f == 0, r * weights.r_off_f, 0)
    return mixed


_UPPER = {2: ([0, 0, 1], [0, 1, 1]), 3: ([0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 1, 2])}


def _inner_products(*vectors: Tensor) -> Tensor:
    """Of (f, r): ff fr rr; of (f, r, x): fx rx xx as well. In float64, where squares of 1e-38 and 1e38 exist."""
    stacked = torch.stack([vector.double() for vector in vectors])  # [2 or 3, n]
    rows, columns = _UPPER[len(vectors)]
    return (stacked @ stacked.T)[rows, columns]


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
