"""Paper, section 3: every rule at every scope, against the formulas in exact arithmetic, and by its properties."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import schema as config
from pipeline.losses.objectives import OBJECTIVES
from pipeline.synthesis import synthesize
from pipeline.synthesis.combine import COLUMNS, Piece, Synthesis, units_of
from pipeline.synthesis.geometry import Geometry
from pipeline.synthesis.rules import RULES, SCOPES, Weights
from tests import oracle

MEMORYLESS = ("sum", "sago", "pcgrad", "blur")  # gru, which has a state, is tested at the end
ALL = [(rule, scope) for rule in MEMORYLESS for scope in ("element", "module", "layer", "global")]
every_rule_and_scope = pytest.mark.parametrize(("rule", "scope"), ALL)
quick = settings(max_examples=40, deadline=None, database=None, derandomize=True)

LAYERS = ("embedding", "block", "block", "head")  # four tensors, of which the two in the middle share a layer
Case = tuple[list[Tensor], list[Tensor]]  # forget, retain: one tensor per parameter


# ---------------------------------------------------------------------------------------------------------------------
# The specification, without rounding


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


# ---------------------------------------------------------------------------------------------------------------------
# Inputs

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


# ---------------------------------------------------------------------------------------------------------------------
# Against the formulas


@every_rule_and_scope
@quick
@given(case=cases(), alpha=weights, gamma=weights)
def test_equals_the_specification(rule: str, scope: str, case: Case, alpha: float, gamma: float) -> None:
    check_against_spec(case, rule, scope, alpha, gamma)


@pytest.mark.parametrize(
    ("rule", "scope"),
    [
        ("sago", "element"),
        *((rule, scope) for rule, scope in ALL if rule != "sago" and (rule, scope) != ("blur", "element")),
    ],
)
def test_equals_the_plain_loops_formulas_on_tensors_of_many_chunks(rule: str, scope: str) -> None:
    names = ["model.embed.weight", "model.layers.0.a", "model.layers.0.b", "model.layers.1.a"]
    forget, retain = seeded((2**17 + 3,), (300, 300), (1,), (7,), dtype=torch.float64)
    layers = [oracle_layer(name) for name in names]
    got = synthesize(forget, retain, rule=rule, scope=scope, alpha=0.7, gamma=0.3, layers=layers)
    f, r = dict(zip(names, forget, strict=True)), dict(zip(names, retain, strict=True))
    want = oracle.combine(rule, scope, f, r, 0.7, 0.3)
    for name, tensor in zip(names, got, strict=True):
        torch.testing.assert_close(tensor, want[name], rtol=1e-12, atol=1e-13)


def oracle_layer(name: str) -> str:
    return ".".join(name.split(".")[:3]) if ".layers." in name else name.rsplit(".", 1)[0]


@pytest.mark.parametrize(
    ("rule", "scope"), [("sum", "global"), ("sago", "element"), ("pcgrad", "module"), ("blur", "global")]
)
def test_the_default_scope_is_the_papers(rule: str, scope: str) -> None:
    forget, retain = seeded((5,), (6,), (4, 2))
    torch.testing.assert_close(
        synthesize(forget, retain, rule=rule), synthesize(forget, retain, rule=rule, scope=scope), rtol=0, atol=0
    )


def test_the_scopes_really_differ() -> None:
    """One example by hand, alpha = gamma = 1, where pcgrad has four answers."""
    forget, retain = (
        [torch.tensor([1.0, -3.0]), torch.tensor([4.0]), torch.tensor([-1.0])],
        [torch.ones(2), torch.ones(1), torch.ones(1)],
    )
    layers = ["a", "a", "b"]
    answers = {
        scope: torch.cat(synthesize(forget, retain, rule="pcgrad", scope=scope, layers=layers)).tolist()
        for scope in SCOPES
    }
    assert answers["element"] == [2, 1, 5, 1]
    assert answers["module"] == [3, -1, 5, 1]  # <f, r> = -2, 4, -1: the first is projected with 2/2, the last with 1
    assert answers["layer"] == [2, -2, 5, 1]  # <f, r> = 2 and -1
    assert answers["global"] == [2, -2, 5, 0]  # <f, r> = 1


# ---------------------------------------------------------------------------------------------------------------------
# Properties


@quick
@given(case=cases(), alpha=positive, gamma=positive)
def test_sagos_two_parts_have_disjoint_support_and_make_up_the_result(case: Case, alpha: float, gamma: float) -> None:
    forget, retain = case
    ours = synthesize(forget, retain, rule="sago", alpha=alpha, gamma=gamma)
    from_retain = synthesize(forget, retain, rule="sago", alpha=alpha, gamma=0.0)
    from_forget = synthesize(forget, retain, rule="sago", alpha=0.0, gamma=gamma)
    for whole, r, f in zip(ours, from_retain, from_forget, strict=True):
        assert not ((r != 0) & (f != 0)).any()
        assert torch.equal(whole, r + f)


@quick
@given(case=cases(), alpha=positive, gamma=positive)
def test_no_coordinate_of_sagos_result_opposes_the_retain_gradient(case: Case, alpha: float, gamma: float) -> None:
    for g, r in zip(synthesize(*case, rule="sago", alpha=alpha, gamma=gamma), case[1], strict=True):
        assert (g.sign() * r.sign() >= 0).all()


@pytest.mark.parametrize(("rule", "scope"), [(rule, scope) for rule, scope in ALL if rule in ("sago", "pcgrad")])
@quick
@given(case=cases(), alpha=positive, gamma=positive)
def test_the_result_never_opposes_the_retain_gradient(
    rule: str, scope: str, case: Case, alpha: float, gamma: float
) -> None:
    forget, retain = case
    got = synthesize(forget, retain, rule=rule, scope=scope, alpha=alpha, gamma=gamma, layers=LAYERS)
    ff, rr = inner(forget, forget), inner(retain, retain)
    onto = (ff / rr) ** 0.5 if rr else 0.0  # at most this much of r is taken off f
    terms = [
        gamma * f.double().abs() + (alpha + gamma * (onto if scope != "element" else 0)) * r.double().abs()
        for f, r in zip(forget, retain, strict=True)
    ]
    if scope in ("module", "layer"):  # tensors do not share a scale: the ratio may be larger in one of them
        terms = [
            t + gamma * _largest_ratio(forget, retain) * r.double().abs() for t, r in zip(terms, retain, strict=True)
        ]
    assert inner(got, retain) >= -rounding(got, terms, retain)


def _largest_ratio(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> float:
    pairs = [(forget[i : j + 1], retain[i : j + 1]) for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (3, 3))]
    return max((inner(f, f) / inner(r, r)) ** 0.5 if inner(r, r) else 0.0 for f, r in pairs)


@quick
@given(
    case=cases(elements=st.floats(-1000, 1000, width=32), dtypes=(torch.float32, torch.float64)),
    alpha=positive,
    gamma=positive,
)
def test_pcgrad_on_conflict_moves_along_retention_as_retention_alone_would(
    case: Case, alpha: float, gamma: float
) -> None:
    forget, retain = case
    if inner(forget, retain) > 0:
        forget = [-f for f in forget]
    ff, fr, rr = inner(forget, forget), inner(forget, retain), inner(retain, retain)
    assume(fr < -1e-9 * (ff * rr) ** 0.5)
    got = synthesize(forget, retain, rule="pcgrad", scope="global", alpha=alpha, gamma=gamma)
    terms = [
        gamma * f.double().abs() + (alpha + gamma * (ff / rr) ** 0.5) * r.double().abs()
        for f, r in zip(forget, retain, strict=True)
    ]
    assert inner(got, retain) == pytest.approx(alpha * rr, rel=1e-9, abs=rounding(got, terms, retain))


@quick
@given(
    numbers=st.lists(st.tuples(*[st.integers(-1000, 1000)] * 4), min_size=1, max_size=8),
    alpha=st.sampled_from((0.0, 0.25, 1.0, 3.0)),
    gamma=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
    scope=st.sampled_from(SCOPES),
)
def test_sum_is_linear(numbers: list[tuple[int, ...]], alpha: float, gamma: float, scope: str) -> None:
    """Exactly, on numbers that float32 adds without rounding."""
    f, r, f2, r2 = (torch.tensor(column, dtype=torch.float32) for column in zip(*numbers, strict=True))

    def combine(forget: Tensor, retain: Tensor) -> Tensor:
        return synthesize([forget], [retain], rule="sum", scope=scope, alpha=alpha, gamma=gamma, layers=["only"])[0]

    assert torch.equal(combine(f + f2, r + r2), combine(f, r) + combine(f2, r2))
    assert torch.equal(combine(-4 * f, -4 * r), -4 * combine(f, r))
    assert torch.equal(combine(f, r), gamma * f + alpha * r)


@quick
@given(case=cases(dtypes=(torch.float32, torch.float64)), alpha=positive, gamma=positive)
def test_pcgrad_by_element_prefers_retain(case: Case, alpha: float, gamma: float) -> None:
    """The reference code's variant: alpha r on conflict, to the last bit; alpha r + gamma f on agreement."""
    forget, retain = case
    for g, f, r in zip(
        synthesize(forget, retain, rule="pcgrad", scope="element", alpha=alpha, gamma=gamma), *case, strict=True
    ):
        conflict = ((f > 0) & (r < 0)) | ((f < 0) & (r > 0))
        assert torch.equal(g[conflict], alpha * r[conflict])
        torch.testing.assert_close(g[~conflict], (alpha * r + gamma * f)[~conflict], rtol=1e-6, atol=0)


