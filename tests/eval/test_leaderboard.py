"""The leaderboard: what a run adds, what is refused, and that adding a run again changes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval import leaderboard
from eval.files import exit_status
from eval.reporting.leaderboard import page_of
from eval.results.leaderboard import read_board
from pipeline.config.schema import REPOSITORY
from tests.eval.runs import make_run

ZEPHYR = "HuggingFaceH4/zephyr-7b-beta"
PAGE = REPOSITORY / "docs" / "results" / "leaderboard.md"


def make(folder: Path, acc: float, mmlu: float, *, questions: int = 1273, place: str = "hub", **keys: Any) -> Path:
    """A finished run of `rule` and `seed` on WMDP Bio, evaluated at its end; `keys` are those of `make_run`."""
    suites = {"wmdp_bio": {"acc": {"all": acc}}, "mmlu": {"acc": {"all": mmlu, "anatomy": 0.1}}}
    make_run(folder, [suites], **keys)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"method": "npo_x", "model": {"path": ZEPHYR}, "train": {"steps": 3, "stop_at": {}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    entry = evaluation["trajectory"][0] | {"step": 3}
    for name, number in (("wmdp_bio", questions), ("mmlu", 14042)):
        entry["suites"][name]["protocol"] = (
            f"task {name}, most likely answer; mean over questions; questions of {place}"
        )
        entry["suites"][name]["counts"] = {"questions": {"all": number, "anatomy": 5}, "cut": {"all": 0}}
    (folder / "evaluation.json").write_text(json.dumps({**evaluation, "trajectory": [entry]}))
    return folder


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs -> (status, what the command printed), into tmp_path/board.md."""

    def command(*runs: Path) -> tuple[int, str]:
        line = ["leaderboard.py", *map(str, runs), "--file", str(tmp_path / "board.md")]
        monkeypatch.setattr(sys, "argv", line)
        status = exit_status(leaderboard.main)
        return status, "".join(capsys.readouterr())

    return command


def rows_of(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = page.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_seeds_of_a_method_are_one_row_above_the_published_ones(tmp_path: Path, add: Any) -> None:
    runs = [make(tmp_path / str(seed), acc, mmlu, seed=seed) for seed, acc, mmlu in ((0, 0.30, 0.5), (1, 0.26, 0.6))]
    other = make(tmp_path / "other", 0.25, 0.25, rule="sum", place="/some/where")
    status, message = add(runs[0], other)
    assert status == 0 and message.count(": added") == 2 and add(runs[1])[0] == 0
    header, *rows = rows_of(tmp_path / "board.md", f"WMDP Bio, {ZEPHYR}")
    assert header == ["method", "seeds", "WMDP Bio accuracy", "MMLU accuracy", "steps", "configuration"]
    two = next(row for row in rows if row[1] == "0, 1")
    assert two[:5] == ["npo_x: npo+nll sago", "0, 1", "0.280 ± 0.028", "0.550 ± 0.071", "3 ± 0"]
    assert len({row[5] for row in rows[:2]}) == 2 and all(len(row[5]) == 14 for row in rows[:2])  # with its marks
    assert ["paper, Table 1: NPO+GD, SAGO", "–", "0.300", "0.560", "–", "–"] in rows
    text = (tmp_path / "board.md").read_text()
    assert "task wmdp_bio, most likely answer; mean over questions. Numbers: questions.all 1273, cut.all 0." in text
    assert "/some/where" not in text + (tmp_path / "board.jsonl").read_text(), "a path of somebody's machine"


def test_a_row_names_what_the_run_computed(tmp_path: Path, add: Any) -> None:
    """A sweep starts every rule and weight from one method of a recipe, whose name is then that of another rule."""
    settings = [{"rule": "barrier"}, {"rule": "pcgrad", "scope": "element"}, {"rule": "sum", "alpha": 1, "gamma": 0.1}]
    for number, synthesis in enumerate(settings):
        run = make(tmp_path / str(number), 0.3, 0.5)
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "method": "npo_sum", "synthesis": synthesis}))
        assert add(run)[0] == 0
    names = [row[0] for row in rows_of(tmp_path / "board.md", f"WMDP Bio, {ZEPHYR}")[1:4]]
    assert names == [
        "npo_sum: npo+nll barrier",
        "npo_sum: npo+nll pcgrad, scope element",
        "npo_sum: npo+nll sum, gamma 0.1",
    ]


