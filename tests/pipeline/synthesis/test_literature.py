"""The rules of the literature against TorchJD's, or the problem that their paper states, solved another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import quadprog
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchjd.aggregation import IMTLG, MGDA, AlignedMTL, ConFIG, DualProj, FairGrad, GradVacWeighting, UPGrad
from torchjd.linalg import QuadprogProjector

from pipeline.synthesis import State, synthesize
from pipeline.synthesis.rules import RULES, Options
from tests.pipeline.synthesis.literature import Pair, combine, hostile, pairs

PAIRS = pairs(60)


def close(got: Tensor, want: Tensor, pair: Pair, bound: float = 1e-6) -> None:
    assert (got - want).norm() <= bound * max(want.norm(), 1e-6 * max(x.norm() for x in pair)), pair


def exactly() -> QuadprogProjector:
    return QuadprogProjector(norm_eps=1e-30, reg_eps=1e-14)


ORACLES: dict[str, Callable[[Tensor], Any]] = {  # of the preferences (p_f, p_r)
    "mgda": lambda p: MGDA(epsilon=1e-15, max_iters=1000),
    "imtl_g": lambda p: IMTLG(),
    "conflict_free": lambda p: ConFIG(pref_vector=p),
    "aligned_mtl": lambda p: AlignedMTL(pref_vector=p),
    "upgrad": lambda p: UPGrad(pref_vector=p, projector=exactly()),
    "dualproj": lambda p: DualProj(pref_vector=p, projector=exactly()),
    "nash_mtl": lambda p: FairGrad(1.0),  # whose problem at 1 is Nash-MTL's, with the length of its formula
}


@pytest.mark.parametrize("rule", ORACLES)
@pytest.mark.parametrize("preference", [0.5, 0.2, 0.9])
def test_equals_torchjd(rule: str, preference: float) -> None:
    if preference != 0.5 and "preference" not in RULES[rule].options:
        return
    oracle = ORACLES[rule](torch.tensor([1 - preference, preference], dtype=torch.float64))
    for pair, got in zip(PAIRS, combine(rule, PAIRS, options=Options(preference=preference)), strict=True):
        # Its search for Nash-MTL's weights ends early where the two are almost opposite; the equations are below.
        close(got, oracle(torch.stack(pair)), pair, 1e-3 if rule == "nash_mtl" else 1e-6)


@pytest.mark.parametrize("rule", ["imtl_g", "conflict_free", "aligned_mtl", "upgrad", "dualproj"])
def test_a_task_without_gradient_is_what_it_is_in_torchjd(rule: str) -> None:
    one = torch.tensor([3.0, -4.0, 1.0], dtype=torch.float64)
    oracle = ORACLES[rule](torch.tensor([0.5, 0.5], dtype=torch.float64))
    for pair in ((one, 0 * one), (0 * one, one), (one, one), (0 * one, 0 * one)):
        close(combine(rule, [pair])[0], oracle(torch.stack(pair)), pair)


@pytest.mark.parametrize("centre", ["sum", "retain"])
@pytest.mark.parametrize("c", [0.0, 0.4, 0.9])
def test_cagrad_is_the_best_of_all_directions_in_its_ball(c: float, centre: str) -> None:
    """Every direction of the plane, 3e-4 apart: min(<f, d>, <r, d>) is nowhere larger, and is largest where we are."""
    angles = torch.arange(0, 2 * torch.pi, 3e-4, dtype=torch.float64)
    for pair, got in zip(PAIRS, combine("cagrad", PAIRS, options=Options(c=c, centre=centre)), strict=True):  # pyright: ignore[reportArgumentType]
        f, r = pair
        middle = (f + r) / 2 if centre == "sum" else r
        basis = torch.linalg.qr(torch.stack(pair, 1))[0]
        circle = torch.stack([angles.cos(), angles.sin()]) * c * middle.norm()
        candidates = middle[:, None] + basis @ circle
        least = torch.minimum(f @ candidates, r @ candidates)
        assert torch.minimum(f @ got, r @ got) >= least.max() - 1e-9 * f.norm() * r.norm()
        assert (got - middle).norm() <= c * middle.norm() * (1 + 1e-9)
        close(got, candidates[:, least.argmax()], pair, 1e-3)


@pytest.mark.parametrize("preference", [0.5, 0.1, 0.8])
def test_nash_and_auxinash_solve_the_bargaining_equations(preference: float) -> None:
    powers = {"nash_mtl": (1.0, 1.0), "auxinash": (1 - preference, preference)}
    for rule, power in powers.items():
        for (f, r), got in zip(PAIRS, combine(rule, PAIRS, options=Options(preference=preference)), strict=True):
            w = torch.linalg.lstsq(torch.stack([f, r], 1), got).solution  # g = w_f f + w_r r
            assert (w * torch.stack([f @ got, r @ got])).tolist() == pytest.approx(power, rel=1e-6)
            assert got.norm().item() == pytest.approx(sum(power) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(("preference", "strength"), [(0.5, 0.0), (0.5, 0.3), (1.0, 2.0), (0.2, 0.7)])
def test_sdmgrad_is_the_shortest_of_its_segment(preference: float, strength: float) -> None:
    options = Options(preference=preference, regularization=strength)
    for pair, got in zip(PAIRS, combine("sdmgrad", PAIRS, options=options), strict=True):
        f, r = pair
        drawn = strength * ((1 - preference) * f + preference * r)

        def length(w: float) -> float:
            return (w * f + (1 - w) * r + drawn).square().sum().item()  # noqa: B023

        found = minimize_scalar(length, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}).x
        best = min((0.0, 1.0, float(found)), key=length)
        close(got, (best * f + (1 - best) * r + drawn) / (1 + strength), pair, 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_barrier_and_agem_are_the_nearest_points_of_a_half_space(alpha: float) -> None:
    for pair, got, episodic in zip(
        PAIRS, combine("barrier", PAIRS, alpha=alpha, gamma=0.5), combine("agem", PAIRS, gamma=0.5), strict=True
    ):
        f, r = pair
        for found, floor in (
            (got, alpha * (r @ r)),
            (episodic, 0 * r[0]),
        ):  # the least |x - f / 2| with <x, r> >= floor
            problem = (torch.eye(len(r)).double(), 0.5 * f, r[:, None], floor[None])
            close(found, torch.from_numpy(quadprog.solve_qp(*(part.numpy() for part in problem))[0]), pair)


def test_gradvac_over_several_steps_is_the_retain_column_of_torchjds() -> None:
    """TorchJD raises both gradients: what f gets of r is its w_r - 1. Its targets here are never negative."""
    theirs, state, raised = GradVacWeighting(eps=0.0), State(), 0
    dice = torch.Generator().manual_seed(1)
    for step in range(8):
        f, r, other = (torch.randn(6, generator=dice, dtype=torch.float64) for _ in range(3))
        f = (1.5 - 0.4 * step) * r + 0.3 * other if step < 4 else f + 0.4 * r
        rows = torch.stack([f, r])
        before = state.cosines[0] if state.cosines else 0.0
        assert before >= 0
        [got] = synthesize([f], [r], rule="gradvac", state=state)
        w_r = theirs(rows @ rows.T)[1]
        close(got, f + w_r * r, (f, r))
        assert state.cosines == pytest.approx([0.5 * before + 0.5 * torch.cosine_similarity(f, r, dim=0).item()])
        raised += w_r.item() > 1 + 1e-9
    assert 2 <= raised < 8 and state.step == 8


def test_a_past_of_conflict_does_not_lower_the_bar_of_gradvac() -> None:
    """The mean is clamped at 0: after κ = -0.8 the mean of 0.5 is 0.25, not 0.05."""
    state, r = State(), torch.tensor([1.0, 0.0])
    for cosine in (-0.8, 0.5):
        synthesize([torch.tensor([cosine, (1 - cosine**2) ** 0.5])], [r], rule="gradvac", state=state)
    assert state.cosines == pytest.approx([0.25], abs=1e-6)


@pytest.mark.parametrize("rule", ["mgda", "imtl_g", "conflict_free", "sdmgrad"])
def test_a_task_that_is_done_does_not_stop_the_other(rule: str) -> None:
    zero, other = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    assert torch.equal(synthesize([zero], [other], rule=rule)[0], other)
    assert torch.equal(synthesize([other], [zero], rule=rule)[0], other)
    if "element" in RULES[rule].scopes:
        f, r = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])
        assert synthesize([f], [r], rule=rule, scope="element")[0].tolist() == [3.0, 2.0, 0.0]


@pytest.mark.parametrize("rule", ["gru", "bloop"])
def test_without_an_average_it_is_the_first_step(rule: str) -> None:
    f, r = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0])
    first = synthesize([f], [r], rule=rule, average=[torch.zeros(2)])
    assert torch.equal(synthesize([f], [r], rule=rule)[0], first[0])


def test_a_target_of_gradvac_below_zero_does_not_permit_conflict() -> None:
    f, r = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0])
    low, none = (synthesize([f], [r], rule="gradvac", state=State(cosines=[c]))[0] for c in (-0.9, 0.0))
    assert torch.equal(low, none) and torch.equal(none, synthesize([f], [r], rule="pcgrad", scope="global")[0])


@pytest.mark.parametrize("share", [None, 0.5])
def test_bloop_over_several_steps(share: float | None) -> None:
    """m <- (1 - s) m + s r; r + f less its component along m, whether they conflict or not."""
    average, m = [torch.zeros(5, dtype=torch.float64)], torch.zeros(5, dtype=torch.float64)
    s = 0.1 if share is None else share
    for step in range(4):
        f, r = (t.flatten() for t in torch.randn(2, 5, generator=torch.Generator().manual_seed(step)).double())
        options = Options(new_share=share)
        [got] = synthesize([f], [r], rule="bloop", alpha=0.7, gamma=0.3, average=average, options=options)
        m = (1 - s) * m + s * r
        close(got, 0.7 * r + 0.3 * (f - (f @ m) / (m @ m) * m), (f, r), 1e-12)
        close(average[0], m, (f, r), 1e-12)


def test_mask_forgets_where_the_signs_agree_and_nowhere_else() -> None:
    f, r = torch.tensor([1.0, -1, 1, -1, 0, 2, 0]), torch.tensor([2.0, -2, -2, 2, 3, 0, 0])
    [got] = synthesize([f], [r], rule="mask", alpha=0.5, gamma=4.0)
    assert got.tolist() == [5.0, -5.0, -1.0, 1.0, 1.5, 0.0, 0.0]


def test_barrier_by_element_is_sago_with_a_floor() -> None:
    f, r = torch.tensor([3.0, 1, -1, 0, 2, -3]), torch.tensor([2.0, 2, 2, -2, 0, -2])
    [got] = synthesize([f], [r], rule="barrier", scope="element", alpha=0.75, gamma=1.0)
    assert got.tolist() == [3.0, 1.5, 1.5, -1.5, 2.0, -3.0]


@pytest.mark.parametrize("rule", [rule for rule in RULES if "element" in RULES[rule].scopes and rule != "graddrop"])
@pytest.mark.parametrize("centre", ["sum", "retain"])
def test_an_element_is_a_tensor_of_one(rule: str, centre: str) -> None:
    """What a rule does with one number is what it does with a vector of one element: the form needs no second proof."""
    if centre == "retain" and rule != "cagrad":
        return
    f, r = (torch.cat(part) for part in zip(*pairs(30), *hostile(), strict=True))
    keys: Any = {"alpha": 0.7, "gamma": 1.3, "options": Options(centre=centre, c=0.6, preference=0.3)}  # pyright: ignore
    [whole] = combine(rule, [(f, r)], scope="element", **keys)
    single = torch.cat(combine(rule, list(zip(f.split(1), r.split(1), strict=True)), scope="module", **keys))
    assert ((whole - single).abs() <= 1e-12 * (f.abs() + r.abs())).all()


def test_graddrop_draws_by_seed_step_and_element_and_is_the_sum_on_average() -> None:
    f, r = torch.tensor([3.0, -1, 2, 0, 1] * 400), torch.tensor([-1.0, 3, 2, 5, 0] * 400)

    def draw(seed: int, step: int) -> Tensor:
        return synthesize([f], [r], rule="graddrop", options=Options(seed=seed), state=State(step=step))[0]

    first = draw(0, 0)
    assert torch.equal(first, draw(0, 0))
    clash = f * r < 0
    assert torch.equal(first[~clash], (f + r)[~clash])
    assert torch.where(clash, (first == f) | (first == r), True).all()
    for other in (draw(0, 1), draw(1, 0)):
        assert 0.2 < (other != first)[clash].double().mean() < 0.6  # 2 · 3/4 · 1/4
    mean = torch.stack([draw(2, step) for step in range(50)]).mean(0)
    assert (mean - f - r).mean().abs() < 0.02 and (mean - f - r).abs().max() < 4 * 5 * (3 / 16 / 50) ** 0.5
