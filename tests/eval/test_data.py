"""--data for several suites: each takes its own files, and one that lacks them is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from eval import frontier
from eval.evaluation import load_suites
from eval.files import exit_status
from eval.suites import biographies
from eval.sweep import runs as sweep_runs
from pipeline.errors import InputError
from tests.conftest import World

QUESTION = {"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 2}
TASK = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: ROWS}}\ntest_split: test\n"
TASK += "doc_to_text: '{{question}}'\ndoc_to_target: a\noutput_type: multiple_choice\ndoc_to_choice: [a, b]\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the data of suite tofu alone."""
    row = {"question": "q", "answer": "a", "paraphrased_answer": "p", "perturbed_answer": ["w"]}
    (tmp_path / "data" / "tofu").mkdir(parents=True)
    (tmp_path / "data" / "tofu" / "forget10_perturbed.json").write_text(json.dumps(row) + "\n")
    return tmp_path / "data"


def test_a_suite_that_lacks_its_data_is_named_with_what_to_put_there(data: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_suites(["tofu", "rwku", "muse_news"], data, {})
    message = str(caught.value)
    assert f"suite rwku: {data} has no rwku/Batch/1-50/forget_level1.json or its like; copy them there" in message
    assert f"suite muse_news: {data} has no muse_news/knowmem_forget_qa.json" in message
    assert "suite tofu" not in message and "leave rwku muse_news out of --suite; of tofu the data are there" in message


def test_a_suite_that_needs_no_data_is_not_refused(
    data: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bios` writes its persons itself; `corpus` has those of the run that is evaluated."""
    (tmp_path / "run").mkdir()
    world.write(tmp_path / "run" / "config.yaml", tmp_path / "run")
    loaded = load_suites(["bios", "tofu", "corpus"], data, {"corpus": {"run": tmp_path / "run"}})
    assert [suite.name for suite in loaded] == ["bios", "tofu", "corpus"]
    assert loaded[0].probes == biographies.generate(0).probes and len(loaded[1].probes) == 1
    texts = {probe["text"] for probe in loaded[2].probes if probe["split"] == "forget"}
    assert texts and texts <= set(world.documents("forget"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" takes data of its own")[0] for line in lines] == ["suite bios", "suite corpus"]


def test_a_folder_that_no_suite_takes_is_refused(data: Path, tmp_path: Path) -> None:
    """As a path with a typing mistake: `lm_eval` reads nothing of it, so that does not count."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "mine.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    options = {"lm_eval": {"tasks": ["mine"], "tasks_dir": tmp_path}, "corpus": {"run": tmp_path}}
    with pytest.raises(InputError, match=r"^suite bios: no bios/probes.jsonl .*; suite corpus: \S+ has no forget.txt"):
        load_suites(["lm_eval", "bios", "corpus"], data, options)


def test_a_part_of_the_data_is_no_reason_to_take_others(data: Path, tmp_path: Path) -> None:
    (data / "forget.txt").write_text("one line\n")
    with pytest.raises(InputError, match=r"has no retain.txt"):
        load_suites(["tofu", "corpus"], data, {"corpus": {"run": tmp_path}})


def test_a_sweep_takes_the_corpora_of_its_runs(
    data: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no run yet when a sweep checks what its runs need."""
    recipe = {**world.configuration(tmp_path / "run"), "methods": {"mine": {}}, "suites": ["tofu", "corpus"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def started(line: list[str], log: Path) -> int:
        log.parent.mkdir(parents=True)
        Path(f"{log}.err").touch()
        return 1

    monkeypatch.setattr(sweep_runs, "call", started)
    line = ["--config", tmp_path / "recipe.yaml", "--methods", "mine", "--output", tmp_path / "out", "--data", data]
    monkeypatch.setattr(sys, "argv", ["frontier", *map(str, line), "--seeds", "0", "--level", "0.1"])
    assert exit_status(frontier.main) == 1, "the run was started"
    assert "suite corpus takes data of its own" in capsys.readouterr().err