@every_rule_and_scope
@quick
@given(
    case=cases(elements=st.floats(-1000, 1000, width=16), dtypes=(torch.float32, torch.bfloat16)),
    exponent=st.sampled_from((-90, -30, 40)),
)
def test_a_power_of_two_goes_through_unchanged(rule: str, scope: str, case: Case, exponent: int) -> None:
    """combine(s f, s r) = s combine(f, r) to the last bit: what is seen of a gradient does not depend on its size."""
    forget, retain = case
    scale = 2.0**exponent

    def combine(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        return synthesize(a, b, rule=rule, scope=scope, alpha=0.5, gamma=2.0, layers=LAYERS)

    for scaled, plain in zip(
        combine([f * scale for f in forget], [r * scale for r in retain]), combine(forget, retain), strict=True
    ):
        assert torch.equal(scaled, plain * scale)


@pytest.mark.parametrize("rule", MEMORYLESS)
def test_modules_and_layers_do_not_see_each_other(rule: str) -> None:
    forget, retain = seeded((5,), (6,), (4, 2), (1,))
    forget[0] *= 1e15  # next to the others, it would drown them
    retain[0] *= 1e15
    whole = synthesize(forget, retain, rule=rule, scope="module")
    alone = [synthesize([f], [r], rule=rule, scope="module")[0] for f, r in zip(forget, retain, strict=True)]
    torch.testing.assert_close(whole, alone, rtol=0, atol=0)
    whole = synthesize(forget, retain, rule=rule, scope="layer", layers=LAYERS)
    parts = [synthesize(forget[a:b], retain[a:b], rule=rule, scope="global") for a, b in ((0, 1), (1, 3), (3, 4))]
    torch.testing.assert_close(whole, [tensor for part in parts for tensor in part], rtol=0, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_blur_moves_along_forgetting_as_forgetting_alone_would(scope: str) -> None:
    """<f, g> = gamma ||f||²: there is no sign test, forgetting has priority. Where f = 0 retention acts alone."""
    forget, retain = seeded((5,), (6,), (4, 2), (1,), dtype=torch.float64)
    forget[1][2] = 0.0
    got = synthesize(forget, retain, rule="blur", scope=scope, alpha=0.5, gamma=2.0, layers=LAYERS)
    assert inner(got, forget) == pytest.approx(2.0 * inner(forget, forget), rel=1e-12)
    assert got[1][2] == 0.5 * retain[1][2]


def test_a_new_rule_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new rule is a few lines: a function from Gramian to weights."""
    swapped = RULES["sum"]._replace(weights=lambda gramian, alpha, gamma: Weights(f=alpha, r=gamma), scope="module")
    monkeypatch.setitem(RULES, "swapped", swapped)
    forget, retain = seeded((5,), (6,))
    got = synthesize(forget, retain, rule="swapped", alpha=0.5, gamma=2.0)
    want = synthesize(forget, retain, rule="sum", alpha=2.0, gamma=0.5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
def test_conflict_is_seen_where_the_product_would_underflow(dtype: torch.dtype, scope: str) -> None:
    forget, retain = [torch.tensor([1e-30, 1e-30], dtype=dtype)], [torch.tensor([-1e-30, -2e-30], dtype=dtype)]
    assert (forget[0] * retain[0] == 0).all()
    sago, pcgrad = (
        synthesize(forget, retain, rule=rule, scope=scope, alpha=2.0, layers=["only"])[0] for rule in ("sago", "pcgrad")
    )
    assert torch.equal(sago, 2 * retain[0])
    f, r = forget[0].double(), retain[0].double()
    off = torch.zeros(2).double() if scope == "element" else f - (f @ r) / (r @ r) * r
    torch.testing.assert_close(pcgrad.double(), 2 * r + off, rtol=2 * torch.finfo(dtype).eps, atol=1e-37)


@pytest.mark.parametrize(
    ("rule", "scope", "answer"),
    [
        ("sum", "global", [0.0, 0.0, 2e-15, 2e15]),
        ("sago", "element", [-1e15, 1e-15, 1e-15, 1e15]),
        ("pcgrad", "element", [-1e15, 1e-15, 2e-15, 2e15]),
    ],
)
def test_small_coordinates_survive_beside_large_ones(rule: str, scope: str, answer: list[float]) -> None:
    forget, retain = torch.tensor([1e15, -1e-15, 1e-15, 1e15]), torch.tensor([-1e15, 1e-15, 1e-15, 1e15])
    got = synthesize([forget], [retain], rule=rule, scope=scope)[0]
    assert torch.equal(got, torch.tensor(answer))


@every_rule_and_scope
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_task_without_gradient(rule: str, scope: str, zero: float) -> None:
    """Nothing to project on, nothing to conflict with, and never NaN."""
    some, none = [torch.tensor([1.0, -2.0]), torch.tensor([3.0])], [torch.full((2,), zero), torch.full((1,), zero)]
    keys: dict[str, Any] = {"rule": rule, "scope": scope, "alpha": 0.5, "gamma": 0.25, "layers": ["a", "b"]}
    weight_of_retain = 0.0 if rule == "sago" else 0.5  # the literal rule sends f·r = 0 to the forget side
    for got, want in (
        (synthesize(some, none, **keys), [0.25 * s for s in some]),
        (synthesize(none, some, **keys), [weight_of_retain * s for s in some]),
        (synthesize(none, none, **keys), [0 * s for s in some]),
    ):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_zero_forget_literal_and_retain(scope: str) -> None:
    """Where the forget gradient is 0 on the whole scope: 0 (the paper) or alpha r. Elsewhere the two agree."""
    forget = [torch.tensor([0.0, 1.0, -1.0, -0.0]), torch.tensor([0.0, -0.0]), torch.tensor([2.0])]
    retain = [torch.tensor([3.0, 3.0, 3.0, -3.0]), torch.tensor([-4.0, 4.0]), torch.tensor([0.0])]
    layers = ["a", "b", "c"]

    def combine(zero_forget: str, rule: str = "sago") -> list[list[float]]:
        got = synthesize(
            forget, retain, rule=rule, scope=scope, alpha=0.5, gamma=2.0, zero_forget=zero_forget, layers=layers
        )
        return [tensor.tolist() for tensor in got]

    if scope == "element":
        assert combine("literal") == [[0, 2, 1.5, 0], [0, 0], [4]]
        assert combine("retain") == [[1.5, 2, 1.5, -1.5], [-2, 2], [4]]
    elif scope == "global":  # <f, r> = 0 and ||f|| > 0: the forget side, either way
        assert combine("literal") == combine("retain") == [[0, 2, -2, 0], [0, 0], [4]]
    else:
        assert combine("literal") == [[0, 2, -2, 0], [0, 0], [4]]
        assert combine("retain") == [[0, 2, -2, 0], [-2, 2], [4]]
    for rule in ("sum", "pcgrad"):
        assert combine("literal", rule) == combine("retain", rule)


def test_zero_forget_does_not_count_as_conflict() -> None:
    forget, retain = torch.tensor([0.0, 1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    table = Synthesis("sago", zero_forget="retain").combine_([Piece(0, forget, retain)], [0])
    assert Geometry.of(table, 4).conflict_fraction == 0.25


@every_rule_and_scope
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("task", ["forget", "retain", "both"])
def test_non_finite_values_are_refused(rule: str, scope: str, bad: float, task: str) -> None:
    """Wherever they are, and also where SAGO's gate would have hidden them behind a finite number."""
    for tensor, element in ((0, 0), (1, 2), (2, 0)):
        for sign in (1.0, -1.0):  # an agreeing and an opposing partner
            forget, retain = [torch.ones(1), torch.ones(3), torch.ones(2, 1)], [torch.ones(1), torch.ones(3)]
            retain.append(torch.ones(2, 1))
            retain = [sign * r for r in retain]
            for name, gradients in (("forget", forget), ("retain", retain)):
                if task in (name, "both"):
                    gradients[tensor].view(-1)[element] = bad
            with pytest.raises(FloatingPointError, match="inf or NaN"):
                synthesize(forget, retain, rule=rule, scope=scope, layers=["a", "a", "b"])


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, dtypes, arguments


@every_rule_and_scope
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_kept_and_inputs_are_not_touched(rule: str, scope: str, dtype: torch.dtype) -> None:
    forget, retain = seeded((), (0,), (1,), (3, 2), (0, 4), (2, 1, 3), dtype=dtype)
    for tensor in (*forget, *retain):
        tensor.requires_grad_()
    before = [[t.detach().clone() for t in task] for task in (forget, retain)]
    got = synthesize(forget, retain, rule=rule, scope=scope, layers=range(6))
    assert [(g.dtype, g.shape, g.requires_grad) for g in got] == [(dtype, r.shape, False) for r in retain]
    for task, saved in zip((forget, retain), before, strict=True):
        for now, then in zip(task, saved, strict=True):
            assert torch.equal(now, then)
    for g, f, r in zip(got, forget, retain, strict=True):
        assert not g.numel() or g.data_ptr() not in (f.data_ptr(), r.data_ptr())


@every_rule_and_scope
def test_float64_is_computed_in_float64(rule: str, scope: str) -> None:
    """1 + 1e-12 and 1e-60 do not exist in float32."""
    forget = [torch.tensor([1 + 1e-12, -3.0, 1e-60], dtype=torch.float64)]
    retain = [torch.tensor([1 + 2e-12, 1.0, -1e-60], dtype=torch.float64)]
    check_against_spec((forget, retain), rule, scope, 0.3, 0.7, ["only"])


@every_rule_and_scope
def test_bfloat16_gramians_are_not_summed_in_bfloat16(rule: str, scope: str) -> None:
    """4096 small agreements against one larger conflict: in bf16 the sum of ones stops growing at 256."""
    forget = [torch.cat([torch.ones(4096), torch.tensor([-64.0])]).bfloat16()]
    retain = [torch.cat([torch.ones(4096), torch.tensor([60.0])]).bfloat16()]
    assert inner(forget, retain) == 256 == 4096 - 64 * 60
    check_against_spec((forget, retain), rule, scope, 1.0, 1.0, ["only"])


@every_rule_and_scope
def test_memory_layout_does_not_matter(rule: str, scope: str) -> None:
    forget, retain = seeded((4, 6), (5, 4), (3, 3))
    strided = (
        [forget[0].t().contiguous().t(), torch.stack([forget[1]] * 2, -1)[..., 0], forget[2]],
        [retain[0], retain[1].t().contiguous().t(), torch.stack([retain[2]] * 3)[1]],
    )
    assert not strided[0][0].is_contiguous() and not strided[0][1].is_contiguous() and not strided[1][1].is_contiguous()
    expanded = ([*strided[0], torch.ones(1).expand(5)], [*strided[1], -torch.ones(1).expand(5)])
    plain = ([*forget, torch.ones(5)], [*retain, -torch.ones(5)])
    keys: dict[str, Any] = {"rule": rule, "scope": scope, "alpha": 0.5, "layers": LAYERS}
    for a, b in zip(synthesize(*expanded, **keys), synthesize(*plain, **keys), strict=True):
        assert torch.equal(a, b)


@every_rule_and_scope
def test_the_two_lists_may_share_tensors(rule: str, scope: str) -> None:
    tensor = torch.tensor([1.0, -2.0, 0.0])
    got = synthesize([tensor], [tensor], rule=rule, scope=scope, alpha=0.5, gamma=2.0, layers=["only"])[0]
    assert torch.equal(got, (2.0 if rule in ("sago", "blur") else 2.5) * tensor)
    assert tensor.tolist() == [1.0, -2.0, 0.0]


def test_what_is_unknown_is_refused_with_the_valid_names() -> None:
    tensors = [torch.ones(2)]
    refused: list[tuple[dict[str, Any], Any]] = [
        ({"rule": "sagoo"}, RULES),
        ({"rule": ""}, RULES),
        ({"rule": "sago", "scope": "elements"}, SCOPES),
        ({"rule": "sago", "zero_forget": "both"}, ("literal", "retain")),
    ]
    for keys, valid in refused:
        with pytest.raises(ValueError) as error:
            synthesize(tensors, tensors, **keys)
        assert all(name in str(error.value) for name in valid)
        assert repr(list(keys.values())[-1]) in str(error.value)


def test_lists_that_do_not_match_are_refused() -> None:
    two, three = torch.ones(2), torch.ones(3)
    for forget, retain in (
        ([two], [three]),
        ([two], [two, two]),
        ([two, two], [two]),
        ([two, three], [three, two]),
        ([torch.ones(2, 3)], [torch.ones(3, 2)]),
        ([torch.ones(1)], [torch.ones(4)]),
    ):
        with pytest.raises(ValueError, match="shape"):
            synthesize(forget, retain, rule="sago")


def test_scope_layer_needs_the_layer_of_each_tensor() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    for layers in (None, [], ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="layers"):
            synthesize(tensors, tensors, rule="pcgrad", scope="layer", layers=layers)


def test_the_configuration_offers_exactly_what_there_is() -> None:
    def choices(section: type, key: str) -> set[str]:
        found: set[str] = set()
        todo = [section.model_fields[key].annotation]  # type: ignore[attr-defined]
        while todo:
            option = todo.pop()
            found |= {option} if isinstance(option, str) else set()
            todo += get_args(option)
        return found

    assert choices(config.Synthesis, "rule") == set(RULES)
    assert choices(config.Synthesis, "scope") == set(SCOPES)
    for name in choices(config.Synthesis, "zero_forget"):
        Synthesis("sago", zero_forget=name)
    objectives = choices(config.Objective, "forget") | choices(config.Objective, "retain")
    assert objectives - {"none"} == set(OBJECTIVES)


# ---------------------------------------------------------------------------------------------------------------------
# Shards: any split over any ranks, one reduction, the same answer


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


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


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
    scale = (gamma + alpha * _largest_ratio(retain, forget) * (rule == "blur")) * f.norm().item()
    scale += (alpha + gamma * _largest_ratio(forget, retain) * (rule == "pcgrad")) * r.norm().item()
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
    assert part.cos_forget_retain == pytest.approx(inner(forget[1:2], retain[1:2]) / _norms(forget[1], retain[1]))
    assert part.cos_combined_retain == pytest.approx(inner(combined[1:2], retain[1:2]) / _norms(combined[1], retain[1]))
    assert part.combined_norm == pytest.approx(combined[1].double().norm().item(), rel=1e-6)


def _norms(a: Tensor, b: Tensor) -> float:
    return (a.double().norm() * b.double().norm()).item()


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


# ---------------------------------------------------------------------------------------------------------------------
# GRU: conflict is judged against a moving average of the retain gradient (arXiv 2503.09117)

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


def test_gru_needs_an_average_and_a_scope_that_has_one() -> None:
    two = [torch.ones(2)]
    for average in (None, [], [torch.ones(3)], [torch.ones(2), torch.ones(2)]):
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
    assert geometry.cos_forget_retain == pytest.approx((f @ r).item() / _norms(f, r))
    assert geometry.cos_combined_forget == pytest.approx((g @ f).item() / _norms(g, f))
    assert geometry.cos_combined_retain == pytest.approx((g @ r).item() / _norms(g, r))
    assert geometry.combined_norm == pytest.approx(g.norm().item())
    assert geometry.conflict_fraction == pytest.approx(((f * r) < 0).double().mean().item())


# ---------------------------------------------------------------------------------------------------------------------
# Known faults


def test_a_retain_gradient_that_almost_vanished() -> None:
    """||f|| / ||r|| = 1e40: the weights 1 and 1e40 are finite, f and r are, and so is g = alpha r + 0."""
    got = synthesize([torch.tensor([1e10])], [torch.tensor([-1e-30])], rule="pcgrad", scope="module")[0]
    assert torch.isfinite(got).all() and got.abs() < 1e5  # the rounding of 1e10 - 1e10


def test_a_sum_that_overflows_is_not_called_finite() -> None:
    retain = torch.tensor([3e38])
    table = Synthesis("sum").combine_([Piece(0, torch.tensor([3e38]), retain)], [0])
    assert torch.isfinite(retain).all() or not Geometry.of(table, 1).finite


@pytest.mark.parametrize("scope", SCOPES)
def test_no_tensors_at_all(scope: str) -> None:
    assert synthesize([], [], rule="pcgrad", scope=scope, layers=[]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Where the gradients lie


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", RULES)
def test_a_forget_buffer_in_host_memory_gives_the_same(rule: str) -> None:
    """More than two chunks of a GPU; result and state are bit-identical to those of a forget buffer on the device."""
    size = 2**23 + 5
    f, r, m = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    made = []
    for place in (lambda x: x.cuda(), lambda x: x.clone().pin_memory()):
        average = place(m) if RULES[rule].averages_retain else None
        combined = r.cuda()
        table = Synthesis(rule).combine_([Piece(0, place(f), combined, average)], [0])
        made.append([table.cpu(), combined.cpu(), torch.zeros(0) if average is None else average.cpu()])
    for device, host in zip(*made, strict=True):
        assert torch.equal(device, host)
