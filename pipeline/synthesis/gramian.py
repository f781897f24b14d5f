"""What a rule sees, the Gramian of the two gradients, and what it answers, the weights of their combination."""

from __future__ import annotations

from math import sqrt
from typing import Literal, NamedTuple

Scope = Literal["element", "module", "layer", "global"]


SCOPES: tuple[str, ...] = ("element", "module", "layer", "global")


class Gramian(NamedTuple):
    """Inner products of f and r over one scope. At element scope only the signs survive: (1, -1, 1) or (1, 1, 1)."""

    ff: float
    fr: float
    rr: float

    @property
    def conflict(self) -> bool:
        return self.fr < 0

    @property
    def norms(self) -> tuple[float, float]:
        return sqrt(self.ff), sqrt(self.rr)

    @property
    def cosine(self) -> float:
        """Between -1 and 1 whatever the rounding; 0 if one of the two is 0."""
        length = sqrt(self.ff) * sqrt(self.rr)
        return min(max(self.fr / length, -1.0), 1.0) if length > 0 else 0.0


class Weights(NamedTuple):
    """g = f·(forget) + r·(retain) + f_off_r·(forget made orthogonal to retain) + r_off_f·(the other way round).

    The two projections are named rather than folded into the first two weights, because at element scope they are
    exactly 0, and computing f - (f/r)·r instead would leave rounding errors of the size of f.
    """

    f: float = 0.0
    r: float = 0.0
    f_off_r: float = 0.0
    r_off_f: float = 0.0

    def on(self, gramian: Gramian) -> tuple[float, float]:
        """The equivalent (w_f, w_r); a gradient of norm 0 is not projected on."""
        ff, fr, rr = gramian
        onto_r = fr / rr if rr > 0 else 0.0
        onto_f = fr / ff if ff > 0 else 0.0
        return self.f + self.f_off_r - self.r_off_f * onto_f, self.r + self.r_off_f - self.f_off_r * onto_r
