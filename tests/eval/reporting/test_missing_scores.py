"""A mean names how many seeds it is of, where not all have the score; and no column vanishes with a broken model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from eval.reporting import attacks, tables
from eval.reporting.pages import as_markdown
from eval.reporting.run_report import compose
from eval.reporting.verdict import verdict
from eval.results import stats
from eval.results.common import common_suites
from eval.results.trajectories import read_run
from eval.run import score_tables
from tests.eval.reported import BIOS, read
from tests.eval.runs import Suites, make_run

COLUMNS = ["bios.retain.all", "mmlu.acc.all"]


def scores(forget: float, retain: float, mmlu: float | None) -> Suites:
    """Of an export; None: the model was broken there, or the suite was left out."""
    found: Suites = {"bios": {"forget": {"all": forget}, "retain": {"all": retain}}}
    return found if mmlu is None else {**found, "mmlu": {"acc": {"all": mmlu}}}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds, of which the last was not evaluated on MMLU: at level .1, 4/5 of the way, .52, .12 and nothing."""
    before, after = (0.6, 0.2, None), (0.5, 0.1, None)
    exports = [[scores(0.5, 0.9, before[n]), scores(0.0, 0.7, after[n])] for n in range(3)]
    return [make_run(tmp_path / str(n), exports[n], seed=n) for n in range(3)]


def test_a_mean_of_fewer_seeds_says_so(runs: list[Path]) -> None:
    groups = read(*runs)
    sd = abs(0.52 - 0.12) / math.sqrt(2)
    [_, [_, retain, mmlu, _, seeds]] = tables.matched_table(groups, BIOS, COLUMNS, None)
    assert (retain, mmlu, seeds) == ("0.740 ± 0.000", f"0.320 ± {sd:.3f} (2 of 3)", "3 of 3")
    [_, [_, retain, mmlu, _, seeds]] = tables.end_table(groups, BIOS, COLUMNS, None)
    assert (retain, mmlu, seeds) == ("0.700 ± 0.000", f"0.300 ± {sd:.3f} (2 of 3)", "3")
    rows = {row[0]: row[1:] for row in tables.every_score(groups, BIOS, None)}
    assert rows["mmlu.acc.all"] == [f"0.320 ± {sd:.3f} (2 of 3)"]
    assert stats.mean_of_known([None, None]) == "–" and stats.mean_of_known([0.5, None]) == "0.500 (1 of 2)"


def test_a_run_that_begins_below_the_level_is_in_no_mean_at_it(tmp_path: Path) -> None:
    """The sentence above the table left it out and the table counted it: 0.818 of one seed, and 0.859 of two."""
    early = make_run(tmp_path / "0", [scores(0.05, 0.9, 0.6), scores(0.01, 0.8, 0.5)], seed=0)
    falls = make_run(tmp_path / "1", [scores(0.5, 0.9, 0.6), scores(0.01, 0.8, 0.4)], seed=1)
    groups = read(early, falls)
    retain = 0.9 - 0.1 * 0.4 / 0.49
    [_, row] = tables.matched_table(groups, BIOS, ["bios.retain.all"], None)
    assert row[1:] == [f"{retain:.3f}", f"{10 + 10 * 0.4 / 0.49:.1f}", "1 of 2"]
    assert f"keeps {retain:.3f} (1 of 2 seeds)" in verdict(groups, BIOS, None)[0].text
    assert [one[4] for one in tables.seed_table(groups, BIOS)[1:]] == ["below from the first", row[2]]
    report = as_markdown(compose(groups, BIOS, None))
    assert f"in no mean at the level: {early}." in report and "Every run reached" not in report


def test_attacks_too(runs: list[Path]) -> None:
    """The model before unlearning is on the machine of some runs only."""
    for number, run in enumerate(runs):
        both: dict[str, Any] = {"before": {"forget.all": 0.1}, "after": {"forget.all": 0.2 + 0.1 * number}}
        own = {"original": {"forget.all": 0.9}} if number else {}
        leak = {"before": {"greedy": 0.0}, "after": {"leak@1": 0.5}} | ({"original": {"leak@1": 1.0}} if number else {})
        entries = [{"name": "int4", **both, **own}, {"name": "leak", **leak}]
        (run / "robustness.json").write_text(json.dumps({"suite": "bios", "attacks": entries}))
    groups = read(*runs)
    header, row = tables.attack_table(groups)
    assert row[header.index("forget after")] == "0.300 ± 0.100" and row[header.index("runs")] == "3"
    assert row[header.index("original")] == "0.900 ± 0.000 (2 of 3)"
    rows = [dict(zip(attacks.direct_table(groups)[0], one, strict=True)) for one in attacks.direct_table(groups)[1:]]
    (leaking,) = [one for one in rows if one["score"] == "leak@1"]
    assert (leaking["original"], leaking["after"]) == ("1.000 ± 0.000 (2 of 3)", "0.500 ± 0.000")


def test_a_broken_last_model_takes_no_column_along(tmp_path: Path) -> None:
    """A run that diverges at its end has scores up to there, and the table shows where they end."""
    whole = {"forget": {"extraction_strength": 0.5}, "retain": {"probability": 0.9}}
    broken = {name: dict.fromkeys(of, math.nan) for name, of in whole.items()}
    entries = [
        {"step": step, "model": f"step-{step}", "suites": {"probes": {"metrics": metrics}}}
        for step, metrics in ((10, whole), (20, broken))
    ]
    [header, *rows] = score_tables(entries, {})["probes"]
    assert header == ["step", "forget extraction strength", "retain probability"]
    assert rows == [["10", "0.500", "0.900"], ["20", "-", "-"]]
    assert score_tables(entries[1:], {})["probes"] == [["step", "no score is finite"], ["20", "-"]]
    run = make_run(tmp_path / "run", [scores(0.5, 0.9, 0.6), scores(0.0, 0.7, 0.5), scores(0.0, 0.1, None)])
    assert "mmlu.acc.all" in tables.score_columns(read(run))


def test_an_export_without_a_finite_score_is_left_out_and_its_suite_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [scores(0.5, 0.9, None), scores(math.nan, math.nan, None), scores(0.0, 0.7, None)])
    assert common_suites([read_run(run)], None) == ["bios"]
    [[prepared]] = read(run).values()
    assert [one["step"] for one in prepared.trajectory] == [10, 30] and prepared.left_out == [20]
