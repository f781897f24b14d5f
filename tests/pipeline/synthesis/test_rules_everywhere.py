"""Every rule, on every scope that it has: hostile numbers, any cut into shards, weights, and the table of the docs."""

from __future__ import annotations

import re
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from pipeline.config import rules as config
from pipeline.config.schema import REPOSITORY
from pipeline.synthesis import State, synthesize, windows
from pipeline.synthesis.combine import Piece, Synthesis, units_of
from pipeline.synthesis.elements import FORMS, uniform
from pipeline.synthesis.rules import RULES, SCOPES, Options
from tests.pipeline.synthesis.literature import AVERAGING, NEW, combine, hostile, pairs
from tests.pipeline.synthesis.specification import LAYERS, Ranks, seeded

EVERYWHERE = [(rule, scope) for rule in NEW for scope in RULES[rule].scopes]
every_rule_and_scope = pytest.mark.parametrize(("rule", "scope"), EVERYWHERE)
SHAPES = ((50,), (7, 3), (300,), (1,))


# -- hostile numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [False, True])
def test_nothing_is_made_of_nothing(rule: str, dtype: torch.dtype, memory: bool) -> None:
    """Zeros, parallel and opposite gradients, 1e±15: finite; and where both are 0, so is the combination."""
    cases = [(f.to(dtype), r.to(dtype)) for f, r in hostile()]
    for scope in RULES[rule].scopes if not memory else (None,):
        scopes = {"layer": None, "global": None}.get(scope or "", scope)  # a pair is a unit of its own
        for (f, r), got in zip(cases, combine(rule, cases, scope=scopes, memory=memory), strict=True):
            assert torch.isfinite(got).all()
            if not f.any() and not r.any() and not (memory and rule in AVERAGING):
                assert not got.any()


@pytest.mark.parametrize("rule", NEW)
def test_both_scaled_alike(rule: str) -> None:
    """Of degree 1: g is scaled as they are. Of degree 0: not at all. Powers of two are exact."""
    cases = pairs(20)
    for exponent in (-90, -30, 40):
        scale, degree = 2.0**exponent, computed_properties(rule)["degree"]
        scaled = combine(rule, [(scale * f, scale * r) for f, r in cases], memory=rule not in AVERAGING)
        plain = combine(rule, cases, memory=rule not in AVERAGING)
        assert all(torch.equal(a, b * scale ** int(degree)) for a, b in zip(scaled, plain, strict=True))


