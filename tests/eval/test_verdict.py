"""The verdict, the best of each column, the figures and the advice: against arithmetic done by hand."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from eval.reporting import figures, run_report, tables
from eval.reporting.advice import advise, late_slope
from eval.reporting.interactive import specification
from eval.reporting.pages import Table, as_markdown
from eval.reporting.verdict import verdict
from eval.results import grouping, trajectories
from eval.results.metrics import MEASURES, ForgetRetainMetric, falls, label, readable
from eval.results.stats import correlate
from pipeline.config.schema import Synthesis
from tests.eval.runs import Suites, make_run

BIOS = MEASURES[0]
TARGET = {"step": 0.0, "bios.forget.all": 1.0, "bios.retain.all": 0.8, "bios.uncovered.all": 0.95}
Groups = dict[str, list[trajectories.Run]]


def bios(forget: float, retain: float, uncovered: float = 0.5) -> Suites:
    of = {"forget": forget, "retain": retain, "uncovered": uncovered}
    return {"bios": {split: {"all": value} for split, value in of.items()}}


def read(*folders: Path, target: dict[str, float] | None = TARGET) -> Groups:
    return grouping.group_runs(trajectories.prepare(trajectories.read_run(folder), BIOS, target) for folder in folders)


def seeds(folder: Path, rule: str, ends: list[tuple[float, float, float]]) -> list[Path]:
    """A run for each seed that is exactly at the level in its only export, or above it."""
    return [make_run(folder / f"{rule}{n}", [bios(*end)], rule=rule, seed=n) for n, end in enumerate(ends)]


def texts_of(groups: Groups, measure: ForgetRetainMetric, target: dict[str, float] | None) -> list[str]:
    return [finding.text for finding in verdict(groups, measure, target)]


def test_the_verdict_is_arithmetic(tmp_path: Path) -> None:
    """sago 0.72 and 0.76 of 0.8: 92.5 %, sd 0.04 / sqrt(2) / 0.8 = 3.5 %; sum 0.24 and 0.40: 40 %, sd 14.1 %."""
    groups = read(
        *seeds(tmp_path, "sago", [(0.1, 0.72, 0.30), (0.1, 0.76, 0.40)]),
        *seeds(tmp_path, "sum", [(0.1, 0.24, 0.60), (0.1, 0.40, 0.60), (0.7, 0.80, 0.90)]),
        *seeds(tmp_path, "pcgrad", [(0.45, 0.80, 0.90)]),
    )
    [sentence] = texts_of(groups, BIOS, TARGET)
    assert sentence == (
        "sago keeps 92.5 % ± 3.5 of the target model's retain ROUGE-L at the same forgetting (forget ROUGE-L 0.1), sum "
        "40.0 % ± 14.1 (2 of 3 seeds); its lead over sum, 0.420, is more than the spread of the seeds. What neither "
        "corpus covers: uncovered 0.35 under sago and 0.60 under sum (before: 0.95). Not compared, because none of its "
        "seeds reached forget ROUGE-L 0.1; the lowest: pcgrad (0.450)."
    )


def test_the_verdict_says_what_became_of_the_sets_that_only_probes_measure(tmp_path: Path) -> None:
    """By a set that the user named beside the two corpora; the corpora themselves are no such sets."""
    measure = next(one for one in MEASURES if one.suite == "probes")
    start = {"step": 0.0, "probes.forget.extraction_strength": 1.0, "probes.retain.probability": 0.9}
    start |= {"probes.others.probability": 0.8}

    def ends(rule: str, others: float) -> Path:
        of = {"forget": {"extraction_strength": 0.1}, "retain": {"probability": 0.6}, "others": {"probability": others}}
        return make_run(tmp_path / rule, [{"probes": of}], rule=rule)

    folders = [ends("sago", 0.5), ends("sum", 0.2)]
    groups = grouping.group_runs(trajectories.prepare(trajectories.read_run(one), measure, start) for one in folders)
    [sentence] = texts_of(groups, measure, start)
    assert (
        "What neither corpus covers: others probability 0.20 under sum and 0.50 under sago (before: 0.80)." in sentence
    )


def test_what_is_kept_is_said_by_the_kind_of_score_that_measures_forgetting(tmp_path: Path) -> None:
    """By probability 0.6 of 0.9 is 66.7 %; known by heart are only 0.2 and 0.1 of 0.8: 25.0 and 12.5 %."""
    measure = next(one for one in MEASURES if one.suite == "probes")
    start = {"step": 0.0, "probes.forget.extraction_strength": 1.0, "probes.retain.probability": 0.9}
    start |= {"probes.retain.extraction_strength": 0.8}
    folders = [
        make_run(
            tmp_path / rule,
            [{"probes": {"forget": {"extraction_strength": 0.1},
                         "retain": {"probability": 0.6, "extraction_strength": strength}}}],
            rule=rule,
        )
        for rule, strength in (("sum", 0.1), ("sago", 0.2))
    ]  # fmt: skip
    groups = grouping.group_runs(trajectories.prepare(trajectories.read_run(one), measure, start) for one in folders)
    [sentence] = texts_of(groups, measure, start)
    assert "66.7 % of the target model's retain probability" in sentence
    assert "By retain extraction strength: sago 25.0 % and sum 12.5 %." in sentence


def test_a_report_without_texts_begins_with_results(tmp_path: Path) -> None:
    text = as_markdown(run_report.compose(read(*seeds(tmp_path, "sago", [(0.1, 0.7, 0.3)])), BIOS, TARGET))
    assert text.index("## Results at forget ROUGE-L 0.1") < text.index("## What the models say")


def test_a_lead_within_the_spread_and_one_seed_are_said(tmp_path: Path) -> None:
    close = read(
        *seeds(tmp_path / "close", "sago", [(0.1, 0.5, 0.5), (0.1, 0.7, 0.5)]),
        *seeds(tmp_path / "close", "sum", [(0.1, 0.5, 0.5), (0.1, 0.6, 0.5)]),
    )  # 0.05 apart; sd 0.141 and 0.071
    assert "0.050, is no more than the spread of the seeds" in texts_of(close, BIOS, TARGET)[0]
    one = read(*seeds(tmp_path / "one", "sago", [(0.1, 0.5, 0.5)]), *seeds(tmp_path / "one", "sum", [(0.1, 0.6, 0.5)]))
    assert "with one seed there is no spread" in texts_of(one, BIOS, TARGET)[0]


def test_the_verdict_without_a_target_or_a_run_at_the_level(tmp_path: Path) -> None:
    alone = read(*seeds(tmp_path / "a", "sago", [(0.1, 0.5, 0.5)]), target=None)
    assert texts_of(alone, BIOS, None) == [
        "sago keeps 0.500 of retain ROUGE-L where it has forgotten (forget ROUGE-L 0.1)."
    ]
    never = read(*seeds(tmp_path / "b", "sago", [(0.4, 0.5, 0.5)]), *seeds(tmp_path / "b", "sum", [(0.3, 0.5, 0.5)]))
    assert texts_of(never, BIOS, TARGET) == [
        "No run of npo+nll reached forget ROUGE-L 0.1; the lowest: sago (0.400) and sum (0.300)."
    ]


def test_runs_that_begin_below_the_level_are_not_compared_at_it(tmp_path: Path) -> None:
    """sago is first seen at 0.09, sum at 0.00: equal forgetting it is not. pcgrad, exactly at the level, is there."""
    below = [
        make_run(tmp_path / "sago", [bios(0.09, 0.8), bios(0.0, 0.5)]),
        make_run(tmp_path / "sum", [bios(0.0, 0.4), bios(0.0, 0.3)], rule="sum"),
    ]
    [sentence] = texts_of(read(*below, target=None), BIOS, None)
    assert sentence == (
        "Not compared, because below forget ROUGE-L 0.1 from the first evaluation: sago (0.090) and sum (0.000). Give "
        "the evaluation of the model before unlearning by --target, or evaluate earlier exports (a smaller "
        "train.export_every or train.probe_every)."
    )
    other = make_run(tmp_path / "b", [bios(0.1, 0.6)], rule="pcgrad")
    [sentence] = texts_of(read(*below, other, target=None), BIOS, None)
    assert sentence.startswith("pcgrad keeps 0.600 of retain ROUGE-L where it has forgotten (forget ROUGE-L 0.1).")
    assert "from the first evaluation: sago (0.090) and sum (0.000)." in sentence
    # From 1.0 and 0.8 at step 0 each is known at the level: 0.9 / 0.91 and 0.9 of the way to the first export.
    [sentence] = texts_of(read(*below), BIOS, TARGET)
    assert "sago keeps 100.0 %" in sentence and "sum 55.0 %" in sentence and "Not compared" not in sentence


def test_seeds_that_begin_below_the_level_do_not_count(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "a", [bios(0.3, 0.8), bios(0.1, 0.6)]),
        make_run(tmp_path / "b", [bios(0.05, 0.2)], seed=1),
        make_run(tmp_path / "c", [bios(0.4, 0.9)], rule="sum"),
    ]
    [sentence] = texts_of(read(*folders, target=None), BIOS, None)
    assert sentence.startswith("sago keeps 0.600 (1 of 2 seeds) of retain ROUGE-L where it has forgotten")
    assert "first evaluation: sago (0.050)" in sentence
    assert "none of its seeds reached forget ROUGE-L 0.1; the lowest: sum (0.400)" in sentence


def test_the_best_of_a_column_is_what_the_reader_sees() -> None:
    rows = [
        ["method", "forget", "retain", "facts", "step"],
        ["target model", "1.000", "1.000", "1.000", "0"],
        ["a", "0.100 ± 0.010", "0.500", "0.900", "9"],
        ["b", "0.050", "0.700 ± 0.2", "0.900", "3"],
        ["c", "–", "0.700", "0.900", "3"],
        ["paper, Table 1: GA", "0.010", "0.990", "0.1", "–"],
    ]
    columns = ["bios.forget.all", "bios.retain.all", "bios.facts.all"]
    assert tables.best_cells(rows, columns) == {(3, 1), (3, 2), (4, 2)}
    assert tables.best_cells(rows, columns, ["bios.forget.all"]) == {(3, 2), (4, 2)}
    assert tables.best_cells(rows[:3], columns) == frozenset(), "alone is not the best"
    text = as_markdown([Table(rows, tables.best_cells(rows, columns))])
    assert "| b | **0.050** | **0.700 ± 0.2** | 0.900 | 3 |" in text


@pytest.mark.parametrize(
    ("score", "words", "lower"),
    [
        ("bios.forget.all", "forget ROUGE-L", True),
        ("bios.neighbours.QA", "neighbours QA ROUGE-L", False),
        ("corpus.forget.rouge", "forget ROUGE-L", True),
        ("corpus.retain.probability", "retain probability", False),
        ("wmdp_bio.acc.all", "WMDP Bio accuracy", True),
        ("mmlu.acc.anatomy", "MMLU anatomy accuracy", False),
        ("rwku.sago.F-All", "RWKU F-All", True),
        ("rwku.sago.N-FB", "RWKU N-FB", False),
        ("tofu.forget_quality", "TOFU forget quality", False),
        ("tofu.forget.truth_ratio", "TOFU forget truth ratio", False),
    ],
)
def test_scores_have_readable_names(score: str, words: str, lower: bool) -> None:
    assert readable(score) == words and falls(score) == lower
    assert label("bios.retain.all", ["bios.retain.all"]) == "retain"
    assert label("bios.retain.all", ["bios.retain.all", score, "mmlu.acc.all"]) == "retain ROUGE-L (bios)"


def test_no_correlation_of_fewer_than_five_points() -> None:
    line = [(float(n), 2.0 * n) for n in range(5)]
    assert correlate(line)["pearson"] == pytest.approx(1.0) and correlate(line)["n"] == 5
    assert correlate(line[:4]) == {"n": 4, "pearson": None, "spearman": None}


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def many(tmp_path: Path) -> Groups:
    """Three settings of each of three rules, some of which never reach the level."""
    folders = []
    for rule in ("sum", "pcgrad", "sago"):
        for setting in range(3):
            name = f"{rule}-{setting}"
            folder = make_run(tmp_path / name, [bios(0.5, 0.9), bios(0.05 + 0.1 * setting, 0.5)], rule=rule)
            text = (folder / "config.yaml").read_text()
            (folder / "config.yaml").write_text(text.replace("lr: 0.001", f"lr: {0.001 * (setting + 1)}"))
            folders.append(folder)
    return read(*folders)


def test_a_method_has_one_colour_of_its_own_in_every_figure(many: Groups) -> None:
    style = figures.styles(many)
    assert len(many) == 9 and len({own.look.colour for own in style.values()}) == 9
    charts = run_report.charts_of(many, BIOS, TARGET)
    for file, chart in charts.items():
        for panel in chart.panels:
            for trace in panel.traces:
                named = [name for name in many if name in " ".join([trace.label, *trace.hover])]
                for name in named:
                    assert trace.look.colour == style[name].look.colour, (file, trace.label)
        assert figures.compared(many) in chart.title, file


def test_no_two_rules_look_alike(tmp_path: Path) -> None:
    rules = get_args(Synthesis.model_fields["rule"].annotation)
    style = figures.styles(read(*(make_run(tmp_path / rule, [bios(0.1, 0.5)], rule=rule) for rule in rules)))
    assert len(rules) == 21 and len({own.look for own in style.values()}) == 21


def test_the_legend_explains_every_mark(many: Groups) -> None:
    """Whatever has a look of its own in a panel has an entry of that look, and every line across is named."""
    for file, chart in run_report.charts_of(many, BIOS, TARGET).items():
        for panel in chart.panels:
            assert all(mark.label for mark in panel.marks)
            entries = {(t.look, t.lines, t.markers) for t in panel.traces if t.label or t.name}
            drawn = {(t.look, t.lines, t.markers) for t in panel.traces}
            assert drawn == entries, (file, drawn - entries)


def test_both_drawings_have_the_same_points(many: Groups) -> None:
    chart = run_report.charts_of(many, BIOS, TARGET)["frontier.png"]
    [panel], [figure] = chart.panels, specification(chart)
    assert [trace.label for trace in panel.traces] == [part["name"] for part in figure["data"]]
    for trace, part in zip(panel.traces, figure["data"], strict=True):
        for key, values in (("x", trace.x), ("y", trace.y)):  # five digits are enough to draw
            assert part[key] == pytest.approx(list(values), rel=1e-4)
        assert part["text"] == list(trace.hover)
    vertical = [shape["x0"] for shape in figure["layout"]["shapes"] if shape["x0"] == shape["x1"]]
    assert vertical == [BIOS.level, BIOS.chance]


def test_the_title_names_what_was_compared(tmp_path: Path, many: Groups) -> None:
    two = read(*seeds(tmp_path / "t", "sago", [(0.1, 0.5, 0.5)]), *seeds(tmp_path / "t", "sum", [(0.1, 0.6, 0.5)]))
    assert run_report.title_of(two, BIOS) == "npo+nll with sago and sum, at forget ROUGE-L 0.1"
    assert run_report.title_of(many, BIOS) == "9 methods (npo+nll), at forget ROUGE-L 0.1"


# ---------------------------------------------------------------------------------------------------------------------
# Not reached


def trajectory(folder: Path, forgets: list[float], retain: float = 0.8, **settings: Any) -> trajectories.Run:
    """A run from 1.0 at step 0, then the forget scores, 10 steps apart."""
    run = make_run(folder, [bios(forget, retain) for forget in forgets])
    for key, value in settings.items():
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("lr: 0.001", f"lr: 0.001\n  {key}: {value}"))
    ((found,),) = read(run).values()
    return found


def test_the_slope_is_that_of_the_last_third(tmp_path: Path) -> None:
    run = trajectory(tmp_path / "a", [0.95, 0.9, 0.8, 0.7, 0.65, 0.6], schedule="constant")
    # steps 40, 50, 60: 0.7, 0.65, 0.6
    assert late_slope(run.trajectory, BIOS.forget) == pytest.approx(-0.005)
    # (0.6 - 0.1) / 0.005 = 100 more steps, 160 in all
    message = advise(run, BIOS)
    assert "0.050 in 10 steps, so about 100 more would reach the level: train.steps 160" in message
    assert "optimizer.lr 0.003" in message and "leaves room" in message
    falling = trajectory(tmp_path / "b", [0.95, 0.9, 0.8, 0.7, 0.65, 0.6], schedule="linear")
    assert "fewer may do" in advise(falling, BIOS) and "fewer may do" not in message


@pytest.mark.parametrize(
    ("forgets", "retain", "message"),
    [
        ([0.99, 0.985, 0.98], 0.8, "hardly moved (1.000 to 0.980): try a learning rate ten times as large"),
        ([0.6, 0.3, 0.5, 0.55], 0.8, "fell to 0.300 at step 20 and rose again to 0.550"),
        ([0.6, 0.5, 0.5, 0.5, 0.5, 0.5], 0.8, "come to rest at 0.500"),
        ([0.6, 0.5, 0.5, 0.5, 0.5, 0.499], 0.8, "come to rest at 0.499"),  # thousands of steps are no advice
        ([0.8, 0.6, 0.5], 0.3, "down to 0.300 of 0.800"),
    ],
)  # fmt: skip
def test_advice_by_the_shape_of_the_run(tmp_path: Path, forgets: list[float], retain: float, message: str) -> None:
    assert message in advise(trajectory(tmp_path / "run", forgets, retain), BIOS)


def test_where_no_run_reaches_the_level_the_first_table_says_where_each_stands(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [bios(0.6, 0.7), bios(0.3, 0.6), bios(0.35, 0.65)])
    groups = read(run)
    first = run_report.write_report(tmp_path / "report", groups, BIOS, TARGET)
    assert first[1] == ["npo+nll sago seed 0", "1.000", "0.300", "20", "0.350", "0.800", "0.600", "0.650", "30"]
    text = (tmp_path / "report" / "report.md").read_text()
    headings = re.findall(r"(?m)^## (.*)", text)
    assert headings[0] == "Runs that did not reach the level, and what to try"
    assert "| npo+nll sago | – |" not in text.partition("## Loss dynamics")[0], "a table of dashes"
    groups = read(run, make_run(tmp_path / "sum", [bios(0.05, 0.5)], rule="sum"))
    first = run_report.write_report(tmp_path / "report", groups, BIOS, TARGET)
    assert first[0][0] == "method"
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.index("## Results at forget ROUGE-L 0.1") < text.index("## Runs that did not reach the level")
