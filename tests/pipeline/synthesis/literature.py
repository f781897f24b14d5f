"""Pairs of gradients for the rules of the literature, and what a rule makes of them, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.synthesis import State, synthesize
from pipeline.synthesis.rules import DEFAULTS, RULES, Options

CLASSIC = ("sum", "sago", "pcgrad", "blur", "gru")  # in test_synthesis.py and test_gru.py
NEW = tuple(rule for rule in RULES if rule not in CLASSIC)
AVERAGING = tuple(rule for rule in RULES if RULES[rule].averages_retain)

Pair = tuple[Tensor, Tensor]


def pairs(number: int, seed: int = 0) -> list[Pair]:
    """Vectors of 2 to 6 elements in float64, cosines from -1 to 1, one up to a hundred times as long as the other."""
    dice = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        f, r, other = (torch.randn(2 + len(made) % 5, generator=dice, dtype=torch.float64) for _ in range(3))
        lean, stretch = (torch.rand(2, generator=dice, dtype=torch.float64) * 4 - 2).tolist()
        made.append((10**stretch * (f + lean * r), r + 0.1 * other))
    return made


def hostile() -> list[Pair]:
    """Parallel, antiparallel, almost so, equal, orthogonal, zero; norms from 1e-15 to 1e15 in all combinations."""
    one, two = torch.tensor([3.0, -4.0, 1.0]).double(), torch.tensor([4.0, 3.0, 0.0]).double()
    shapes = [(one, one), (one, -one), (one, two), (one, one + 1e-9 * two), (one, 1e-9 * two - one), (one, 0 * one)]
    shapes += [(0 * one, one), (0 * one, 0 * one), (one, one - two), (one, two - 2 * one)]
    sizes = (1e-15, 1.0, 1e15)
    return [(a * f, b * r) for f, r in shapes for a in sizes for b in sizes]


def combine(
    rule: str,
    made: list[Pair],
    *,
    scope: str | None = None,
    alpha: float = 1.0,
    gamma: float = 1.0,
    options: Options = DEFAULTS,
    memory: bool = True,
) -> list[Tensor]:
    """g of each pair, which is a unit of its own, at `scope` (by default an element, or a tensor).

    `memory`: a rule with a state is in the middle of a run, with averages and mean cosines of any kind.
    """
    dice = torch.Generator().manual_seed(5)
    keys: dict[str, Any] = {"state": State(step=7)}
    if RULES[rule].averages_retain:
        keys["average"] = [memory * torch.randn(r.shape, generator=dice, dtype=torch.float64) for _, r in made]
    if RULES[rule].tracks_cosine and memory:
        keys["state"].cosines = (torch.rand(len(made), generator=dice) * 2 - 1).tolist()
    scope = scope or ("element" if RULES[rule].scope == "element" else "module")
    f, r = ([pair[task] for pair in made] for task in (0, 1))
    return synthesize(f, r, rule=rule, scope=scope, alpha=alpha, gamma=gamma, options=options, **keys)
