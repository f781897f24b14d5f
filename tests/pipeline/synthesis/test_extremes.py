"""Numbers at the edge of a dtype: tiny beside huge, zero, and not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.synthesis import synthesize
from pipeline.synthesis.combine import Piece, Synthesis
from pipeline.synthesis.geometry import Geometry
from pipeline.synthesis.rules import SCOPES
from tests.pipeline.synthesis.specification import (
    every_rule_and_scope,
)


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


def test_a_retain_gradient_that_almost_vanished() -> None:
    """||f|| / ||r|| = 1e40: the weights 1 and 1e40 are finite, f and r are, and so is g = alpha r + 0."""
    got = synthesize([torch.tensor([1e10])], [torch.tensor([-1e-30])], rule="pcgrad", scope="module")[0]
    assert torch.isfinite(got).all() and got.abs() < 1e5  # the rounding of 1e10 - 1e10


def test_a_sum_that_overflows_is_not_called_finite() -> None:
    retain = torch.tensor([3e38])
    table = Synthesis("sum").combine_([Piece(0, torch.tensor([3e38]), retain)], [0])
    assert torch.isfinite(retain).all() or not Geometry.of(table, 1).finite


@every_rule_and_scope
def test_a_combination_that_its_dtype_cannot_hold_is_refused(rule: str, scope: str) -> None:
    """Of fp16, whose largest number is 65504: both gradients are finite, and 40000 r is not."""
    forget, retain = [torch.full((2,), 2.0, dtype=torch.float16)], [torch.full((2,), 3.0, dtype=torch.float16)]
    keys: dict[str, Any] = {"rule": rule, "scope": scope, "gamma": 40000.0, "layers": ["a"]}
    wide = synthesize([f.double() for f in forget], [r.double() for r in retain], alpha=40000.0, **keys)[0]
    assert torch.isfinite(wide).all()
    if (wide.abs() < 65504).all():  # not every rule scales with its weights
        return
    with pytest.raises(FloatingPointError, match="inf or NaN"):
        synthesize(forget, retain, alpha=40000.0, **keys)
