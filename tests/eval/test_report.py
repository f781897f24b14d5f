"""The report: numbers against arithmetic done by hand, and real files."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib import image

from eval import report
from eval.files import exit_status
from eval.reporting import figures, run_report, tables
from eval.reporting.pages import as_markdown
from eval.results import trajectories
from pipeline.config.schema import REPOSITORY
from tests.eval.reported import (
    BIOS,
    NEVER,
    ON_THE_DOT,
    REACHES,
    Points,
    alter,
    entry,
    make_run,
    read,
    spoil,
)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "eval.report", *map(str, arguments)]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def trajectory(points: Points) -> list[trajectories.Scores]:
    return [{"step": step, "bios.forget.all": forget, "bios.retain.all": retain} for step, forget, retain in points]


def test_first_crossing_is_interpolated_in_every_number() -> None:
    point = trajectories.at_level(trajectory(REACHES), BIOS)
    assert point == pytest.approx({"step": 18.0, "bios.forget.all": 0.1, "bios.retain.all": 0.74})
    assert trajectories.at_level(trajectory(ON_THE_DOT), BIOS) == pytest.approx(trajectory(ON_THE_DOT)[1])
    assert trajectories.at_level(trajectory(NEVER), BIOS) is None
    early: Points = [(10, 0.05, 0.4), (20, 0.5, 0.9)]
    assert trajectories.at_level(trajectory(early), BIOS) == trajectory(early)[0]


def test_a_score_that_only_the_last_model_has_is_that_of_the_last_model() -> None:
    """A run that ends at the level, and whose final model was also evaluated on what it can do at large."""
    run = trajectory(REACHES)
    crossing = next(number for number, scores in enumerate(run) if scores[BIOS.forget] <= BIOS.level)
    run[crossing]["lm_eval.piqa.acc"] = 0.75
    point = trajectories.at_level(run[: crossing + 1], BIOS)
    assert point is not None and point["lm_eval.piqa.acc"] == 0.75
    assert run[crossing - 1]["step"] < point["step"] < run[crossing]["step"]


def test_the_target_is_step_zero(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fast", [(10, 0.0, 0.5)])
    start = trajectories.read_scores(entry(7, 1.0, 1.0), tmp_path, step=0)
    run = trajectories.prepare(trajectories.read_run(folder), BIOS, start)
    point = trajectories.at_level(run.trajectory, BIOS)
    assert point is not None and point["step"] == pytest.approx(9.0) and point["bios.retain.all"] == pytest.approx(0.55)


def test_cost_is_beside_the_sum_of_the_same_settings(tmp_path: Path) -> None:
    """A `sum` of longer texts is no measure of what a rule costs."""
    seconds = {"sago": ("sago", 24, 3.0), "sum": ("sum", 24, 2.0), "long": ("sum", 512, 9.0)}
    folders = []
    for name, (rule, length, each) in seconds.items():
        folder = alter(make_run(tmp_path / name, REACHES, rule=rule), "data.max_length", length)
        rows = [json.loads(line) | {"seconds": each} for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(folder)
    table = tables.cost_table(read(*folders), BIOS)
    assert [row[2] for row in table[1:]] == ["1.50", "1.00", "1.00"]


def test_one_task_alone_has_no_rule_and_a_default_scope_no_name(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "alone", REACHES),
        make_run(tmp_path / "a", REACHES, rule="pcgrad"),
        make_run(tmp_path / "b", REACHES, rule="pcgrad"),
    ]
    for folder, section, key, value in (
        (folders[0], "objective", "retain", "none"),
        (folders[1], "synthesis", "scope", None),
        (folders[2], "synthesis", "scope", "global"),
    ):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config[section][key] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    groups = read(*folders)
    assert list(groups) == ["ga alone", "ga+nll pcgrad", "ga+nll pcgrad synthesis.scope=global"]
    assert figures.panels(groups) == {"ga+nll": list(groups)}, "drawn beside the methods that have both tasks"


def test_the_best_export_below_the_level_may_come_after_the_crossing() -> None:
    again: Points = [(10, 0.5, 0.9), (20, 0.05, 0.3), (30, 0.08, 0.8), (40, 0.2, 1.0), (50, 0.01, 0.7)]
    assert trajectories.best_below(trajectory(again), BIOS) == trajectory(again)[2]
    assert trajectories.best_below(trajectory(NEVER), BIOS) is None


def test_means_are_over_the_seeds_that_reached_the_level_and_say_so(tmp_path: Path) -> None:
    groups = read(
        make_run(tmp_path / "a", REACHES, seed=0),
        make_run(tmp_path / "b", ON_THE_DOT, seed=1),
        make_run(tmp_path / "c", NEVER, seed=2),
        make_run(tmp_path / "d", NEVER, rule="sum"),
    )
    header, sago, total = tables.matched_table(groups, BIOS, ["bios.retain.all"], None)
    assert header == ["method", "retain", "step", "seeds that reached it"]
    # (0.74 + 0.6) / 2 = 0.67; sd = |0.74 - 0.6| / sqrt(2) = 0.09899; steps 18 and 20: 19, sd 2 / sqrt(2) = 1.414
    assert sago == ["ga+nll sago", "0.670 ± 0.099", "19.0 ± 1.4", "2 of 3"]
    assert total == ["ga+nll sum", "–", "–", "0 of 1"]
    rows = tables.seed_table(groups, BIOS)
    assert [row[2:6] for row in rows[1:]] == [
        ["0", "0.000", "18.0", "0.740"],
        ["1", "0.100", "20.0", "0.600"],
        ["2", "0.400", "not reached", "–"],
        ["0", "0.400", "not reached", "–"],
    ]
    assert "ga+nll sago seed 2: 0.400; ga+nll sum seed 0: 0.400" in as_markdown(run_report.compose(groups, BIOS, None))


def test_cosines_are_means_over_the_steps_that_have_them(tmp_path: Path) -> None:
    table = tables.cosine_table(read(make_run(tmp_path / "a", REACHES), make_run(tmp_path / "b", REACHES, rule="sum")))
    assert table[1:3] == [
        ["ga+nll sago", "-0.40", "0.40", "0.40", "0.40"],
        ["ga+nll sum", "-0.40", "0.40", "0.40", "–"],
    ]
    assert table[-1] == ["paper, Table 3: SAGO", "-0.35", "0.17", "0.57", "–"]


def test_prediction_needs_runs_that_differ(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(seed), REACHES, seed=seed) for seed in range(5)]
    assert "too few" in tables.prediction(read(*folders), BIOS)
    for number in range(5):  # on a line
        cosine, retain = 0.1 * number, 0.1 + 0.2 * number
        (tmp_path / str(number) / "evaluation.json").write_text(json.dumps({"trajectory": [entry(1, 0.1, retain)]}))
        row = {"step": 1, "forget_loss": 0, "retain_loss": 0, "cos_forget_retain": 0, "cos_combined_forget": 0}
        (tmp_path / str(number) / "metrics.jsonl").write_text(json.dumps(row | {"cos_combined_retain": cosine}))
    message = tables.prediction(read(*folders), BIOS)
    assert "5 runs" in message and "r = 1.00" in message
    early = make_run(tmp_path / "early", [(10, 0.0, 0.1)], seed=5)  # below the level, nobody knows since when
    assert tables.prediction(read(*folders, early), BIOS) == message
    assert "too few" in tables.prediction(read(*folders[:4]), BIOS), "four points lie near a line by chance"


def test_the_command_writes_a_report_that_stands_alone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"sago{seed}", points, seed=seed) for seed, points in enumerate([REACHES, NEVER])]
    runs.append(make_run(tmp_path / "sum <b>", ON_THE_DOT, rule="sum"))
    target = tmp_path / "target.json"
    target.write_text(json.dumps(entry(0, 0.987, 0.991)))
    output = tmp_path / "new" / "report"
    result = command(*runs, "--output", output, "--target", target)
    assert result.returncode == 0, result.stderr
    assert "ga+nll sago" in result.stdout and "1 of 2" in result.stdout and str(output / "index.html") in result.stdout

    figures = {"frontier.png", "points.png", "losses.png", "geometry.png"}
    assert {path.name for path in output.iterdir()} == figures | {"index.html", "report.md"}
    for name in figures:
        pixels = image.imread(output / name)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 300 and pixels[..., :3].std() > 0.05  # not a blank sheet

    page, markdown = (output / "index.html").read_text(), (output / "report.md").read_text()
    assert not re.search(r"https?:|<script[^>]*src|<link|url\(|@import", page) and len(page) < 5e6
    sources = re.findall(r'src="([^"]*)"', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    embedded = {base64.b64decode(source.partition(",")[2]) for source in sources}
    assert embedded == {(output / name).read_bytes() for name in figures}
    assert "sum &lt;b&gt;" in page and "sum <b>" not in page
    assert figures == set(re.findall(r"\]\((\w+\.png)\)", markdown))
    assert "| target model | 0.987 | 0.991 | 0 | reference |" in markdown
    assert "ga+nll sago seed 1" in markdown and "torch 9.9" in markdown
    for message in (
        "--config " + str(runs[0] / "config.yaml"),
        "python -m eval.run --model it",
        "python -m eval.report",
    ):
        assert message in markdown


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluation.json", None, "python -m eval.run --model"),
        ("evaluation.json", '{"suites": {}}', "no trajectory"),
        ("evaluation.json", '{"trajectory": [{"step": 1, "suites": {"other": {}}}]}', "as eval.run writes"),
        ("evaluation.json", '{"trajectory": [{"step": "one", "suites": {}}]}', "as eval.run writes"),
        (
            "evaluation.json",
            '{"trajectory": [{"step": 9, "suites": {}}, {"step": 2, "suites": {}}]}',
            "step 2 after step 9",
        ),
        (
            "evaluation.json",
            '{"trajectory": [{"step": 1, "suites": {"bios": {"metrics": {"retain": {"all": 1}}}}}]}',
            "bios.forget.all",
        ),
        ("robustness.json", '{"suite": "bios", "attacks": [{"name": "relearn"}]}', "eval.robustness"),
        ("evaluation.json", "{", "cannot read"),
        ("config.yaml", None, "config.yaml"),
        ("config.yaml", "seed: 0\n", "synthesis"),
        ("config.yaml", "a: [\n", "config.yaml"),
        ("metrics.jsonl", '{"step": 1}\n', "step 1"),
    ],
)
def test_unusable_runs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: str | None,
    message: str,
) -> None:
    folder = make_run(tmp_path / "run", REACHES)
    spoil(folder / file, content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder), "--output", str(tmp_path / "report")])
    assert exit_status(report.main) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(folder / file) in error and message in error
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("log", ["", '{"step": 1, LOSSES}\n'], ids=["no step", "no finite loss"])
def test_a_run_without_a_loss_to_draw_has_a_report_without_that_figure(
    log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a run that ended before its first step, or whose every step overflowed."""
    folder = make_run(tmp_path / "run", REACHES)
    losses = json.dumps(dict.fromkeys(("forget_loss", "retain_loss", *trajectories.COSINES)))[1:-1]
    (folder / "metrics.jsonl").write_text(log.replace("LOSSES", losses))
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder), "--output", str(tmp_path / "report")])
    assert exit_status(report.main) == 0
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"index.html", "report.md", "frontier.png", "points.png"}
    page = (tmp_path / "report" / "report.md").read_text()
    assert set(re.findall(r"\w+\.png", page)) == {"frontier.png", "points.png"} and "no step logged a loss" in page


def test_unusable_arguments(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", REACHES)
    for arguments, words in (
        ([folder, "--output", tmp_path / "report", "--level", "7"], "--level 7"),
        ([folder, "--output", tmp_path / "report", "--retain", "mmlu.acc.all"], "--retain mmlu.acc.all"),
        ([folder, "--output", tmp_path / "report", "--forget", "bios.forget.FB"], "give --retain and --level"),
        ([folder, "--output", tmp_path / "report", "--retain", "bios.retain.fb"], "bios.retain.FB"),
        ([folder, "--output", folder / "config.yaml"], "name a folder"),
        ([tmp_path / "nowhere", "--output", tmp_path / "report"], "nowhere"),
        (
            [folder, "--output", tmp_path / "report", "--target", folder / "evaluation.json"],
            f"--target {folder / 'evaluation.json'} is the evaluation of a run",
        ),
    ):
        result = command(*arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and words in result.stderr
        assert not (tmp_path / "report").exists()