def test_a_run_added_again_changes_nothing(tmp_path: Path, add: Any) -> None:
    run = make(tmp_path / "run", 0.3, 0.5)
    add(run)
    before = {name: (tmp_path / name).read_bytes() for name in ("board.md", "board.jsonl")}
    moved = tmp_path / "moved"
    run.rename(moved)
    status, message = add(moved, moved)
    assert status == 0 and message.count("there already") == 2
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_what_is_not_comparable_is_refused_and_nothing_is_written(tmp_path: Path, add: Any) -> None:
    add(make(tmp_path / "first", 0.3, 0.5))
    before = (tmp_path / "board.jsonl").read_bytes()

    def refusal(run: Path) -> str:
        status, message = add(make(tmp_path / "good", 0.2, 0.4, rule="pcgrad"), run)
        assert status == 2 and (tmp_path / "board.jsonl").read_bytes() == before
        for file in (tmp_path / "good").iterdir():
            file.unlink()
        (tmp_path / "good").rmdir()
        return message

    def change(name: str, file: str, old: str, new: str) -> Path:
        folder = make(tmp_path / name, 0.3, 0.5, seed=7)
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        return folder

    fewer = make(tmp_path / "fewer", 0.3, 0.5, seed=1, questions=20)
    assert "another number of questions of wmdp_bio" in refusal(fewer)
    message = refusal(change("shots", "evaluation.json", "task mmlu", "task mmlu, 0-shot"))
    assert "another protocol of mmlu than the table of wmdp_bio" in message and "not comparable" in message
    message = refusal(make(tmp_path / "repeated", 0.31, 0.5))
    assert "are there with other scores (wmdp_bio.acc.all 0.3, here 0.31)" in message
    assert "ends at step 2, and the run at 3" in refusal(change("early", "evaluation.json", '"step": 3', '"step": 2'))
    assert "has 3 of 100 steps" in refusal(change("cut", "config.yaml", "steps: 3", "steps: 100"))
    assert "unlearned nothing" in refusal(change("target", "config.yaml", "forget: npo", "forget: none"))
    own = change("own", "evaluation.json", '"wmdp_bio"', '"corpus"')
    message = refusal(own)
    assert (
        "evaluated on corpus, mmlu, which nobody can compare" in message and "wmdp_cyber mmlu, rwku, tofu, " in message
    )
    nan = change("nan", "evaluation.json", '"all": 0.3}', '"all": NaN, "part": 0.3}')
    assert "no finite wmdp_bio.acc.all" in refusal(nan)


def test_another_target_model_has_a_table_of_its_own(tmp_path: Path, add: Any) -> None:
    """Folders of one name are one model only if their content is the same, which `digests.json` knows."""
    for number, digest in enumerate(("aaaa" * 16, "bbbb" * 16)):
        run = make(tmp_path / f"run{number}", 0.3, 0.5, questions=20 + number)
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"path": f"/home/{number}/mine"}}))
        (run / "digests.json").write_text(json.dumps({"model.path": digest}))
        assert add(run)[0] == 0
    for start in ("aaaa", "bbbb"):
        rows = rows_of(tmp_path / "board.md", f"WMDP Bio, mine {start * 3}")
        assert len(rows) == 2 and not rows[1][0].startswith("paper")


def test_the_page_of_the_documentation_is_written_from_its_entries() -> None:
    assert PAGE.read_text() == page_of(read_board(PAGE.with_suffix(".jsonl")))


def test_a_run_that_is_not_finished_is_no_entry(tmp_path: Path, add: Any) -> None:
    """Whatever ends it: a number of steps, passes over the data, or a level. Its last export is no final model."""
    for name, train in (("epochs", {"steps": None, "epochs": 2}), ("level", {"steps": 3, "stop_at": {"forget": {}}})):
        run = make(tmp_path / name, 0.3, 0.5)
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"train": train}))
        evaluation = json.loads((run / "evaluation.json").read_text())
        for model, status in (("exports/step-000003", 2), ("final", 0)):
            evaluation["trajectory"][-1]["model"] = str(run / model)
            (run / "evaluation.json").write_text(json.dumps(evaluation))
            found, said = add(run)
            assert found == status
            assert status == 0 or (f"{run / 'evaluation.json'} ends at {run / model}" in said and "--resume" in said)