@pytest.mark.parametrize("rule", [rule for rule in NEW if rule not in ("agem", "barrier")])
def test_alpha_and_gamma_scale_the_gradients_before_the_rule(rule: str) -> None:
    cases, options = pairs(30), Options(preference=0.3, c=0.7)
    memory = rule not in AVERAGING  # whose average is of r itself
    weighted = combine(rule, cases, alpha=0.7, gamma=0.2, options=options, memory=memory)
    scaled = combine(rule, [(0.2 * f, 0.7 * r) for f, r in cases], options=options, memory=memory)
    torch.testing.assert_close(weighted, scaled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", NEW)
def test_weights_of_0_are_allowed(rule: str) -> None:
    for alpha, gamma in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        assert all(torch.isfinite(g).all() for g in combine(rule, pairs(20), alpha=alpha, gamma=gamma))


def test_a_loss_scale_leaves_no_trace() -> None:
    """fp16 multiplies both gradients by it: the combination is multiplied too, also of a rule of degree 0."""
    for rule in NEW:
        (f, r), found = pairs(1)[0], []
        for scale in (1.0, 2.0**16):
            g, m = r * scale, torch.ones_like(r) if rule in AVERAGING else None
            state = State(cosines=[0.4])
            Synthesis(rule).combine_([Piece(0, f * scale, g, m)], [0], scale=scale, state=state)
            found.append([g / scale, *([] if m is None else [m]), torch.tensor([state.step, *state.cosines])])
        assert all(map(torch.equal, *found)), rule


# -- shards ------------------------------------------------------------------------------------------------------------


@every_rule_and_scope
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_give_what_whole_tensors_give(
    rule: str, scope: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, with the rule's memory; each tensor is cut over the ranks, its parts come in another order."""
    monkeypatch.setattr(windows, "eager_window", lambda device: 128)
    windows.plan.cache_clear()
    units, averages = units_of(scope, LAYERS), [torch.zeros(torch.Size(s).numel()).double() for s in SHAPES]
    synthesis = Synthesis(rule, scope, 0.7, 0.9, options=Options(seed=3))
    whole, state = [m.clone().view(s) for m, s in zip(averages, SHAPES, strict=True)], State()
    states = [State() for _ in range(ranks)]
    starts = [0, *accumulate(len(m) for m in averages)]
    for step in range(3):
        forget, retain = seeded(*SHAPES, dtype=torch.float64, seed=step)
        forget[1] = forget[1] + (2 - 2 * step) * retain[1]
        keys: dict[str, Any] = {"average": whole} if rule in AVERAGING else {}
        keys |= {"rule": rule, "scope": scope, "alpha": 0.7, "gamma": 0.9, "layers": LAYERS, "options": Options(seed=3)}
        want = synthesize(forget, retain, **keys, state=state)
        here = [r.flatten().clone() for r in retain]
        pieces: list[list[Piece]] = [[] for _ in range(ranks)]
        for row, (f, r, m) in enumerate(zip(forget, here, averages, strict=True)):
            cuts = [len(r) * k // ranks for k in range(ranks + 1)]
            for rank, (a, b) in enumerate(pairwise(cuts)):
                average = m[a:b] if rule in AVERAGING else None
                pieces[rank].insert(0, Piece(row, f.flatten()[a:b], r[a:b], average, starts[row] + a))
        group = Ranks(ranks)
        group.run(lambda rank, reduce: synthesis.combine_(pieces[rank], units, reduce, state=states[rank]))  # noqa: B023
        for mine, theirs in zip(here, want, strict=True):
            torch.testing.assert_close(mine, theirs.flatten(), rtol=1e-11, atol=1e-12)
        for other in states:
            assert other.step == state.step == step + 1
            assert other.cosines == pytest.approx(state.cosines, abs=1e-14)
    if rule in AVERAGING:
        torch.testing.assert_close(averages, [m.flatten() for m in whole], rtol=1e-12, atol=1e-13)


def test_a_step_that_is_skipped_leaves_the_mean_cosine_alone_and_counts() -> None:
    state = State(cosines=[0.25])
    with pytest.raises(FloatingPointError):
        synthesize([torch.tensor([float("nan"), 1.0])], [torch.ones(2)], rule="gradvac", state=state)
    assert state == State(step=1, cosines=[0.25])


def test_random_numbers_depend_on_nothing_but_seed_step_and_element() -> None:
    index = torch.randperm(10_000, generator=torch.Generator().manual_seed(0)) + 2**40
    u = uniform(1, 2, index)
    assert torch.equal(u[37:100], uniform(1, 2, index[37:100])) and u.dtype == torch.float64
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == len(u)
    for sample in (u, uniform(1, 3, index), uniform(2, 2, index)):
        counts = torch.histc(sample, 20, 0, 1)
        assert ((counts - 500) ** 2 / 500).sum() < 50  # chi-squared, 19 degrees of freedom: 1 in 10,000
    assert abs(torch.corrcoef(torch.stack([u, uniform(1, 3, index)]))[0, 1]) < 0.04
    assert abs(torch.corrcoef(torch.stack([u, uniform(1, 2, index + 1)]))[0, 1]) < 0.04


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", NEW)
def test_a_scope_that_makes_no_sense_is_refused(rule: str) -> None:
    two = [torch.ones(2)]
    for scope in set(SCOPES) - set(RULES[rule].scopes):
        with pytest.raises(ValueError, match=f"rule '{rule}' has no scope '{scope}'; valid: {RULES[rule].scopes[0]}"):
            synthesize(two, two, rule=rule, scope=scope, layers=["a"], average=two)


def test_an_option_without_sense_is_refused() -> None:
    bad: dict[str, Any] = {"preference": 1.1, "c": 1.0, "centre": "forget", "regularization": -1.0, "new_share": 0.0}
    for key, value in bad.items():
        with pytest.raises(ValueError, match=f"{key} = .*valid"):
            Synthesis("cagrad", options=Options(**{key: value}))


def test_the_configuration_knows_what_each_rule_has_and_reads() -> None:
    assert set(config.AVERAGING) == set(AVERAGING)
    assert set(config.WHY_NOT_BY_ELEMENT) == {rule for rule in RULES if "element" not in RULES[rule].scopes}
    assert [rule for rule in RULES if RULES[rule].scopes == ("element",)] == ["graddrop"]
    read = {key: {rule for rule in RULES if key in RULES[rule].options} for key in Options._fields}
    read["new_share"] = {rule for rule in RULES if RULES[rule].new_share}
    assert {key: set(rules) for key, rules in config.READERS.items()} == {k: v for k, v in read.items() if v}
    assert set(FORMS) <= {rule for rule in RULES if "element" in RULES[rule].scopes}


# -- the table of the documentation ------------------------------------------------------------------------------------


def test_floors_along_the_retain_gradient() -> None:
    """Of ‖r‖², beside what the table says: 1 - c, alpha, and 0 where all preference is retention's."""
    cases = pairs(100) + hostile()
    options = Options(c=0.4, centre="retain", preference=1.0)
    for rule, alpha, floor in (("cagrad", 1.0, 0.6), ("barrier", 0.7, 0.7), ("sdmgrad", 1.0, 0.0)):
        for g, (f, r) in zip(combine(rule, cases, alpha=alpha, options=options), cases, strict=True):
            assert g @ r >= floor * (r @ r) - 1e-9 * r.norm() * max(f.norm(), r.norm()), rule


@cache
def computed_properties(rule: str) -> dict[str, str]:
    """What is seen on 200 random and 72 hostile pairs, at alpha = gamma = 1 and the rule's own options."""
    cases, properties = pairs(200, seed=3) + [(f, r) for f, r in hostile() if f.any() and r.any()], {}
    made = combine(rule, cases)
    for name, task in (("⟨g, f⟩ ≥ 0", 0), ("⟨g, r⟩ ≥ 0", 1)):
        products = [  # over what g is made of, of which it may be the rounding
            (g @ pair[task] / pair[task].norm() / max(pair[0].norm(), pair[1].norm(), g.norm())).item()
            for g, pair in zip(made, cases, strict=True)
        ]
        properties[name] = "yes" if min(products) > -1e-9 else "no"
    some = pairs(20)
    one, two = (combine(rule, [(s * f, s * r) for f, r in some], memory=rule not in AVERAGING) for s in (1.0, 2.0))
    [degree] = {round(torch.log2(b.norm() / a.norm()).item(), 6) for a, b in zip(one, two, strict=True) if a.any()}
    properties["degree"] = f"{degree:g}"
    traits = RULES[rule]
    properties["scopes"] = {4: "all", 3: "not element", 1: "element"}[len(traits.scopes)]
    properties["default"] = traits.scope
    properties["state"] = {
        (True, False, False): "average of r",
        (False, True, False): "mean cosine of each unit",
        (False, False, True): "step",
    }.get((traits.averages_retain, traits.tracks_cosine, traits.draws), "–")
    return properties


def documented() -> dict[str, dict[str, str]]:
    text = (REPOSITORY / "docs" / "concepts" / "rules-and-objectives.md").read_text(encoding="utf-8")
    head, _, *rows = re.search(r"^\| rule \| source \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)[0].splitlines()  # pyright: ignore[reportOptionalSubscript]
    names = [cell.strip() for cell in head.strip("|").split(" | ")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {row[0].strip("`"): dict(zip(names[1:], row[1:], strict=True)) for row in cells}


@pytest.mark.parametrize("rule", RULES)
def test_the_table_of_the_documentation_is_what_is_computed(rule: str) -> None:
    row, found = documented()[rule], computed_properties(rule)
    assert {name: row[name] for name in found} == found
    source = re.findall(r"\d{4}\.\d{5}", row["source"])
    described = (FORMS[rule] if rule == "graddrop" else RULES[rule].weights).__doc__ or ""
    assert all(number in described for number in source)
    assert list(documented()) == list(RULES)
