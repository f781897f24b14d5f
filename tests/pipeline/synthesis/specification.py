"""The rules in exact arithmetic, by the formulas of their papers, and gradients to try them on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.synthesis import synthesize

MEMORYLESS = ("sum", "sago", "pcgrad", "blur")  # gru, which has a state, is tested in test_gru.py
ALL = [(rule, scope) for rule in MEMORYLESS for scope in ("element", "module", "layer", "global")]
every_rule_and_scope = pytest.mark.parametrize(("rule", "scope"), ALL)
quick = settings(max_examples=40, deadline=None, database=None, derandomize=True)


LAYERS = ("embedding", "block", "block", "head")  # four tensors, of which the two in the middle share a layer
Case = tuple[list[Tensor], list[Tensor]]  # forget, retain: one tensor per parameter


def weights_of_spec(rule: str, ff: Fraction, fr: Fraction, rr: Fraction, alpha: Fraction, gamma: Fraction) -> Any:
    """(w_f, w_r), by the formula of each rule's paper."""
    if rule == "sum":
        return gamma, alpha
    if rule == "sago":
        return (Fraction(0), alpha) if fr < 0 else (gamma, Fraction(0))
    if rule == "blur":
        return (gamma - alpha * fr / ff if ff else gamma), alpha
    assert rule == "pcgrad"
    return (gamma, alpha - gamma * fr / rr) if fr < 0 else (gamma, alpha)


def scopes_of(scope: str, sizes: Sequence[int], layers: Sequence[str]) -> list[list[tuple[int, int]]]:
    """The coordinates (tensor, element) that are judged together."""
    key: dict[str, Callable[[int, int], Any]] = {
        "element": lambda tensor, element: (tensor, element),
        "module": lambda tensor, element: tensor,
        "layer": lambda tensor, element: layers[tensor],
        "global": lambda tensor, element: 0,
    }
    groups: dict[Any, list[tuple[int, int]]] = {}
    for tensor, size in enumerate(sizes):
        for element in range(size):
            groups.setdefault(key[scope](tensor, element), []).append((tensor, element))
    return list(groups.values())


def exact(values: Sequence[Tensor]) -> list[list[Fraction]]:
    return [[Fraction(x) for x in tensor.double().flatten().tolist()] for tensor in values]


def check_against_spec(
    case: Case, rule: str, scope: str, alpha: float, gamma: float, layers: Sequence[str] = LAYERS
) -> None:
    """Each coordinate of the result is the exact one but for the rounding of its own two terms."""
    forget, retain = case
    got = synthesize(forget, retain, rule=rule, scope=scope, alpha=alpha, gamma=gamma, layers=layers)
    f, r, g = exact(forget), exact(retain), exact(got)
    eps = Fraction(torch.finfo(got[0].dtype).eps)
    smallest = Fraction(torch.finfo(got[0].dtype).tiny)
    a, c = Fraction(alpha), Fraction(gamma)
    for members in scopes_of(scope, [t.numel() for t in forget], layers):
        ff = sum((f[t][i] ** 2 for t, i in members), Fraction(0))
        fr = sum((f[t][i] * r[t][i] for t, i in members), Fraction(0))
        rr = sum((r[t][i] ** 2 for t, i in members), Fraction(0))
        mass = sum((abs(f[t][i] * r[t][i]) for t, i in members), Fraction(0))
        if rule == "sago" and 0 < abs(fr) < mass * Fraction(1, 10**12):
            continue  # it jumps at fr = 0: leave alone what float64 sums cannot tell from 0
        w_f, w_r = weights_of_spec(rule, ff, fr, rr, a, c)
        # what the sums of float64 products may miss of fr, seen through the projection
        missed = mass * Fraction(1, 10**14) if scope != "element" else Fraction(0)
        onto_r = c * missed / rr if rr and rule == "pcgrad" else Fraction(0)
        onto_f = a * missed / ff if ff and rule == "blur" else Fraction(0)
        for t, i in members:
            want = w_f * f[t][i] + w_r * r[t][i]
            terms = abs(w_f * f[t][i]) + abs(w_r * r[t][i])
            if rule == "pcgrad" and scope == "element" and fr < 0:
                terms = abs(a * r[t][i])  # the projection is exactly 0: not even the rounding of f may remain
            if rule == "blur" and scope == "element" and ff:
                terms = abs(c * f[t][i])
            slack = onto_r * abs(r[t][i]) + onto_f * abs(f[t][i])
            slack += smallest * (abs(f[t][i]) + abs(r[t][i]))  # a weight may be too small for float32
            assert abs(g[t][i] - want) <= 2 * eps * terms + slack + smallest, (t, i, float(want))


HOSTILE = (0.0, -0.0, 1.0, -1.0, 1e15, -1e15, 1e-15, -1e-15, 3e-20, -7e12)
numbers = st.one_of(st.floats(-1000, 1000, width=32), st.sampled_from(HOSTILE))
weights = st.sampled_from((0.0, 0.1, 0.5, 1.0, 2.5))
positive = st.sampled_from((0.1, 0.5, 1.0, 2.5))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@st.composite
def cases(draw: st.DrawFn, elements: st.SearchStrategy[float] = numbers, dtypes: Sequence[Any] = DTYPES) -> Case:
    """Four tensors: empty, of one element, or more; now and then all zeros in one task."""
    dtype = draw(st.sampled_from(dtypes))
    made: Case = ([], [])
    for _ in LAYERS:
        size = draw(st.sampled_from((0, 1, 2, 5)))
        for task in made:
            row = draw(st.lists(elements, min_size=size, max_size=size))
            task.append(torch.tensor(row, dtype=dtype) * draw(st.sampled_from((0, 1, 1, 1))))
    return made


def seeded(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    dice = torch.Generator().manual_seed(seed)
    forget, retain = ([torch.randn(shape, generator=dice).to(dtype) for shape in shapes] for _ in range(2))
    return forget, retain


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


def rounding(got: Sequence[Tensor], terms: Sequence[Tensor], against: Sequence[Tensor]) -> float:
    """How far <got, against> may be off when each coordinate of `got` is rounded relative to its `terms`."""
    eps = torch.finfo(got[0].dtype).eps
    return 4 * eps * sum((t.abs() * a.double().abs()).sum().item() for t, a in zip(terms, against, strict=True)) + 1e-37


def largest_ratio(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> float:
    pairs = [(forget[i : j + 1], retain[i : j + 1]) for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (3, 3))]
    return max((inner(f, f) / inner(r, r)) ** 0.5 if inner(r, r) else 0.0 for f, r in pairs)


class Ranks:
    """Threads that play ranks; `reduce` adds a tensor up over them in place, as an all-reduce does."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.shapes: list[list[tuple[int, ...]]] = [[] for _ in range(size)]
        self.deposits: list[Tensor] = [torch.empty(0)] * size

    def run(self, work: Callable[[int, Callable[[Tensor], None]], Any]) -> list[Any]:
        def reduce_on(rank: int) -> Callable[[Tensor], None]:
            def reduce(table: Tensor) -> None:
                self.shapes[rank].append(tuple(table.shape))
                self.deposits[rank] = table.clone()
                self.barrier.wait()
                table.copy_(torch.stack(self.deposits).sum(0))
                self.barrier.wait()

            return reduce

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(rank, reduce_on(rank)), range(self.size)))


def norms(a: Tensor, b: Tensor) -> float:
    return (a.double().norm() * b.double().norm()).item()
