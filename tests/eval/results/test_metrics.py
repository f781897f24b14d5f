"""Every suite's answer, as eval.run writes it, through the reports: which number is read, and where."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.reporting import run_report, sections, tables
from eval.reporting.pages import Table, as_markdown
from eval.results import grouping, paper, trajectories
from eval.results.common import common_suites
from eval.results.metrics import MEASURES, ForgetRetainMetric, choose
from pipeline.errors import InputError
from tests.eval.runs import Suites, make_run


def read(*folders: Path, **options: Any) -> tuple[dict[str, list[trajectories.Run]], ForgetRetainMetric]:
    runs = [trajectories.read_run(folder) for folder in folders]
    measure = choose(common_suites(runs, None), **options)
    return grouping.group_runs(trajectories.prepare(run, measure, None) for run in runs), measure


def wmdp(acc: float, mmlu: float, suite: str = "wmdp_cyber") -> Suites:
    return {suite: {"acc": {"all": acc}}, "mmlu": {"acc": {"all": mmlu, "anatomy": mmlu / 2}}}


def rwku(forget: float, retain: float) -> Suites:
    of = {"F-FB": forget, "F-QA": forget, "F-All": forget, "N-FB": retain, "N-QA": retain, "N-All": retain}
    return {"rwku": {"rwku": dict.fromkeys(of, 0.99), "sago": of, "membership": {"AUC": {"loss": 0.5}}}}


def tofu(strength: float, utility: float | None) -> Suites:
    forget = {"probability": 0.5, "extraction_strength": strength}
    return {"tofu": {"forget": forget, "model_utility": utility, "forget_quality": None}}


@pytest.mark.parametrize(
    ("make", "level", "points", "step", "retain"),
    [
        (wmdp, 0.30, [(0.40, 0.6), (0.20, 0.5)], 15, 0.55),  # half of the way
        (rwku, 0.15, [(0.75, 0.8), (0.00, 0.3)], 18, 0.4),  # four fifths
        (tofu, 0.10, [(0.90, 0.7), (0.10, 0.6)], 20, 0.6),
    ],
)
def test_each_suite_is_read_by_its_own_measure(
    tmp_path: Path, make: Any, level: float, points: list[tuple[float, float]], step: float, retain: float
) -> None:
    groups, measure = read(make_run(tmp_path / "run", [make(*point) for point in points]))
    ((run,),) = groups.values()
    point = trajectories.at_level(run.trajectory, measure)
    assert measure.level == level and point is not None
    assert point["step"] == pytest.approx(step) and point[measure.retain] == pytest.approx(retain)
    text = as_markdown(run_report.compose(groups, measure, None))
    assert measure.forget in text and f"{retain:.3f}" in text and "asked" in text


def test_runs_of_several_suites_show_all_their_scores(tmp_path: Path) -> None:
    both = [wmdp(0.4, 0.6) | wmdp(0.5, 0.6, "wmdp_bio"), wmdp(0.2, 0.5) | wmdp(0.3, 0.5, "wmdp_bio")]
    groups, measure = read(make_run(tmp_path / "run", both))
    assert measure.forget == "wmdp_bio.acc.all"  # the first of the table
    columns = sections.headline_columns(tables.score_columns(groups), measure, tables.general_of(groups))
    assert tables.matched_table(groups, measure, columns, None)[0][1:3] == ["MMLU accuracy", "WMDP Cyber accuracy"]
    assert [row[0] for row in tables.every_score(groups, measure, None)[1:]] == [
        *("wmdp_cyber.acc.all", "mmlu.acc.all", "mmlu.acc.anatomy", "wmdp_bio.acc.all"),
    ]
    groups, measure = read(tmp_path / "run", forget="wmdp_cyber.acc.all", level=0.35)
    ((run,),) = groups.values()
    assert measure.retain == "mmlu.acc.all"
    # 0.4 -> 0.2 passes 0.35 after a quarter
    assert trajectories.at_level(run.trajectory, measure) == pytest.approx(
        {
            "step": 12.5,
            "wmdp_cyber.acc.all": 0.35,
            "wmdp_bio.acc.all": 0.45,
            "mmlu.acc.all": 0.575,
            "mmlu.acc.anatomy": 0.2875,
        }
    )


def test_options_override_the_measure() -> None:
    own = choose(["bios"], forget="bios.forget.QA", retain="bios.facts.all", level=0.2)
    assert own == ForgetRetainMetric("bios.forget.QA", "bios.facts.all", 0.2)
    assert choose(["bios"], retain="bios.facts.all") == ForgetRetainMetric(
        "bios.forget.all", "bios.facts.all", 0.1, 0.03
    )
    assert choose(["mmlu", "wmdp_bio"]) == MEASURES[1] and choose(["tofu", "rwku"]) == MEASURES[3]


@pytest.mark.parametrize(
    ("suites", "options", "message"),
    [
        (["bios"], {"retain": "retain.all"}, "SUITE.METRIC"),
        (["tofu"], {"forget": "bios.forget.all"}, r"--forget bios.forget.all is no score of .* \(tofu\)"),
        (["tofu"], {"forget": "tofu.forget_quality"}, "rises"),
        (["muse_news"], {"forget": "muse_news.privleak"}, "rises"),
        (["bios"], {"level": 1.5}, "--level 1.5"),
        (["bios"], {"forget": "bios.forget.FB", "level": 0.1}, "give --retain and --level"),
        (["wmdp_bio"], {}, "mmlu"),
        (["wmdp_bio"], {"forget": "wmdp_bio.acc.all"}, "mmlu.acc.all"),
    ],
)
def test_measures_that_cannot_be(suites: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        choose(suites, **options)
    assert "\n" not in str(caught.value)


def test_an_export_without_the_score_is_left_out_and_told(tmp_path: Path) -> None:
    """A model beyond repair has no utility: its losses are no numbers, and the suite writes null."""
    folder = make_run(tmp_path / "run", [tofu(0.8, 0.6), tofu(0.5, None), tofu(0.2, 0.4)])
    groups, measure = read(folder, level=0.4)
    ((run,),) = groups.values()
    assert run.left_out == [20]
    assert trajectories.at_level(run.trajectory, measure) == pytest.approx(
        # two thirds of the way from step 10 to step 30
        {
            "step": 10 + 20 * 2 / 3,
            "tofu.forget.extraction_strength": 0.4,
            "tofu.forget.probability": 0.5,
            "tofu.model_utility": 0.6 - 0.4 / 3,
        }
    )
    assert f"{tmp_path / 'run'}: step 20" in as_markdown(run_report.compose(groups, measure, None))
    with pytest.raises(InputError, match=r"no score tofu.model_utility"):
        read(make_run(tmp_path / "none", [tofu(0.8, None)]))


def test_the_papers_rows_are_beneath_ours(tmp_path: Path) -> None:
    """Rows of Tables 1 and 2 by hand, and of what others published; nothing for a benchmark that nobody has."""
    groups, measure = read(make_run(tmp_path / "run", [wmdp(0.4, 0.6), wmdp(0.2, 0.5)]))
    header, ours, *theirs = tables.paper_table(groups, measure)
    assert header[:3] == ["method", "WMDP Cyber accuracy, at the end", "MMLU accuracy, at the end"]
    assert header[3:] == ["MMLU accuracy, at WMDP Cyber accuracy 0.3"]
    assert ours == ["npo+nll sago", "0.200", "0.500", "0.550"]
    assert ["paper, Table 1: SimNPO+GD, SAGO", "0.291", "0.583", "–"] in theirs
    assert ["paper, Table 2: RMU, BLUR", "0.256", "0.556", "–"] in theirs
    assert ["paper, Table 1: target", "0.444", "0.598", "–"] in theirs and len(theirs) == 14 + 3
    groups, measure = read(make_run(tmp_path / "rwku", [rwku(0.1, 0.5)]))
    values = ["0.051", "0.057", "0.054", "0.361", "0.472", "0.417", "–"]
    assert ["paper, Table 1: NPO+GD, SAGO", *values] in tables.paper_table(groups, measure)
    muse = {"forget": {"verbmem": 0.1, "knowmem": 0.2}, "retain": {"knowmem": 0.3}, "privleak": -50.0}
    groups, measure = read(make_run(tmp_path / "muse", [{"muse_news": muse}]))
    rows = tables.paper_table(groups, measure)
    assert rows[1][1:5] == ["0.200", "0.100", "-50.000", "0.300"] and len(rows) == 2 + 7
    assert ["paper, OpenUnlearning: NPO+GD", "0.560", "0.350", "-86.000", "0.510", "–"] in rows
    columns = [*paper.COLUMNS["muse_news"], measure.retain]
    privacy = [
        [name, "0.1", "0.1", leak, "0.1", "0.1"] for name, leak in (("a", "-50.0"), ("b", "-2.0"), ("c", "60.0"))
    ]
    assert tables.best_cells([rows[0], *privacy], columns) == {(2, 3)}, "neither the greatest nor the least"
    text = as_markdown(run_report.compose(groups, measure, None))
    assert "Beside published numbers" in text and "OpenUnlearning's reproduction" in text
    groups, measure = read(make_run(tmp_path / "bios", [{"bios": {"forget": {"all": 0.1}, "retain": {"all": 0.5}}}]))
    assert tables.paper_table(groups, measure) == []


def test_published_numbers_of_tofu(tmp_path: Path) -> None:
    """Untuned ones have forget quality and model utility, tuned ones the aggregate: the harmonic mean of its parts."""
    scores = {"forget": {"extraction_strength": 0.1}, "model_utility": 0.5, "forget_quality": 0.25}
    aggregate = {"memorization": 0.6, "privacy": 0.7, "utility": 0.8, "overall": 0.69}
    groups, measure = read(make_run(tmp_path / "run", [{"tofu": {**scores, "aggregate": aggregate}}]))
    header, ours, *theirs = tables.paper_table(groups, measure)
    assert header[2] == "forget quality, at the end" and header[-2] == "aggregate overall, at the end"
    assert ours[1:] == ["0.100", "0.250", "0.500", "0.600", "0.700", "0.800", "0.690", "0.500"]
    assert ["paper, OpenUnlearning: NPO+GD", "–", "0.020", "0.460", *["–"] * 5] in theirs
    assert ["paper, OpenUnlearning: target", "–", "1.7e-21", "0.600", *["–"] * 5] in theirs
    tuned = ["0.091", "–", "0.561", "0.547", "0.875", "0.983", "0.752", "–"]
    assert ["paper, arXiv 2605.24614: NPO+GD", *tuned] in theirs and len(theirs) == 8 + 8
    for *_, memorization, privacy, utility, overall in paper.TOFU_TUNED.values():
        if overall:
            assert overall == pytest.approx(3 / (1 / memorization + 1 / privacy + 1 / utility), abs=1e-3)
    text = as_markdown(run_report.compose(groups, measure, None))
    assert "Beside published numbers" in text and "what arXiv 2605.24614 measured of OpenUnlearning's models" in text


def test_cost_is_the_median_after_the_first_steps(tmp_path: Path) -> None:
    seconds = [60.0, 9.0, 9.0, 2.0, 4.0, 3.0]  # of the last three: 3
    plain = make_run(tmp_path / "sum", [wmdp(0.4, 0.6), wmdp(0.2, 0.5)], rule="sum", seconds=seconds)
    sago = make_run(
        tmp_path / "sago",
        [wmdp(0.4, 0.6), wmdp(0.2, 0.5)],
        seconds=[2 * value for value in seconds],
        tokens_per_second=[1, 1, 1, 100, 300, 200],
        peak_memory_bytes=[2**30, 3 * 2**30, 2**30],
    )
    _, of_sum, of_sago = tables.cost_table(*read(plain, sago))
    assert of_sum == ["npo+nll sum", "3.000", "1.00", "–", "–", "15", "45"]
    assert of_sago == ["npo+nll sago", "6.000", "2.00", "200", "3.00", "15", "90"]


def test_attacks_are_averaged_over_runs(tmp_path: Path) -> None:
    folders = []
    for seed, after in enumerate((0.3, 0.5)):
        folders.append(make_run(tmp_path / str(seed), [rwku(0.1, 0.5)], seed=seed))
        before = {"sago.F-All": 0.1, "sago.N-All": 0.5, "forget_nll": 4.0}
        entries = [
            {"name": "relearn", "settings": {"steps": 9, "seed": seed, "group": None}, "before": before, "seconds": 7,
             "after": {"sago.F-All": after, "sago.N-All": 0.4, "forget_nll": 3.0}, "original": {"sago.F-All": 0.8}},
            {"name": "probes", "settings": {}, "before": before, "after": {"sago.F-AA": after / 10}},
        ]  # fmt: skip
        told = {"suite": "rwku", "attacks": entries, "command": "python -m eval.robustness", "dtype": "bf16", "seed": 3}
        (folders[-1] / "robustness.json").write_text(json.dumps(told))
    groups, measure = read(*folders)
    _, relearn, probes = tables.attack_table(groups)
    same = "0.100 ± 0.000"
    # sd of 0.3 and 0.5: 0.2 / sqrt(2) = 0.1414
    assert relearn[1:7] == ["rwku", "relearn (steps 9)", same, "0.400 ± 0.141", "0.800 ± 0.000", "0.500 ± 0.000"]
    assert relearn[7:] == ["0.400 ± 0.000", "4.000 ± 0.000", "3.000 ± 0.000", "7 ± 0", "2"]
    assert probes[1:5] == ["rwku", "probes", same, "0.040 ± 0.014"] and probes[-1] == "2"
    text = as_markdown(run_report.compose(groups, measure, None))
    assert "bf16, seed 3" in text and "python -m eval.robustness" in text


def test_an_attack_on_another_suite_has_no_retain_score_of_mmlu(tmp_path: Path) -> None:
    """`acc.all` after an attack on WMDP is WMDP's, not MMLU's; a suite without a measure is listed all the same."""
    folder = make_run(tmp_path / "run", [wmdp(0.4, 0.6)])
    for suite, forget in (("wmdp_cyber", "0.300"), ("mmlu", "–")):
        entry = {"name": "int8", "settings": {}, "before": {"acc.all": 0.3}, "after": {"acc.all": 0.3}}
        (folder / "robustness.json").write_text(json.dumps({"suite": suite, "attacks": [entry]}))
        assert tables.attack_table(read(folder)[0])[1][1:8] == [suite, "int8", forget, forget, "–", "–", "–"]


def test_layers_are_drawn_where_they_were_logged(tmp_path: Path) -> None:
    layers: dict[str, Any] = {
        f"{key}__model.layers.{n}": [0.1 * n] for key in ("cos_forget_retain", "conflict_fraction") for n in (0, 1)
    }
    groups, measure = read(make_run(tmp_path / "with", [wmdp(0.4, 0.6)], **layers))
    assert "layers.png" in run_report.draw(run_report.charts_of(groups, measure, None))
    assert "(layers.png)" in as_markdown(run_report.compose(groups, measure, None))
    groups, measure = read(make_run(tmp_path / "without", [wmdp(0.4, 0.6)]))
    assert "layers.png" not in run_report.charts_of(groups, measure, None)


def test_what_neither_corpus_mentions_is_beside_the_rest(tmp_path: Path) -> None:
    def bios(forget: float, neighbours: float, facts: float) -> Suites:
        splits = {"forget": forget, "retain": 0.9, "neighbours": neighbours, "facts": facts}
        return {"bios": {split: {"all": value} for split, value in splits.items()}}

    one = make_run(tmp_path / "one", [bios(0.2, 0.8, 1.0), bios(0.0, 0.4, 0.9)])  # halfway: neighbours 0.6, facts 0.95
    other = make_run(tmp_path / "other", [bios(0.1, 0.3, 0.7)], rule="sum")
    groups, measure = read(one, other)
    text = as_markdown(run_report.compose(groups, measure, None)).partition("## What neither corpus mentions")[2]
    assert "> **Note.** Nothing in the training protects what the retain corpus does not cover" in text
    assert "| npo+nll sago | **0.600** | **0.950** | 0.900 | 15.0 | 1 of 1 |" in text
    assert "lowest under npo+nll sum (0.300), highest under npo+nll sago (0.600)" in text


def ability(forget: float, retain: float, acc: float, perplexity: float) -> Suites:
    """bios, and the tasks of lm-evaluation-harness: one of its own and a group with a member."""
    bios = {split: {"all": value} for split, value in (("forget", forget), ("retain", retain))}
    member = {"mmlu_law": {"acc": acc / 2, "perplexity": 2 * perplexity}}
    return {
        "bios": bios,
        "lm_eval": {"lambada": {"perplexity": perplexity, "acc": acc}, "mmlu": {"acc": acc / 4, **member}},
    }


DIRECTIONS = {
    "lambada": {"perplexity": False, "acc": True},
    "mmlu": {"acc": True, "mmlu_law": {"acc": True, "perplexity": False}},
}


def with_directions(folder: Path) -> Path:
    """The run's evaluation, with what the harness says of its metrics."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for entry in evaluation["trajectory"]:
        entry["suites"]["lm_eval"]["higher_is_better"] = DIRECTIONS
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def test_general_ability_has_columns_of_its_own(tmp_path: Path) -> None:
    """At forget 0.1, half of the way between two exports: acc (.5 + .3) / 2 = .4, perplexity (20 + 60) / 2 = 40."""
    points = {"sum": (80.0, 0.1), "sago": (60.0, 0.3)}
    folders = [
        with_directions(
            make_run(tmp_path / rule, [ability(0.2, 0.9, 0.5, 20.0), ability(0.0, 0.7, acc, worst)], rule=rule)
        )
        for rule, (worst, acc) in points.items()
    ]
    groups, measure = read(*folders)
    columns = sections.headline_columns(tables.score_columns(groups), measure, tables.general_of(groups))
    assert columns == ["bios.retain.all", "lm_eval.lambada.acc", "lm_eval.mmlu.acc"]
    blocks = run_report.general(groups, measure, None)
    (table,) = (block.rows for block in blocks if isinstance(block, Table))
    assert table[0][1:5] == ["retain ROUGE-L (bios)", "lambada perplexity ↓", "lambada accuracy", "mmlu accuracy"]
    (row,) = (row for row in table if row[0] == "npo+nll sago")
    assert row[1:5] == ["0.800", "40.000", "0.400", "0.100"]
    text = as_markdown(run_report.compose(groups, measure, None))
    assert "lambada perplexity ↓: highest under npo+nll sum (50.000), lowest under npo+nll sago (40.000)." in text
    assert "lambada accuracy: lowest under npo+nll sum (0.300), highest under npo+nll sago (0.400)." in text
    assert "lm_eval.mmlu.mmlu_law.perplexity ↓" in text  # a member of a group: among all scores alone


@pytest.mark.parametrize("option", ["forget", "retain"])
def test_a_score_that_a_better_model_has_lower_is_no_measure(tmp_path: Path, option: str) -> None:
    points = [ability(0.2, 0.9, 0.5, 20.0), ability(0.0, 0.7, 0.3, 60.0)]
    folder = with_directions(make_run(tmp_path / "run", points))
    score = "lm_eval.mmlu.mmlu_law.perplexity"
    options = {"forget": "bios.forget.all", "retain": "bios.retain.all", "level": 0.1, option: score}
    with pytest.raises(InputError, match=rf"--{option} {score}: a better model has a lower one"):
        read(folder, **options)


@pytest.mark.parametrize(("start", "level"), [(0.00075, 0.00038), (0.0126, 0.0063), (0.0874, 0.044), (0.9266, 0.463)])
def test_half_of_a_small_probability_is_not_zero(start: float, level: float) -> None:
    """Three decimals, but two digits of a small level: at 0 no run could ever arrive."""
    scores = {"corpus.forget.probability": start, "corpus.forget.rouge": 0.1, "corpus.forget.rouge_unseen": 0.1}
    assert choose(["corpus"], target=scores).level == level
