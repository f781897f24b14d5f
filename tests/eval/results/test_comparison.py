"""Settings of a sweep compared: arithmetic done by hand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.reporting import sections, sweep_report
from eval.results import comparison, stats
from eval.results.metrics import MEASURES
from eval.results.trajectories import Run
from eval.sweep import search

BIOS = MEASURES[0]


def trained(
    points: Sequence[tuple[int, float, float]],
    cosines: Sequence[float | None] = (),
    name: str = "sago",
    seed: int = 0,
    **told: Any,
) -> comparison.Trained:
    trajectory = [
        {"step": step, "bios.forget.all": forget, "bios.retain.all": retain} for step, forget, retain in points
    ]
    steps: list[dict[str, Any]] = [{"step": n, "cos_combined_retain": c} for n, c in enumerate(cosines, start=1)]
    told = {"forget": "ga", "retain": "nll", "rule": "sago", "alpha": 1.0, "gamma": 1.0, **told}
    section = {"forget": "objective", "retain": "objective"}
    method = tuple((f"{section.get(k, 'synthesis')}.{k}", json.dumps(v)) for k, v in told.items())
    run = Run(Path(), method, seed, "model", steps, trajectory)
    setting = {"synthesis.gamma": f"{told['gamma']:g}"}
    return comparison.Trained(name, setting, seed, run, BIOS)


def group(*members: comparison.Trained) -> comparison.Group:
    return comparison.Group(members[0].method, members[0].setting, list(members))


REACHES = [(10, 0.5, 0.9), (20, 0.0, 0.7)]  # 0.1 is 4/5 of the way: step 18, retain 0.74
EARLY = [(10, 0.3, 0.8), (20, 0.1, 0.6)]  # step 20, retain 0.6
NEVER = [(10, 0.9, 0.99), (20, 0.4, 0.95)]


def test_a_table_is_over_the_seeds_that_reached_the_level() -> None:
    groups = [group(trained(REACHES), trained(EARLY, seed=1), trained(NEVER, seed=2)), group(trained(NEVER, gamma=0.1))]
    header, row, missed = sweep_report.settings_table(groups, ["bios.retain.all"], {"sago": groups[0]})
    assert header == ["method", "setting", "retain", "step", "seeds that reached it"]
    # (0.74 + 0.6) / 2; |0.74 - 0.6| / sqrt(2); (18 + 20) / 2; 2 / sqrt(2)
    assert row == ["sago", "synthesis.gamma=1 *", "0.670 ± 0.099", "19.0 ± 1.4", "2 of 3"]
    assert missed == ["sago", "synthesis.gamma=0.1", "–", "–", "0 of 1"]
    runs = [(f"seed {member.seed}", member.run) for member in groups[0].members if not member.point]
    assert "each): seed 2: 0.400." in sections.never_reached(runs, BIOS)
    assert sections.never_reached([], BIOS) == "No run stayed above the level."


def test_the_best_setting_reaches_the_level_first_and_retains_most_second() -> None:
    often = group(trained(REACHES), trained(REACHES, seed=1))
    better = group(trained([(10, 0.1, 0.8)], gamma=2.0))
    seldom = group(trained([(10, 0.1, 1.0)], gamma=3.0), trained(NEVER, seed=1, gamma=3.0))
    never = group(trained(NEVER, gamma=4.0))
    assert comparison.best_groups([never, seldom, often, better]) == {"sago": better}
    assert comparison.best_groups([never, seldom, often]) == {"sago": often}
    closer = group(trained([(10, 0.2, 0.1)], gamma=5.0))
    assert comparison.best_groups([never, closer]) == {"sago": closer}
    early = group(trained([(10, 0.0, 0.95)], gamma=6.0))  # below the level from its first evaluation: no match
    assert not early.points and comparison.best_groups([early, often]) == {"sago": often}


def test_merit_orders_every_run_that_arrives_above_every_run_that_does_not() -> None:
    assert search.trial_score(trained(REACHES).run, BIOS) == pytest.approx(0.74)
    assert search.trial_score(trained(NEVER).run, BIOS) == pytest.approx(-0.3)


def test_seed_means_are_over_common_steps_without_the_target() -> None:
    one = trained([(0, 1.0, 1.0), (10, 0.4, 0.8), (20, 0.2, 0.6)])
    other = trained([(0, 1.0, 1.0), (10, 0.2, 0.6)], seed=1)
    (mean,) = comparison.seed_means(group(one, other))
    assert mean == pytest.approx({"step": 10, "forget": 0.3, "retain": 0.7})


def test_pareto() -> None:
    points = [
        {"forget": f, "retain": r}
        for f, r in [(0.5, 0.9), (0.1, 0.4), (0.3, 0.4), (0.5, 0.8), (0.2, 0.7), (0.2, 0.7), (0.9, 0.9), (0.1, 0.3)]
    ]
    assert [(p["forget"], p["retain"]) for p in stats.pareto(points)] == [
        (0.1, 0.4),
        (0.2, 0.7),
        (0.2, 0.7),
        (0.5, 0.9),
    ]


def test_the_cosine_stops_at_the_matched_step() -> None:
    run = trained([(2, 0.3, 0.9), (4, 0.1, 0.8), (6, 0.0, 0.1)], [0.1, 0.2, None, 0.6, 9.0, 9.0])
    assert run.point and run.point["step"] == pytest.approx(4) and run.cosine == pytest.approx(0.3)
    run = trained([(2, 0.3, 0.9), (4, 0.0, 0.8)], [0.1, 0.3, 0.8, 9.0])  # 2/3 of the way: step 3.33
    assert run.cosine == pytest.approx(0.4)
    assert trained(NEVER, [0.5]).cosine is None


def test_correlations_by_hand() -> None:
    assert stats.ranks_of([2.0, 1.0, 2.0, 5.0]).tolist() == [2.5, 1.0, 2.5, 4.0]
    pairs = [(0.1, 0.5), (0.2, 0.7), (0.3, 0.6), (0.4, 0.9), (0.5, 0.8)]
    members = [trained([(1, 0.1, retain)], [cosine]) for cosine, retain in pairs]
    members += [trained(NEVER, [0.5]), trained([(1, 0.1, 0.5)], [None])]  # neither counts
    # deviations (-.2 -.1 0 .1 .2) and (-.2 0 -.1 .2 .1); ranks 1 2 3 4 5 and 1 3 2 5 4: 1 - 6 * 4 / (5 * 24)
    expected = {"n": 5, "pearson": 0.08 / math.sqrt(0.1 * 0.1), "spearman": 0.8}
    assert comparison.cosine_and_retention(members) == pytest.approx(expected)
    assert comparison.cosine_and_retention(members[:4]) == {"n": 4, "pearson": None, "spearman": None}
    alike = [trained([(1, 0.1, retain)], [0.2]) for retain in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert comparison.cosine_and_retention(alike) == {"n": 5, "pearson": None, "spearman": None}


def plain(retains: Sequence[float], **told: Any) -> comparison.Group:
    members = [trained([(1, 0.1, r)], name="plain", seed=i, rule="sum", **told) for i, r in enumerate(retains)]
    return group(*members)


def test_the_first_open_question() -> None:
    sago = group(trained([(1, 0.1, 0.8)]), trained([(1, 0.1, 0.9)], seed=1))  # 0.85 ± 0.0707
    settings = [plain([0.2, 0.3], gamma=1.0), plain([0.84, 0.84], gamma=0.1, alpha=0.5)]
    (answer,) = comparison.sum_against_others([*settings, sago])
    assert answer["sum"]["ratio"] == pytest.approx(0.2) and answer["ratios_tried"] == 2
    assert answer["difference"] == pytest.approx(0.01)
    assert "+0.010" in (message := comparison.answer_sum([answer], 0.1)) and "reaches the same frontier" in message
    far = comparison.sum_against_others([settings[0], plain([0.5, 0.5], gamma=0.1), sago])
    assert "does not reach it" in comparison.answer_sum(far, 0.1)
    ahead = comparison.sum_against_others([settings[0], plain([0.99, 0.99], gamma=0.1), sago])
    assert "sum is ahead" in comparison.answer_sum(ahead, 0.1)
    one = comparison.sum_against_others([settings[0], plain([0.5], gamma=0.1), sago])
    assert "no spread" in comparison.answer_sum(one, 0.1)
    # one ratio only; another objective; a rule that never arrives
    assert "Not answered" in comparison.answer_sum(comparison.sum_against_others([settings[0], sago]), 0.1)
    other = group(trained([(1, 0.1, 0.8)], forget="npo"))
    assert comparison.sum_against_others([*settings, other]) == []
    late = comparison.sum_against_others([*settings, group(trained(NEVER))])
    assert late[0]["difference"] is None and "sago reached forget 0.1 in no run" in comparison.answer_sum(late, 0.1)
