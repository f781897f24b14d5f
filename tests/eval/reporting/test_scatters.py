"""The figure of what a rule gains on the retain corpus and what the rest pays: its points, by hand; its names."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from eval.reporting.charts import Chart
from eval.reporting.interactive import specification
from eval.reporting.outside import BESIDE, beside_retain, outside
from eval.reporting.pages import Figure
from eval.reporting.pictures import draw
from eval.results import grouping, trajectories
from eval.results.metrics import MEASURES
from tests.eval.runs import make_run

BIOS = MEASURES[0]
TARGET = {"step": 0.0, "bios.forget.all": 1.0, "bios.retain.all": 1.0, "bios.uncovered.all": 0.9}
Groups = dict[str, list[trajectories.Run]]
# Rule -> by seed, (forget, retain, uncovered) of the only export. Under sum the level is 9/10 of the way from the
# target, whose scores are 1.0 and 0.9: retain 1 - 0.9 * 0.4 = 0.64, uncovered 0.9 - 0.9 * 0.3 = 0.63.
RUNS = {
    "sago": [(0.1, 0.9, 0.3), (0.1, 0.7, 0.2), (0.4, 1.0, 0.9)],  # the last does not reach the level
    "sum": [(0.0, 0.6, 0.6)],
    "gru": [(0.5, 1.0, 0.9)],
}


def read(folder: Path, *rules: str) -> Groups:
    found = []
    for rule in rules:
        for seed, (forget, retain, uncovered) in enumerate(RUNS[rule]):
            of = {"forget": forget, "retain": retain, "uncovered": uncovered}
            suites = {"bios": {split: {"all": value} for split, value in of.items()}}
            run = make_run(folder / f"{rule}{seed}", [suites], rule=rule, seed=seed)
            found.append(trajectories.prepare(trajectories.read_run(run), BIOS, TARGET))
    return grouping.group_runs(found)


@pytest.fixture
def chart(tmp_path: Path) -> Chart:
    return beside_retain(read(tmp_path, *RUNS), BIOS)


def test_points_are_means_of_the_seeds_at_the_level(chart: Chart) -> None:
    [panel] = chart.panels
    assert panel.title == "npo+nll" and panel.x.startswith("retain") and panel.y.startswith("uncovered")
    found = {trace.name: trace for trace in panel.traces}
    assert set(found) == {"sago", "sum"}
    (x,), (y,) = found["sago"].x, found["sago"].y
    assert (x, y) == pytest.approx((0.8, 0.25))
    errors = found["sago"].errors
    assert errors is not None  # the sample sd of two values is their distance by the root of 2
    assert (errors[0][0], errors[1][0]) == pytest.approx((0.2 / 2**0.5, 0.1 / 2**0.5))
    assert (*found["sum"].x, *found["sum"].y) == pytest.approx((0.64, 0.63))


def test_names_stand_beside_the_points(chart: Chart) -> None:
    [axis] = draw(chart).axes
    assert isinstance(axis, Axes)
    assert {text.get_text() for text in axis.texts} == {"sago", "sum"} and axis.get_legend() is None
    [figure] = specification(chart)
    assert [(part["mode"], part["texttemplate"], part["showlegend"]) for part in figure["data"]] == [
        ("markers+text", [name], False) for name in ("sago", "sum")
    ]


def test_one_method_alone_has_no_such_figure(tmp_path: Path) -> None:
    both, alone = read(tmp_path / "both", "sago", "sum"), read(tmp_path / "alone", "sago")
    files = [
        [block.file for block in outside(groups, BIOS, TARGET) if isinstance(block, Figure)] for groups in (both, alone)
    ]
    assert files == [[BESIDE], []] and not beside_retain(alone, BIOS).panels
