"""Adam's metric and Adam's update on whole tensors, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.synthesis import State, synthesize
from pipeline.synthesis.adam import AdamState
from pipeline.synthesis.combine import Synthesis, units_of
from pipeline.synthesis.metric import update_products
from pipeline.synthesis.partition import Piece
from pipeline.synthesis.rules import RULES, SCOPES

SHAPES = ((3, 5), (1,), (40, 7), (300,), (0,), (12,))
LAYERS = "aabbbc"
WAYS = [(rule, scope) for rule in RULES for scope in RULES[rule].scopes]
BETAS, EPS, STEPS = (0.9, 0.95), 1e-3, 7


def random(seed: int, scale: float = 1.0) -> list[Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=dice, dtype=torch.float64) for shape in SHAPES]


def states_of(second: list[Tensor], eps: float = EPS) -> list[AdamState]:
    return [AdamState(v, v, v.flatten(), STEPS, 1e-3, BETAS, eps, 0.0) for v in second]


def metric_of(second: list[Tensor]) -> list[Tensor]:
    """P, by its definition."""
    return [1 / ((v / (1 - BETAS[1] ** STEPS)).sqrt() + EPS) for v in second]


def wide_second() -> list[Tensor]:
    """Four orders of magnitude between elements, and some that never had a gradient."""
    made = [10 ** (2 * x) for x in random(5)]
    made[3][::9] = 0.0
    return made


@pytest.mark.parametrize(("rule", "scope"), WAYS)
def test_a_rule_in_the_metric_is_the_rule_in_coordinates_that_make_it_euclidean(rule: str, scope: str) -> None:
    """With x' = √P x the product ⟨a, b⟩_P is ⟨a', b'⟩: so g' is what the rule makes of f' and r'. Two steps."""
    second = wide_second()
    root = [p.sqrt() for p in metric_of(second)]
    keys: dict[str, Any] = {"rule": rule, "scope": scope, "alpha": 0.7, "gamma": 0.9, "layers": LAYERS}
    states, averages = (State(), State()), [[torch.zeros_like(r) for r in random(1)] for _ in range(2)]
    for step in range(2):
        f, r = random(10 + step, 0.5), random(20 + step)
        there, here = ({"state": state, "average": m} for state, m in zip(states, averages, strict=True))
        want = synthesize(
            [x * a for x, a in zip(root, f, strict=True)],
            [x * a for x, a in zip(root, r, strict=True)],
            **there,
            **keys,
        )
        found = synthesize(f, r, adam=states_of(second), **here, **keys)
        for a, b, x in zip(found, want, root, strict=True):
            torch.testing.assert_close(a * x, b, rtol=1e-5, atol=1e-9)


def test_the_update_of_adam_does_not_oppose_retention_in_its_metric_alone() -> None:
    """⟨P g, r⟩, with which the retain loss falls: never negative under `adam`, often under `euclidean`."""
    signs: dict[str, list[bool]] = {"adam": [], "euclidean": []}
    for seed in range(60):
        f, r = random(100 + seed), random(200 + seed)
        f = [a - 0.1 * b for a, b in zip(f, r, strict=True)]
        second = wide_second()
        for metric, states in (("adam", states_of(second)), ("euclidean", None)):
            g = synthesize(f, r, rule="pcgrad", scope="global", alpha=0.0, adam=states)
            parts = zip(metric_of(second), g, r, strict=True)
            signs[metric].append(sum((p * a * b).sum().item() for p, a, b in parts) > -1e-9)
    assert all(signs["adam"]) and not all(signs["euclidean"])


@pytest.mark.parametrize("rule", [rule for rule in RULES if "element" in RULES[rule].scopes])
def test_on_single_elements_nothing_changes(rule: str) -> None:
    f, r = random(1), random(2)
    keys: dict[str, Any] = {"rule": rule, "scope": "element", "alpha": 0.7}
    plain, found = synthesize(f, r, **keys), synthesize(f, r, adam=states_of(wide_second()), **keys)
    assert all(map(torch.equal, plain, found))


def test_without_a_state_of_adam_all_is_euclidean() -> None:
    f, r = random(1), random(2)
    pieces = [Piece(row, a.flatten(), b.flatten().clone()) for row, (a, b) in enumerate(zip(f, r, strict=True))]
    table = Synthesis("pcgrad", "module", metric="adam").combine_(pieces, units_of("module", LAYERS))
    assert table.shape == (len(SHAPES), 13) and not table[:, 10:].any()
    plain = synthesize(f, r, rule="pcgrad", scope="module")
    assert all(torch.equal(piece.retain, g.flatten()) for piece, g in zip(pieces, plain, strict=True))
    with pytest.raises(ValueError, match="unknown metric 'fisher'; valid: euclidean, adam"):
        Synthesis("pcgrad", metric="fisher")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", ["pcgrad", "barrier", "gru"])
def test_the_retain_gradient_is_left_in_the_forget_buffer(rule: str, scope: str) -> None:
    if scope not in RULES[rule].scopes:
        return
    made = []
    for keep in (False, True):
        f, r = (torch.cat([x.flatten() for x in random(seed)]) for seed in (1, 2))
        before, sizes = r.clone(), [x.numel() for x in random(1)]
        m = torch.zeros_like(r).split(sizes) if rule == "gru" else [None] * len(sizes)
        pieces = [Piece(row, *parts) for row, parts in enumerate(zip(f.split(sizes), r.split(sizes), m, strict=True))]
        Synthesis(rule, scope).combine_(pieces, units_of(scope, LAYERS), keep_retain=keep)
        assert torch.equal(f, before) == keep
        made.append(r)
    assert torch.equal(*made)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_update_is_what_adamw_did_to_the_weights(decay: float) -> None:
    """Three steps of torch's AdamW in float64, the second group without decay and with another learning rate."""
    weights, r = [w.requires_grad_() for w in random(3)], random(4)
    optimizer = torch.optim.AdamW(
        [{"params": weights[:3], "weight_decay": decay}, {"params": weights[3:], "weight_decay": 0.0, "lr": 0.02}],
        lr=0.01,
        betas=BETAS,
    )
    for step in range(3):
        old = [w.detach().clone() for w in weights]
        for number, (w, g) in enumerate(zip(weights, random(30 + step), strict=True)):
            w.grad = g if number else torch.zeros_like(g)  # a tensor without gradient
        optimizer.step()
        states, rows = [], []
        for row, w in enumerate(weights):
            state, group = optimizer.state[w], optimizer.param_groups[row >= 3]
            v, m, now = (x.detach().flatten() for x in (state["exp_avg_sq"], state["exp_avg"], w))
            numbers = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
            states.append(AdamState(now, m, v, int(state["step"]), *numbers))
            rows.append((row, r[row].flatten()))
        moved = [w.detach() - before for w, before in zip(weights, old, strict=True)]
        want = [[(a * b).sum().item(), b.square().sum().item()] for a, b in zip(r, moved, strict=True)]
        torch.testing.assert_close(update_products(rows, states, len(SHAPES)), torch.tensor(want), check_dtype=False)
