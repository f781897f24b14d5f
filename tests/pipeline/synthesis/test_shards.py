"""Shards: any split over any ranks, one reduction, the same answer; and the geometry that comes with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.synthesis import synthesize
from pipeline.synthesis.combine import COLUMNS, Piece, Synthesis, units_of
from pipeline.synthesis.geometry import Geometry
from tests.pipeline.synthesis.specification import (
    LAYERS,
    Case,
    Ranks,
    cases,
    every_rule_and_scope,
    inner,
    largest_ratio,
    norms,
    quick,
    seeded,
    weights,
)


@every_rule_and_scope
@settings(quick, max_examples=15)
@given(data=st.data(), ranks=st.integers(1, 4), zero_forget=st.sampled_from(("literal", "retain")))
def test_shards_of_any_cut_give_what_whole_tensors_give(
    rule: str, scope: str, data: st.DataObject, ranks: int, zero_forget: str
) -> None:
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=4, max_size=4))
    forget, retain = seeded(*[(size,) for size in sizes], seed=data.draw(st.integers(0, 99)))
    keys: dict[str, Any] = {"alpha": 0.5, "gamma": 2.0, "zero_forget": zero_forget}
    whole = synthesize(forget, retain, rule=rule, scope=scope, layers=LAYERS, **keys)
    here = [r.clone() for r in retain]  # each rank owns some views of it
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for row, size in enumerate(sizes):
        cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
        for start, end in zip([0, *cuts], [*cuts, size], strict=True):
            pieces[data.draw(st.integers(0, ranks - 1))].append(
                Piece(row, forget[row][start:end], here[row][start:end])
            )
    synthesis, units, group = Synthesis(rule, scope, **keys), units_of(scope, LAYERS), Ranks(ranks)
    pieces = [data.draw(st.permutations(mine)) for mine in pieces]
    tables = group.run(lambda rank, reduce: synthesis.combine_(pieces[rank], units, reduce))
    assert (
        group.shapes == [[(4, len(COLUMNS))]] * ranks
    )  # one reduction of a few numbers per parameter, whatever their sizes
    assert all(torch.equal(table, tables[0]) for table in tables)
    for mine, theirs in zip(here, whole, strict=True):
        if scope == "element" or rule == "sum":
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rule", "scope"), [("pcgrad", "module"), ("pcgrad", "global"), ("sago", "module")])
def test_conflict_is_judged_on_the_whole_and_not_on_one_ranks_part(rule: str, scope: str) -> None:
    """Rank 0 alone sees agreement, together there is conflict. Rank-local sums would combine differently per rank."""
    forget, retain = torch.tensor([1.0, 1.0, -5.0]), torch.ones(3)
    here = retain.clone()
    pieces = [[Piece(0, forget[:2], here[:2])], [Piece(0, forget[2:], here[2:])], []]
    tables = Ranks(3).run(lambda rank, reduce: Synthesis(rule, scope).combine_(pieces[rank], [0], reduce))
    want = retain if rule == "sago" else forget + 2 * retain  # <f, r> = -3, ||r||² = 3
    torch.testing.assert_close(here, want)
    assert {table[0].tolist()[COLUMNS.index("fr")] for table in tables} == {-3.0}


@every_rule_and_scope
def test_padding_contributes_nothing(rule: str, scope: str) -> None:
    forget, retain = seeded((5,), (3,))
    keys: dict[str, Any] = {"rule": rule, "scope": scope}
    plain = synthesize(forget, retain, **keys, layers=["a", "b"])
    padded = [[torch.cat([t, torch.zeros(3)]) for t in task] for task in (forget, retain)]
    got = synthesize(*padded, **keys, layers=["a", "b"])
    for g, p in zip(got, plain, strict=True):
        torch.testing.assert_close(g[: len(p)], p, rtol=1e-6, atol=1e-7)
        assert (g[len(p) :] == 0).all()


@every_rule_and_scope
def test_every_rank_learns_that_one_of_them_is_not_finite(rule: str, scope: str) -> None:
    forget, retain = torch.tensor([1.0, float("nan")]), torch.tensor([-1.0, 2.0])
    here = retain.clone()
    pieces = [[Piece(0, forget[:1], here[:1])], [Piece(0, forget[1:], here[1:])], []]
    tables = Ranks(3).run(lambda rank, reduce: Synthesis(rule, scope).combine_(pieces[rank], [0], reduce))
    assert [Geometry.of(table, 2).finite for table in tables] == [False] * 3
    if scope != "element":
        assert torch.equal(here, retain)  # left alone


@every_rule_and_scope
@quick
@given(
    case=cases(elements=st.floats(-100, 100, width=16), dtypes=(torch.float32, torch.float64)),
    alpha=weights,
    gamma=weights,
)
def test_geometry_describes_the_result(rule: str, scope: str, case: Case, alpha: float, gamma: float) -> None:
    forget, retain = case
    combined = [r.clone() for r in retain]
    pieces = [Piece(row, f, g) for row, (f, g) in enumerate(zip(forget, combined, strict=True))]
    table = Synthesis(rule, scope, alpha, gamma).combine_(pieces, units_of(scope, LAYERS))
    number = sum(f.numel() for f in forget)
    geometry = Geometry.of(table, number)
    assert geometry.finite
    f, r, g = (torch.cat([t.double() for t in task]) for task in (forget, retain, combined))
    for norm, vector in ((geometry.forget_norm, f), (geometry.retain_norm, r)):
        assert norm == pytest.approx(vector.norm().item(), rel=1e-12)
    # g itself is rounded, and the sharper the cancellation the more of it is rounding
    scale = (gamma + alpha * largest_ratio(retain, forget) * (rule == "blur")) * f.norm().item()
    scale += (alpha + gamma * largest_ratio(forget, retain) * (rule == "pcgrad")) * r.norm().item()
    assert geometry.combined_norm == pytest.approx(g.norm().item(), rel=1e-6, abs=1e-6 * scale)
    for cosine, a, b in (
        (geometry.cos_forget_retain, f, r),
        (geometry.cos_combined_forget, g, f),
        (geometry.cos_combined_retain, g, r),
    ):
        if not a.norm() or not b.norm():
            assert cosine == 0 or a is g
        elif a is not g or g.norm() > 1e-2 * scale:
            assert cosine == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-4)
    conflicts = ((f > 0) & (r < 0)) | ((f < 0) & (r > 0))
    assert geometry.conflict_fraction == (conflicts.double().mean().item() if number else 0)


def test_geometry_of_a_subset_of_rows_is_that_of_the_subset() -> None:
    forget, retain = seeded((50,), (60,), (70,))
    combined = [r.clone() for r in retain]
    pieces = [Piece(row, f, g) for row, (f, g) in enumerate(zip(forget, combined, strict=True))]
    table = Synthesis("sago").combine_(pieces, [0, 1, 2])
    part = Geometry.of(table[1:2], 60)
    assert part.cos_forget_retain == pytest.approx(inner(forget[1:2], retain[1:2]) / norms(forget[1], retain[1]))
    assert part.cos_combined_retain == pytest.approx(inner(combined[1:2], retain[1:2]) / norms(combined[1], retain[1]))
    assert part.combined_norm == pytest.approx(combined[1].double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_geometry_neither_underflows_nor_overflows(scale: float) -> None:
    forget, retain = [scale * torch.tensor([3.0, -4.0])], [scale * torch.tensor([3.0, 4.0])]
    combined = retain[0].clone()
    geometry = Geometry.of(Synthesis("sago").combine_([Piece(0, forget[0], combined)], [0]), 2)
    assert geometry.finite
    assert geometry.forget_norm == pytest.approx(5 * scale, rel=1e-6)
    assert geometry.cos_forget_retain == pytest.approx(-7 / 25, rel=1e-6)
    assert geometry.cos_combined_retain == pytest.approx(1.0, rel=1e-6)
    assert geometry.conflict_fraction == 0.5
