"""GRU: conflict is judged against a moving average of the retain gradient (arXiv 2503.09117)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.synthesis import synthesize
from pipeline.synthesis.combine import Piece, Synthesis, units_of
from pipeline.synthesis.geometry import Geometry
from tests.pipeline.synthesis.specification import ALL, LAYERS, Ranks, inner, norms, seeded

gru_scopes = pytest.mark.parametrize("scope", ["module", "layer", "global"])
SHAPES = ((5,), (6,), (4, 2), (1,))


def gru_from_formula(scope: str, forget: Any, retain: Any, m: list[Tensor], alpha: float, gamma: float) -> Any:
    """(g, new m) in float64: m <- 0.8 r + 0.2 m; f loses its component along m if <f, m> < 0; alpha r is added."""
    new = [0.8 * r.double() + 0.2 * old.double() for r, old in zip(retain, m, strict=True)]
    units = units_by_name(scope)
    combined = []
    for unit, f, r, average in zip(units, forget, retain, new, strict=True):
        members = [index for index, other in enumerate(units) if other == unit]
        fm = sum((forget[k].double() * new[k]).sum() for k in members)
        mm = sum((new[k] * new[k]).sum() for k in members)
        off = f.double() - fm / mm * average if fm < 0 else f.double()
        combined.append(gamma * off + alpha * r.double())
    return combined, new


def units_by_name(scope: str) -> Sequence[Any]:
    return {"module": range(4), "layer": LAYERS, "global": [0] * 4}[scope]


@gru_scopes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gru_over_several_steps(scope: str, dtype: torch.dtype) -> None:
    average = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    m = [a.double().clone() for a in average]
    conflicts = 0
    for step in range(5):
        forget, retain = seeded(*SHAPES, dtype=dtype, seed=step)
        got = synthesize(forget, retain, rule="gru", scope=scope, alpha=0.5, gamma=2.0, layers=LAYERS, average=average)
        want, m = gru_from_formula(scope, forget, retain, m, 0.5, 2.0)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close([g.double() for g in got], want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close([a.double() for a in average], m, rtol=tolerance, atol=tolerance)
        off = [(g.double() - 0.5 * r.double()) / 2.0 for g, r in zip(got, retain, strict=True)]
        assert inner(off, m) >= -1e-5 or scope != "global"  # the guarantee of its paper
        conflicts += inner(forget, m) < 0
    assert 0 < conflicts < 5  # both branches were seen


def test_grus_first_average_is_four_fifths_of_the_gradient() -> None:
    average = [torch.zeros(2)]
    synthesize([torch.ones(2)], [torch.tensor([1.0, -10.0])], rule="gru", average=average)
    torch.testing.assert_close(average[0], torch.tensor([0.8, -8.0]))


@gru_scopes
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gru_on_shards_equals_gru_on_whole_tensors(scope: str, ranks: int) -> None:
    forget, retain = seeded(*SHAPES, dtype=torch.float64)
    start = seeded(*SHAPES, dtype=torch.float64, seed=9)[0]
    whole_average = [a.clone() for a in start]
    whole = synthesize(forget, retain, rule="gru", scope=scope, layers=LAYERS, average=whole_average)
    flat = [[t.clone().flatten() for t in tensors] for tensors in (forget, retain, start)]
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for row, (f, r, m) in enumerate(zip(*flat, strict=True)):
        for rank, parts in enumerate(zip(*(t.tensor_split(ranks) for t in (f, r, m)), strict=True)):
            pieces[rank].append(Piece(row, *parts))
    group, synthesis = Ranks(ranks), Synthesis("gru", scope)
    group.run(lambda rank, reduce: synthesis.combine_(pieces[rank], units_of(scope, LAYERS), reduce))
    assert [len(shapes) for shapes in group.shapes] == [1] * ranks
    for mine, theirs in zip(flat[1] + flat[2], whole + whole_average, strict=True):
        torch.testing.assert_close(mine, theirs.flatten(), rtol=1e-12, atol=1e-13)


def test_gru_on_a_step_that_is_skipped_keeps_its_average() -> None:
    average = [torch.ones(2)]
    for bad in (torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0])):
        for forget, retain in ((bad, torch.ones(2)), (torch.ones(2), bad)):
            with pytest.raises(FloatingPointError):
                synthesize([forget], [retain], rule="gru", average=average)
            assert average[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("rule", "scope"), [*ALL, ("gru", "module"), ("gru", "layer"), ("gru", "global")])
def test_a_loss_scale_that_moves_leaves_no_trace(rule: str, scope: str) -> None:
    """Powers of two are exact: gradients times a scale give the combined gradient times it, and the same average."""
    shapes, units = ((3, 5), (2,), (40,), (7,)), units_of(scope, LAYERS)
    found: dict[bool, list[Any]] = {False: [], True: []}
    for scaled, seen in found.items():
        averages = [torch.zeros(torch.Size(shape).numel()) if rule == "gru" else None for shape in shapes]
        for step, moved in enumerate((2.0**16, 2.0**17, 2.0**12)):
            scale = moved if scaled else 1.0
            f, r = ([t.flatten() * scale for t in task] for task in seeded(*shapes, seed=step))
            pieces = [Piece(row, *piece) for row, piece in enumerate(zip(f, r, averages, strict=True))]
            table = Synthesis(rule, scope, 0.7, 0.9).combine_(pieces, units, scale=scale)
            geometry = Geometry.of(table, 64, scale)
            seen.append((geometry, [t / scale for t in r], [m.clone() for m in averages if m is not None]))
    for (one, *tensors), (other, *others) in zip(found[False], found[True], strict=True):
        assert one == other
        for some, same in zip(tensors, others, strict=True):
            assert all(map(torch.equal, some, same))


def test_an_average_that_does_not_fit_and_a_scope_without_one_are_refused() -> None:
    two = [torch.ones(2)]
    for average in ([], [torch.ones(3)], [torch.ones(2), torch.ones(2)]):
        with pytest.raises(ValueError, match="average"):
            synthesize(two, two, rule="gru", average=average)
    with pytest.raises(ValueError, match="element"):
        synthesize(two, two, rule="gru", scope="element", average=[torch.zeros(2)])


@gru_scopes
def test_geometry_under_gru_describes_the_result(scope: str) -> None:
    forget, retain = seeded((40,), (30,), (20,), (10,), dtype=torch.float64)
    average = seeded((40,), (30,), (20,), (10,), dtype=torch.float64, seed=5)[0]
    combined = [r.clone() for r in retain]
    pieces = [Piece(row, *three) for row, three in enumerate(zip(forget, combined, average, strict=True))]
    table = Synthesis("gru", scope, 0.5, 2.0).combine_(pieces, units_of(scope, LAYERS))
    geometry = Geometry.of(table, 100)
    f, r, g = (torch.cat(task) for task in (forget, retain, combined))
    assert geometry.cos_forget_retain == pytest.approx((f @ r).item() / norms(f, r))
    assert geometry.cos_combined_forget == pytest.approx((g @ f).item() / norms(g, f))
    assert geometry.cos_combined_retain == pytest.approx((g @ r).item() / norms(g, r))
    assert geometry.combined_norm == pytest.approx(g.norm().item())
    assert geometry.conflict_fraction == pytest.approx(((f * r) < 0).double().mean().item())
