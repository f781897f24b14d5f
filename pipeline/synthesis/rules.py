"""The rules: functions from the Gramian of two gradients to the weights of their combination."""

from __future__ import annotations

from collections.abc import Callable
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


def sum_(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """GradDiff and its kin: the weighted sum of the two gradients (paper, equation 1)."""
    return Weights(f=gamma, r=alpha)


def sago(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """Retention decides where the two conflict, forgetting acts alone where they agree (paper, section 3.4)."""
    return Weights(r=alpha) if gramian.conflict else Weights(f=gamma)


def pcgrad(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """On conflict the forget gradient loses its component along the retain gradient (paper, section 3.3).

    At element scope nothing is left of it there: MUDMAN's disruption masking (arXiv 2506.12484), beside alpha r.
    """
    return Weights(f_off_r=gamma, r=alpha) if gramian.conflict else Weights(f=gamma, r=alpha)


def blur(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """The retain gradient loses its component along the forget gradient, always (BLUR, arXiv 2506.08164).

    Not to be confused with the BLUR benchmark (arXiv 2506.15699).
    """
    return Weights(f=gamma, r_off_f=alpha)


def gru(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """On conflict the forget gradient loses its component along the AVERAGED retain gradient (GRU, arXiv 2503.09117).

    "r" is the moving average here (`Rule.averages_retain`); the present retain gradient joins with weight alpha.
    """
    return Weights(f_off_r=gamma) if gramian.conflict else Weights(f=gamma)


class Rule(NamedTuple):
    weights: Callable[[Gramian, float, float], Weights]  # of the Gramian, alpha, gamma
    scope: Scope  # in its paper
    averages_retain: bool = False  # conflict is judged against m <- 0.8 r + 0.2 m, one more partition of state


RULES: dict[str, Rule] = {
    "sum": Rule(sum_, "global"),
    "sago": Rule(sago, "element"),
    "pcgrad": Rule(pcgrad, "module"),
    "blur": Rule(blur, "global"),
    "gru": Rule(gru, "global", averages_retain=True),
}


NEW_SHARE = 0.8  # of the present retain gradient in GRU's average; the rest is the old average, which starts at 0
