"""Paper, section 3: every rule at every scope, against the formulas in exact arithmetic, and by its properties."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.synthesis import synthesize
from pipeline.synthesis.combine import Piece, Synthesis
from pipeline.synthesis.rules import RULES, SCOPES, Weights
from tests import oracle
from tests.pipeline.synthesis.specification import (
    ALL,
    LAYERS,
    MEMORYLESS,
    Case,
    cases,
    check_against_spec,
    every_rule_and_scope,
    inner,
    largest_ratio,
    positive,
    quick,
    rounding,
    seeded,
    weights,
)

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
            t + gamma * largest_ratio(forget, retain) * r.double().abs() for t, r in zip(terms, retain, strict=True)
        ]
    assert inner(got, retain) >= -rounding(got, terms, retain)


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


@pytest.mark.parametrize(
    ("rule", "scope"), [("sum", "module"), ("pcgrad", "module"), ("pcgrad", "element"), ("sago", None)]
)
def test_both_weights_times_a_number_give_the_gradient_times_it(rule: str, scope: str | None) -> None:
    """So that of alpha and gamma only the ratio matters where the length of the update does not."""
    forget, retain = seeded((5, 7), (6,))
    one = synthesize(forget, retain, rule=rule, scope=scope, alpha=1.0, gamma=0.3)
    ten = synthesize(forget, retain, rule=rule, scope=scope, alpha=10.0, gamma=3.0)
    for g, tenfold in zip(one, ten, strict=True):
        torch.testing.assert_close(10 * g, tenfold)


def test_a_new_rule_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new rule is a few lines: a function from Gramian to weights."""
    swapped = RULES["sum"]._replace(weights=lambda gramian, alpha, gamma: Weights(f=alpha, r=gamma), scope="module")
    monkeypatch.setitem(RULES, "swapped", swapped)
    forget, retain = seeded((5,), (6,))
    got = synthesize(forget, retain, rule="swapped", alpha=0.5, gamma=2.0)
    want = synthesize(forget, retain, rule="sum", alpha=2.0, gamma=0.5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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
