"""The rules: functions from the Gramian of two gradients to the weights of their combination, and their table."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Literal, NamedTuple

from pipeline.synthesis import multitask
from pipeline.synthesis.gramian import SCOPES, Gramian, Scope, Weights

__all__ = ["DEFAULTS", "RULES", "SCOPES", "Gramian", "Options", "Rule", "Weights"]


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


def mask(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """Retain, and forget where the two agree: MUDMAN's disruption masking (arXiv 2506.12484), without its averages.

    `pcgrad` per element, but where r = 0 it does not forget. On larger scopes the gate of Du et al. (arXiv 1812.02224).
    """
    return Weights(f=gamma, r=alpha) if gramian.fr > 0 else Weights(r=alpha)


def agem(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """Forgetting alone, which on conflict loses its component along the retain gradient (A-GEM, arXiv 1812.00420)."""
    return Weights(f_off_r=gamma) if gramian.conflict else Weights(f=gamma)


def barrier(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """The least change of gamma f to ⟨g, r⟩ ≥ alpha‖r‖²: gamma f + max((alpha rr - gamma fr)/rr, 0) r.

    The dynamic barrier (Gong, Liu and Liu, NeurIPS 2021). alpha is its η and does not scale r. (Per element:
    elements.py.)
    """
    short = gamma * gramian.fr < alpha * gramian.rr
    return Weights(f_off_r=gamma, r=alpha) if short else Weights(f=gamma)


def gradvac(gramian: Gramian, alpha: float, gamma: float, target: float) -> Weights:
    """alpha r + gamma f, where f gets as much of r as lifts their cosine κ to `target` (GradVac, arXiv 2010.05874).

    f + F(t√(1 - κ²) - κ√(1 - t²))/(R√(1 - t²)) r if κ < t. The target t is a moving average of κ, and never below 0,
    which would permit conflict, and later lower the bar; at 0 this is `pcgrad`. In the paper r gets as much of f.
    """
    (f, r), k, t = gramian.norms, gramian.cosine, min(max(target, 0.0), LARGEST_TARGET)
    if k >= t or not r:
        return Weights(f=gamma, r=alpha)
    return Weights(f_off_r=gamma, r=alpha + gamma * t / sqrt(1 - t * t) * sqrt(1 - k * k) * f / r)


def bloop(gramian: Gramian, alpha: float, gamma: float) -> Weights:
    """The forget gradient loses its component along the AVERAGED retain gradient, always (Bloop, arXiv 2402.02998).

    "r" is the moving average here, as in `gru`; the present retain gradient joins with weight alpha.
    """
    return Weights(f_off_r=gamma)


class Options(NamedTuple):
    """What some rules read beside alpha and gamma; `Rule.options` lists them."""

    preference: float = 0.5  # p_r, the share of retention; p_f = 1 - p_r
    c: float = 0.5  # of cagrad: radius of its ball, in norms of the centre
    centre: Literal["sum", "retain"] = "sum"  # of cagrad: of its ball
    regularization: float = 0.3  # lambda of sdmgrad
    new_share: float | None = None  # of the present step in a moving average; None: the rule's own
    seed: int = 0  # of graddrop

    def check(self) -> None:
        """Raises:
        ValueError: an option is outside of what the rules are defined for.
        """
        for name, value, valid in (
            ("preference", self.preference, 0 <= self.preference <= 1),
            ("c", self.c, 0 <= self.c < 1),
            ("centre", self.centre, self.centre in ("sum", "retain")),
            ("regularization", self.regularization, self.regularization >= 0),
            ("new_share", self.new_share, self.new_share is None or 0 < self.new_share <= 1),
        ):
            if not valid:
                raise ValueError(f"{name} = {value!r}; valid: {VALID_OPTIONS[name]}")


VALID_OPTIONS = {
    "preference": "0 to 1",
    "c": "0 to 1, without 1",
    "centre": "sum, retain",
    "regularization": "0 or more",
    "new_share": "0 to 1, without 0",
}


DEFAULTS = Options()


class Rule(NamedTuple):
    weights: Callable[..., Weights]  # of the Gramian, alpha, gamma and the options
    scope: Scope  # in its paper
    averages_retain: bool = False  # conflict is judged against m <- s r + (1 - s) m, one more partition of state
    tracks_cosine: bool = False  # `target`: the mean cosine of the steps before, c <- s κ + (1 - s) c, one per unit
    new_share: float = 0.0  # s of those
    draws: bool = False  # a random number per element decides
    scopes: tuple[str, ...] = SCOPES  # those on which it is defined
    options: tuple[str, ...] = ()  # those of `Options` that `weights` takes by name


OF_VECTORS = SCOPES[1:]  # angles, or projections off what is not the other gradient: one element has none


PREFERENCE = ("preference",)


RULES: dict[str, Rule] = {
    "sum": Rule(sum_, "global"),
    "sago": Rule(sago, "element"),
    "pcgrad": Rule(pcgrad, "module"),
    "blur": Rule(blur, "global"),
    "mgda": Rule(multitask.mgda, "global"),
    "cagrad": Rule(multitask.cagrad, "global", options=("c", "centre")),
    "imtl_g": Rule(multitask.imtl_g, "global"),
    "conflict_free": Rule(multitask.conflict_free, "global", scopes=OF_VECTORS, options=PREFERENCE),
    "nash_mtl": Rule(multitask.nash_mtl, "global", scopes=OF_VECTORS),
    "auxinash": Rule(multitask.auxinash, "global", scopes=OF_VECTORS, options=PREFERENCE),
    "aligned_mtl": Rule(multitask.aligned_mtl, "global", scopes=OF_VECTORS, options=PREFERENCE),
    "sdmgrad": Rule(multitask.sdmgrad, "global", scopes=OF_VECTORS, options=("preference", "regularization")),
    "upgrad": Rule(multitask.upgrad, "global", options=PREFERENCE),
    "dualproj": Rule(multitask.dualproj, "global", options=PREFERENCE),
    "barrier": Rule(barrier, "global"),
    "agem": Rule(agem, "global"),
    "mask": Rule(mask, "element"),
    "graddrop": Rule(sum_, "element", draws=True, scopes=("element",)),  # whose expectation is the sum: elements.py
    "gradvac": Rule(gradvac, "global", tracks_cosine=True, new_share=0.5, scopes=OF_VECTORS),
    "bloop": Rule(bloop, "global", averages_retain=True, new_share=0.1, scopes=OF_VECTORS),
    "gru": Rule(gru, "global", averages_retain=True, new_share=0.8, scopes=OF_VECTORS),
}


LARGEST_TARGET = 1 - 1e-6  # of gradvac: at 1 no finite multiple of r would do
