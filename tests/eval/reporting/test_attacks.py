"""Attacks on the forget corpus in the report: means over seeds by hand, and their figure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest

from eval.reporting import attacks, run_report, tables
from eval.reporting.pages import as_markdown
from eval.results.trajectories import Run
from tests.eval.reported import BIOS, REACHES, make_run, read

CURVES = ([(0, 0.1), (5, 0.5)], [(0, 0.2), (5, 0.6)])  # (step, probability of the other half), by seed


def robustness(curve: list[tuple[int, float]], kl: float, seed: int) -> str:
    ends = [{"held_out.probability": value} for _, value in (curve[0], curve[-1])]
    rows = [{"step": step, "held_out": {"probability": value}} for step, value in curve]
    entries = [
        {"name": "relearn_curve", "before": ends[0], "after": ends[1], "curve": rows, "seconds": 4.0},
        {"name": "leak", "before": {"greedy": 0.0}, "after": {"leak@1": 0.25, "leak@2": kl}, "seconds": 1.0},
        {
            "name": "kl",
            "settings": {"texts": "wiki.txt", "seed": seed},
            "before": {},
            "after": {"kl": kl},
            "seconds": 1.0,
        },
    ]
    return json.dumps({"suite": "probes", "dtype": "float32", "seed": 0, "attacks": entries})


@pytest.fixture
def groups(tmp_path: Path) -> dict[str, list[Run]]:
    folders = [make_run(tmp_path / f"run {seed}", REACHES, seed=seed) for seed in (0, 1)]
    for seed, (folder, curve, kl) in enumerate(zip(folders, CURVES, (0.5, 0.75), strict=True)):
        (folder / "robustness.json").write_text(robustness(curve, kl, seed))
    return read(*folders)


def test_the_table_has_means_over_the_seeds(groups: dict[str, list[Run]]) -> None:
    found = {(row[1], row[2]): row[3:] for row in attacks.direct_table(groups)[1:]}
    values = [f"{fmean(pair):.3f} ± {stdev(pair):.3f}" for pair in ((0.1, 0.2), (0.5, 0.6))]
    words = attacks.SCORES["held_out.probability"]
    assert found["relearn_curve", words][:3] == ["–", *values] and found["relearn_curve", words][-1] == "2"
    assert found["kl (texts wiki.txt)", "KL a token"][:3] == ["–", "–", f"0.625 ± {stdev((0.5, 0.75)):.3f}"]
    assert ("leak", "leak@1") in found and ("leak", "leak@128") not in found
    assert len(tables.attack_table(groups)) == 1, "no suite measured anything"


def test_the_figure_has_a_line_a_method(groups: dict[str, list[Run]]) -> None:
    chart = attacks.attack_chart(groups)
    assert chart is not None
    curve, leak = (panel.traces[0] for panel in chart.panels)
    assert list(curve.x) == [0, 5] and list(curve.y) == pytest.approx([0.15, 0.55])
    assert list(leak.x) == [0, 1] and list(leak.y) == pytest.approx([0.25, 0.625])
    assert chart.panels[1].ticks == ["1", "2"] and "k 2" in leak.hover[1]
    assert "attacks.png" in run_report.charts_of(groups, BIOS, None)
    assert "![" in (text := as_markdown(run_report.robustness(groups))) and "attacks.png" in text


def test_a_method_beyond_the_budget_is_marked(tmp_path: Path) -> None:
    """A mean over its seeds of more than 0.01 nats a token; without a measured KL nothing is said."""
    groups: dict[str, list[Run]] = {}
    for method, kls in (("within", (0.004, 0.016)), ("beyond", (0.004, 0.017)), ("broken", (0.001, math.nan))):
        folders = [make_run(tmp_path / f"{method} {seed}", REACHES, seed=seed) for seed in (0, 1)]
        for seed, (folder, kl) in enumerate(zip(folders, kls, strict=True)):
            (folder / "robustness.json").write_text(robustness(CURVES[seed], kl, seed))
        (groups[method],) = read(*folders).values()
    methods = {row[0] for row in attacks.direct_table(groups)[1:]}
    assert methods == {"within", "beyond (KL > 0.01)", "broken (KL > 0.01)"}
    text = as_markdown(run_report.robustness(groups))
    assert "compare only methods without the mark KL > 0.01" in text
    (only,) = [rows for name, rows in groups.items() if name == "within"]
    assert "the mark" not in as_markdown(run_report.robustness({"within": only}))
    for entries in (run.robustness for run in groups["beyond"]):
        assert entries is not None
        entries["attacks"] = [entry for entry in entries["attacks"] if entry["name"] != "kl"]
    assert {row[0] for row in attacks.direct_table({"beyond": groups["beyond"]})[1:]} == {"beyond"}


def test_unrelated_fine_tuning_has_a_curve(groups: dict[str, list[Run]]) -> None:
    for run, value in zip(groups[next(iter(groups))], (0.2, 0.4), strict=True):
        curve = [{"step": step, "forget": {"probability": value + step / 10}} for step in (0, 1)]
        assert run.robustness is not None
        entry = {"name": "unrelated", "before": {}, "after": {}, "curve": curve, "seconds": 4.0}
        run.robustness["attacks"].append(entry)
    chart = attacks.attack_chart(groups)
    assert chart is not None
    (panel,) = [panel for panel in chart.panels if "unrelated" in panel.title]
    assert list(panel.traces[0].x) == [0, 1] and list(panel.traces[0].y) == pytest.approx([0.3, 0.4])


def test_without_attacks_there_is_no_figure(tmp_path: Path) -> None:
    groups = read(make_run(tmp_path / "run", REACHES))
    assert attacks.attack_chart(groups) is None and "attacks.png" not in run_report.charts_of(groups, BIOS, None)
