"""Rules of which single elements need more than their two signs: sizes, or a random number.

A form takes alpha, gamma, f and r [n], in the dtype of the computation, and the rule's options by name; where both are
0 it gives 0. F and R stand for gamma f and alpha r.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor


def opposite_signs(f: Tensor, r: Tensor) -> Tensor:
    """Strict conflict per element (bool). Never by the product f·r, which underflows to 0."""
    return f * r.sign() < 0


def mgda(alpha: float, gamma: float, f: Tensor, r: Tensor) -> Tensor:
    """The smaller of F and R where they agree, 0 where they do not; where one is 0, the other."""
    f, r = gamma * f, alpha * r
    smaller = torch.where((f == 0) | (r == 0), f + r, torch.where(f.abs() < r.abs(), f, r))
    return torch.where(opposite_signs(f, r), 0, smaller)


def imtl_g(alpha: float, gamma: float, f: Tensor, r: Tensor) -> Tensor:
    """The harmonic mean of F and R where they agree, 0 where they do not; where one is 0, the other."""
    f, r = gamma * f, alpha * r
    mean = f.double() * (2 * r.double() / (f.double() + r.double()))  # whose parts neither over- nor underflow there
    return torch.where(opposite_signs(f, r), 0, torch.where((f == 0) | (r == 0), f + r, mean.to(f.dtype)))


def cagrad(alpha: float, gamma: float, f: Tensor, r: Tensor, *, c: float, centre: str) -> Tensor:
    """(1 + c) g_0 where F and R agree, (1 - c) g_0 where they do not; where one is 0, g_0 = (F + R)/2, or R."""
    f, r = gamma * f, alpha * r
    middle = f / 2 + r / 2 if centre == "sum" else r
    return middle * (1 + c * f.sign() * r.sign())


def barrier(alpha: float, gamma: float, f: Tensor, r: Tensor) -> Tensor:
    """sign(r) max(|F|, alpha |r|) where the signs agree, alpha r where they do not: SAGO with a floor."""
    return torch.where(gamma * f * r.sign() < alpha * r.abs(), alpha * r, gamma * f)


def graddrop(alpha: float, gamma: float, f: Tensor, r: Tensor, draw: Tensor) -> Tensor:
    """F + R where they agree; else F with probability |F|/(|F| + |R|), or R (GradDrop, arXiv 2010.06808).

    `draw` [n] float64, uniform in [0, 1). The expectation is F + R.
    """
    f, r = gamma * f, alpha * r
    keeps_f = draw * (f.abs().double() + r.abs().double()) < f.abs().double()
    return torch.where(opposite_signs(f, r), torch.where(keeps_f, f, r), f + r)


FORMS: dict[str, Callable[..., Tensor]] = {
    "mgda": mgda,
    "imtl_g": imtl_g,
    "cagrad": cagrad,
    "barrier": barrier,
    "graddrop": graddrop,
}


def uniform(seed: int, step: int, index: Tensor) -> Tensor:
    """[n] float64 in [0, 1), a function of the seed, the step and the index of each element (int64) alone.

    The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), whose 64-bit products wrap as torch's do.
    """
    key = blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    bits = _mixed(index * GOLDEN + int.from_bytes(key, "little", signed=True))
    return _shifted(bits, 11).double() * 2.0**-53


GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as a signed number


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Right shift of 64 bits without sign."""
    return (x >> by) & (2 ** (64 - by) - 1)
