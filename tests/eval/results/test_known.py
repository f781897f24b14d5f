"""Small scores are printed so that a reader can use them, and a model that never knew the forget corpus is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from eval import run
from eval.reporting import run_report, tables
from eval.reporting.pages import as_html, as_markdown, as_text
from eval.reporting.verdict import verdict
from eval.results import grouping, trajectories
from eval.results.metrics import choose
from eval.results.stats import mean_sd
from tests.eval.runs import Suites, make_run


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.0004], "0.0004"),
        ([0.00044], "0.00044"),
        ([0.0096], "0.0096"),
        ([0.0], "0.000"),
        ([0.2], "0.200"),
        ([4.1e-5], "4.1e-05"),
        ([0.5, 0.7], "0.600 ± 0.141"),  # 0.2 / sqrt(2)
        ([0.0042, 0.0046], "0.0044 ± 0.0003"),  # 0.0004 / sqrt(2) = 0.00028
        ([0.5, 0.5004], "0.500 ± 0.0003"),
        ([0.8, 0.8], "0.800 ± 0.000"),
        ([0.8, math.nextafter(0.8, 1)], "0.800 ± 0.000"),  # one of them was interpolated
        ([0.8, math.nan], "nan"),  # of a broken model
        ([], "–"),
    ],
)
def test_a_score_has_at_least_two_digits(values: list[float], text: str) -> None:
    assert mean_sd(values) == text


def corpus(forget: float, retain: float) -> Suites:
    of = {"forget": {"probability": forget, "rouge": 0.1, "rouge_unseen": 0.1}, "retain": {"probability": retain}}
    return {"corpus": of}


def test_no_report_prints_a_small_score_as_zero(tmp_path: Path) -> None:
    """The same digits in the terminal, in Markdown and on the page; the best of a column by its value, not its form."""
    folders = [
        make_run(tmp_path / "sago", [corpus(0.00042, 0.5)]),
        make_run(tmp_path / "sum", [corpus(4.1e-5, 0.004)], rule="sum"),
    ]
    target = {"step": 0.0, "corpus.forget.probability": 0.1, "corpus.retain.probability": 0.9}
    target |= {"corpus.forget.rouge": 0.1, "corpus.forget.rouge_unseen": 0.1}
    measure = choose(["corpus"], target=target)
    groups = grouping.group_runs(trajectories.prepare(trajectories.read_run(one), measure, target) for one in folders)
    ends = tables.end_table(groups, measure, [measure.forget, measure.retain], target)
    assert [row[1:3] for row in ends[2:]] == [["0.00042", "0.500"], ["4.1e-05", "0.004"]]
    assert tables.best_cells(ends, [measure.forget, measure.retain]) == {(3, 1), (2, 2)}
    blocks = run_report.compose(groups, measure, target)
    charts = run_report.charts_of(groups, measure, target)
    page = as_html("", blocks, dict.fromkeys(charts, b""), charts)
    for text in (as_markdown(blocks), page):
        assert "0.00042" in text and "4.1e-05" in text
    entries = [{"step": 1, "model": "m", "suites": {"corpus": {"metrics": corpus(0.00042, 0.5)["corpus"]}}}]
    assert "0.00042" in as_text(run.score_tables(entries, {})["corpus"])


# e^-5.9 = 0.0027 and e^-3.9 = 0.020 are what SmolLM2-135M gives to invented persons and to common facts.
@pytest.mark.parametrize(
    ("suites", "scores", "message"),
    [
        (["bios"], {"bios.forget.all": 0.05, "bios.retain.all": 0.9}, "forget ROUGE-L 0.050; one that knows nothing"),
        (["bios"], {"bios.forget.all": 0.095, "bios.retain.all": 0.9}, "0.095, no more than the level, 0.1"),
        (["bios"], {"bios.forget.all": 0.3, "bios.retain.all": 0.9}, None),
        (
            ["wmdp_bio", "mmlu"],
            {"wmdp_bio.acc.all": 0.27, "mmlu.acc.all": 0.5},
            "one that knows nothing has about 0.25",
        ),
        (["wmdp_bio", "mmlu"], {"wmdp_bio.acc.all": 0.44, "mmlu.acc.all": 0.5}, None),
        (
            ["corpus"],
            {"corpus.forget.probability": 0.0027, "corpus.retain.probability": 0.02},
            "text that a model never",
        ),
        (["corpus"], {"corpus.forget.probability": 0.02, "corpus.retain.probability": 0.02}, None),
        (["corpus"], {"corpus.forget.probability": 0.3, "corpus.retain.probability": 0.9}, None),
    ],
)
def test_a_model_that_never_knew_has_nothing_to_forget(
    tmp_path: Path, suites: list[str], scores: dict[str, float], message: str | None
) -> None:
    """The verdict is that sentence alone, in place of a comparison of runs that were not needed."""
    if suites == ["corpus"]:
        scores |= {"corpus.forget.rouge": 0.12, "corpus.forget.rouge_unseen": 0.1}
    target = {"step": 0.0, **scores}
    nested: Suites = {suite: {} for suite in suites}
    for name, value in scores.items():
        suite, part, rest = name.split(".")
        nested[suite].setdefault(part, {})[rest] = value / 2
    measure = choose(suites, target=target)
    read = trajectories.read_run(make_run(tmp_path / "run", [nested]))
    groups = grouping.group_runs([trajectories.prepare(read, measure, target)])
    found = [finding.text for finding in verdict(groups, measure, target)]
    if message is None:
        assert not any("Nothing to forget" in sentence for sentence in found)
    else:
        (sentence,) = found
        assert sentence.startswith("Nothing to forget: the target model has") and message in sentence
        assert "Begin with a model that knows the forget corpus" in sentence


def bios_metrics(score: float) -> dict[str, dict[str, float]]:
    return {"forget": {"all": score}, "retain": {"all": score}}


def test_the_command_says_so_of_a_single_model_and_of_the_first_probe_of_a_run(tmp_path: Path) -> None:
    """A run that trains a target model (objective.forget none) begins with one that knows nothing: no fault."""
    entry = {"step": None, "model": "m", "suites": {"bios": {"metrics": bios_metrics(0.02)}}}
    (sentence,) = run.unknown_to(*run.before_unlearning(tmp_path, [entry], {}))
    assert sentence.startswith("Nothing to forget: this model has forget ROUGE-L 0.020")
    probe = {"probe/forget/extraction_strength": 0.01, "probe/retain/probability": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **probe}) + "\n" + json.dumps({"step": 1}) + "\n")
    for objective, sentences in (("npo", 1), ("none", 0)):
        (tmp_path / "config.yaml").write_text(f"objective: {{forget: {objective}}}\n")
        found = run.unknown_to(*run.before_unlearning(tmp_path, [{**entry, "step": 1}], {}))
        assert len(found) == sentences
        assert all("the model before the first step has forget extraction strength 0.01" in one for one in found)


def test_a_model_that_a_run_has_unlearned_is_no_fault(tmp_path: Path) -> None:
    """`final/` of a run, or one of its exports, should know nothing; that of a run that learned should."""
    entry = {"step": None, "model": "m", "suites": {"bios": {"metrics": bios_metrics(0.02)}}}
    (tmp_path / "metrics.jsonl").touch()
    for objective, sentences in (("npo", 0), ("none", 1)):
        (tmp_path / "config.yaml").write_text(f"objective: {{forget: {objective}}}\n")
        for place in ("final", "exports/step-000010"):
            assert len(run.unknown_to(*run.before_unlearning(tmp_path / place, [entry], {}))) == sentences, place
