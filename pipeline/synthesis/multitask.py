"""Rules of multi-task learning, for two tasks: a problem over a simplex or a cone has a closed form in the Gramian.

F and R are the norms of f and r, κ their cosine, D = ‖f - r‖². Each is applied to gamma f and alpha r (`on_scaled`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import sqrt
from sys import float_info

from pipeline.synthesis.gramian import Gramian, Weights

ANTIPARALLEL = 1e-12  # of 1 + κ: below it the bisector of float32 gradients is rounding


def on_scaled(rule: Callable[..., tuple[float, float]]) -> Callable[..., Weights]:
    """`rule`, (w_f, w_r) of a Gramian, applied to gamma f and alpha r, as weights of f and r."""

    @wraps(rule)
    def scaled(gramian: Gramian, alpha: float, gamma: float, **options: float | str) -> Weights:
        ff, fr, rr = gramian
        w_f, w_r = rule(Gramian(gamma * gamma * ff, gamma * alpha * fr, alpha * alpha * rr), **options)
        return Weights(f=gamma * w_f, r=alpha * w_r)

    return scaled


@on_scaled
def mgda(gramian: Gramian) -> tuple[float, float]:
    """The shortest convex combination: w_f = clip((‖r‖² - ⟨f, r⟩) / D, 0, 1), w_r = 1 - w_f (Désidéri 2012).

    If one of the two is 0, the other acts alone: a task that is done must not stop the other.
    """
    if not gramian.ff or not gramian.rr:
        return 1.0, 1.0
    w = _segment(gramian.rr - gramian.fr, gramian)
    return w, 1 - w


@on_scaled
def cagrad(gramian: Gramian, c: float, centre: str) -> tuple[float, float]:
    """max over d of min(⟨f, d⟩, ⟨r, d⟩) in the ball around g_0 of radius c‖g_0‖ (CAGrad, arXiv 2110.14048).

    g = g_0 + c‖g_0‖ g_w/‖g_w‖, g_w = w f + (1 - w) r, where w minimises ⟨g_w, g_0⟩ + c‖g_0‖‖g_w‖. g_0 is (f + r)/2;
    with centre `retain` it is r, so that ⟨g, r⟩ ≥ (1 - c)‖r‖².
    """
    ff, fr, rr = gramian
    middle = ((1.0, 1.0), (0.0, 2.0))[centre == "retain"]  # 2 g_0
    radius = c / 2 * sqrt(max(_square(gramian, *middle), 0.0))
    slope = (rr - ff) / 2 if centre == "sum" else rr - fr  # ⟨r - f, g_0⟩
    edge, area = radius * sqrt(_square(gramian, 1, -1)), max(ff * rr - fr * fr, 0.0)
    t = slope / edge if edge else 1.0
    w = float(t > 0) if abs(t) >= 1 else _segment(t * sqrt(area / (1 - t * t)) + rr - fr, gramian)
    length = sqrt(_square(gramian, w, 1 - w))
    k = radius / length if length else 0.0
    return middle[0] / 2 + k * w, middle[1] / 2 + k * (1 - w)


@on_scaled
def imtl_g(gramian: Gramian) -> tuple[float, float]:
    """Equal projections on both directions, weights that add up to 1: R/(F + R), F/(F + R) (IMTL-G, ICLR 2021).

    If one of the two is 0, the other acts alone.
    """
    f, r = gramian.norms
    return (r / (f + r), f / (f + r)) if f and r else (1.0, 1.0)


@on_scaled
def conflict_free(gramian: Gramian, preference: float) -> tuple[float, float]:
    """The direction whose cosines with f and r are as p_f to p_r, as long as the projections of f and r on it (ConFIG).

    w_f = k (p_f - κ p_r)/F, w_r = k (p_r - κ p_f)/R, k = (p_f F + p_r R)/(p_f² + p_r² - 2κ p_f p_r): with p = ½ the
    bisector, (F + R)/2 (f/F + r/R). If one of the two is 0, the other acts alone. (arXiv 2408.11104)
    """
    (f, r), p_f, p_r = gramian.norms, 1 - preference, preference
    if not f or not r:
        return 1.0, 1.0
    gap = max(1 - gramian.cosine, 1e-30)  # where the two are parallel: the limit
    k = (p_f * f + p_r * r) / ((p_f - p_r) ** 2 + 2 * gap * p_f * p_r)
    return k * (p_f - p_r + gap * p_r) / f, k * (p_r - p_f + gap * p_f) / r


@on_scaled
def nash_mtl(gramian: Gramian) -> tuple[float, float]:
    """The bargaining solution, w_i ⟨g_i, g⟩ = 1: 1/(F√(1 + κ)), 1/(R√(1 + κ)) (Nash-MTL, arXiv 2202.01017).

    ‖g‖ = √2 whatever the gradients: `imtl_g` has this direction and a length that follows them. 0 if they are opposite.
    """
    f, r = gramian.norms
    k = 1 / sqrt(1 + gramian.cosine) if 1 + gramian.cosine > ANTIPARALLEL else 0.0
    return k / f if f else 0.0, k / r if r else 0.0


@on_scaled
def auxinash(gramian: Gramian, preference: float) -> tuple[float, float]:
    """Bargaining with unequal power, w_i ⟨g_i, g⟩ = p_i, p_f + p_r = 1 (AuxiNash, arXiv 2301.13501).

    √(p_f - κs)/F, √(p_r - κs)/R with (1 - κ²)s² + κs = p_f p_r. ‖g‖ = 1. 0 if the two are opposite.
    """
    (f, r), k, p_f, p_r = gramian.norms, gramian.cosine, 1 - preference, preference
    if 1 + k <= ANTIPARALLEL:
        return 0.0, 0.0
    root = sqrt(k * k + 4 * (1 - k * k) * p_f * p_r)
    s = 2 * p_f * p_r / (k + root) if k > 0 else (root - k) / (2 * (1 - k * k))
    w_f, w_r = sqrt(max(p_f - k * s, 0.0)), sqrt(max(p_r - k * s, 0.0))
    return w_f / f if f else 0.0, w_r / r if r else 0.0


@on_scaled
def aligned_mtl(gramian: Gramian, preference: float) -> tuple[float, float]:
    """√λ_min G^(-½) p: two orthogonal gradients of equal length in place of f and r (Aligned-MTL, arXiv 2305.19000).

    With s = √det G: k ((rr + s) p_f - fr p_r), k ((ff + s) p_r - fr p_f), k = 1/√(λ_max (ff + rr + 2s)). If f and r
    are parallel, or one is 0, their line is all there is, as in the authors' code.
    """
    ff, fr, rr = gramian
    (f, r), p_f, p_r = gramian.norms, 1 - preference, preference
    if not (ff and rr) or 1 - gramian.cosine**2 <= 4 * float_info.epsilon:
        r = -r if gramian.conflict else r
        along = (p_f * f + p_r * r) / ((ff + rr) or 1.0)
        return along * f, along * r
    s = f * r * sqrt(1 - gramian.cosine**2)
    k = 1 / sqrt((ff + rr + 2 * s) * (ff + rr + sqrt((ff - rr) ** 2 + 4 * fr * fr)) / 2)
    return k * ((rr + s) * p_f - fr * p_r), k * ((ff + s) * p_r - fr * p_f)


@on_scaled
def sdmgrad(gramian: Gramian, preference: float, regularization: float) -> tuple[float, float]:
    """(g_w + λ g_p)/(1 + λ), g_p = p_f f + p_r r, g_w = w f + (1 - w) r, with w in [0, 1] for the shortest g_w + λ g_p.

    MGDA drawn towards g_p (SDMGrad, arXiv 2305.18409); both come from one batch here. p_r = 1 makes retention primary.
    If one of the two is 0, the other acts alone.
    """
    ff, fr, rr = gramian
    if not ff or not rr:
        return 1.0, 1.0
    p_f, p_r, total = 1 - preference, preference, 1 + regularization
    w = _segment(rr - fr - regularization * (p_f * ff + (p_r - p_f) * fr - p_r * rr), gramian)
    return (w + regularization * p_f) / total, (1 - w + regularization * p_r) / total


def upgrad(gramian: Gramian, alpha: float, gamma: float, preference: float) -> Weights:
    """p_f (f off r) + p_r (r off f) on conflict, else p_f f + p_r r: each projected on the dual cone of both (UPGrad).

    With p = ½ half of PCGrad as its paper has it, on both tasks (arXiv 2406.16232).
    """
    f, r = gamma * (1 - preference), alpha * preference
    return Weights(f_off_r=f, r_off_f=r) if alpha * gamma * gramian.fr < 0 else Weights(f=f, r=r)


def dualproj(gramian: Gramian, alpha: float, gamma: float, preference: float) -> Weights:
    """m = p_f f + p_r r projected on the dual cone, {x: ⟨x, f⟩ ≥ 0, ⟨x, r⟩ ≥ 0} (GEM, arXiv 1706.08840; DualProj).

    w_f = max(p_f, -p_r fr/ff), w_r = max(p_r, -p_f fr/rr): m opposes at most one of the two.
    """
    (ff, fr, rr), f, r = gramian, gamma * (1 - preference), alpha * preference
    if alpha * gamma * fr < 0 and f * ff + r * fr <= 0:
        return Weights(r_off_f=r)
    if alpha * gamma * fr < 0 and f * fr + r * rr <= 0:
        return Weights(f_off_r=f)
    return Weights(f=f, r=r)


def _segment(numerator: float, gramian: Gramian) -> float:
    """numerator / ‖f - r‖², in [0, 1]; ½ where f = r, so that any will do."""
    square = _square(gramian, 1, -1)
    return min(max(numerator / square, 0.0), 1.0) if square > 0 else 0.5


def _square(gramian: Gramian, a: float, b: float) -> float:
    """‖a f + b r‖²."""
    return max(a * a * gramian.ff + 2 * a * b * gramian.fr + b * b * gramian.rr, 0.0)
