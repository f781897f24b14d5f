"""`launch/reproduce.sh`: a dry run of Table 1, with a tiny model in place of the paper's, on two ranks of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval import reproduce
from eval.files import exit_status
from eval.reporting.reproduction import table_of
from eval.results.paper import RECIPES, TABLE_1, presets_of
from pipeline.config.load import resolve
from pipeline.config.schema import REPOSITORY
from tests.conftest import World
from tests.eval.suites.questions import QUIZ, write_rows

ROWS = REPOSITORY / "tests" / "data"
PASSAGES = ROWS / "rwku" / "Batch" / "1-50"
ALL = [row for row in TABLE_1 if row != "target"]


def overrides(model: Path, folder: Path, forget: Path, retain: Path) -> list[str]:
    """Two steps on a tiny model."""
    settings = {
        "cache": folder / "cache",
        "model.path": model,
        "model.dtype": "float32",
        "data.max_length": 24,
        "data.forget.path": forget,
        "data.retain.path": retain,
        "train.steps": 2,
        "train.epochs": "null",
        "train.batch_size": 4,
        "train.micro_batch_size": 2,
        "train.deepspeed": "cpu",
    }
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in the environment of the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "launch/reproduce.sh", "table1", "--gpus", "2", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def rows_of(page: Path) -> list[list[str]]:
    """The cells of a page's first table, without its header."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith("| ---")][1:]


def scores_of(evaluation: Path, names: Sequence[str]) -> list[str]:
    """The scores by protocol `sago` of the last model in a file of eval.run, as a report prints them."""
    content = json.loads(evaluation.read_text())
    scores = content.get("trajectory", [content])[-1]["suites"]["rwku"]["metrics"]["sago"]
    return [f"{scores[name]:.2g}" if 0 < scores[name] < 0.01 else f"{scores[name]:.3f}" for name in names]


@pytest.mark.slow  # a minute of two idle cores
def test_a_row_is_trained_evaluated_and_put_above_the_papers(world: World, tmp_path: Path) -> None:
    """By the command of the documentation, with engines and suites as they are, on two questions of each kind."""
    data = tmp_path / "data" / "rwku" / "Batch" / "1-50"
    data.mkdir(parents=True)
    for file in PASSAGES.glob("*_level?.json"):
        (data / file.name).write_text(json.dumps(json.loads(file.read_text())[:2]))
    out, kinds = tmp_path / "out", ("F-FB", "F-QA", "F-All", "N-FB", "N-QA", "N-All")
    own = overrides(world.folder / "model", tmp_path, PASSAGES / "passage.json", PASSAGES / "retain_passage.json")
    chosen = ["--parts", "rwku", "--rows", "NPO+GD, SAGO", "--data", str(tmp_path / "data"), "--output", str(out)]
    done = start(*chosen, "--", *own)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = out / "rwku" / "runs" / "npo_sago" / "recipe" / "seed-0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["objective"]["forget"], config["synthesis"]["rule"], config["objective"]["beta"]) == (
        *("npo", "sago", 0.001),
    )
    lines = rows_of(out / "table1.md")
    at = next(number for number, line in enumerate(lines) if line[0] == "NPO+GD, SAGO")
    assert lines[at][1:] == scores_of(run / "evaluation.json", kinds)
    assert lines[at + 1] == ["paper's", "0.051", "0.057", "0.054", "0.361", "0.472", "0.417"]
    assert lines[0] == ["target", *scores_of(out / "rwku" / "target.json", kinds)]
    assert lines[1] == ["paper's", "0.752", "0.911", "0.832", "0.780", "0.921", "0.851"]
    # The paper has no RWKU for RMU; of the other rows nothing was measured.
    assert [line[0] for line in lines[::2]] == ["target", *(row for row in ALL if row != "RMU")]
    assert {cell for line in lines[2::2] if line[0] != "NPO+GD, SAGO" for cell in line[1:]} == {"–"}
    report = (out / "rwku" / "report" / "report.md").read_text()
    assert "npo+nll sago" in report and "paper, Table 1: NPO+GD, SAGO" in report


def make_zephyr(world: World, folder: Path) -> Path:
    """A tiny model of its architecture, with a block for RMU and two below it."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    shape = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=4096, **sizes)
    MistralForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow  # ten minutes each on two idle cores: 12 or 13 trainings and evaluations
@pytest.mark.parametrize("suite", RECIPES)
def test_every_row_is_made_and_a_second_start_makes_nothing(suite: str, world: World, tmp_path: Path) -> None:
    for name in ("wmdp_bio", "wmdp_cyber"):
        write_rows(tmp_path / "data" / "wmdp" / f"{name}.jsonl", QUIZ)
    for name in ("mmlu", "rwku"):
        (tmp_path / "data" / name).symlink_to(ROWS / name)
    out, rows = tmp_path / "out", [row for row in ALL if suite in TABLE_1[row]]
    chosen = ["--parts", suite, "--data", str(tmp_path / "data"), "--output", str(out)]
    if suite == "rwku":
        own = overrides(world.folder / "model", tmp_path, PASSAGES / "passage.json", PASSAGES / "retain_passage.json")
    else:
        corpora = world.folder / "forget.jsonl", world.folder / "retain.jsonl"
        own = [*overrides(make_zephyr(world, tmp_path / "zephyr"), tmp_path, *corpora), "--objective.layer", "2"]
    done = start(*chosen, "--", *own)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("training   ") == len(rows) == (12 if suite == "rwku" else 13)
    table = (out / "table1.md").read_text()
    lines = rows_of(out / "table1.md")
    assert [line[0] for line in lines] == [name for row in ("target", *rows) for name in (row, "paper's")]
    assert "–" not in {cell for line in lines for cell in line}, "a row was not measured"
    again = start(*chosen, "--", *own)
    assert again.returncode == 0 and "training   " not in again.stdout and "evaluating" not in again.stdout
    assert (out / "table1.md").read_text() == table


@pytest.mark.parametrize("suite", RECIPES)
def test_a_row_has_the_objectives_and_the_rule_that_its_name_says(suite: str) -> None:
    rules = {"": "sum", "PCGrad": "pcgrad", "SAGO": "sago"}
    rows = [row for row in ALL if suite in TABLE_1[row]]
    for row, preset in zip(rows, presets_of(suite, ALL), strict=True):
        config = resolve(RECIPES[suite], preset, reads_data=False)
        objectives, _, rule = row.partition(", ")
        forget, _, retain = objectives.partition("+")
        assert config.objective.forget == forget.lower(), row
        assert config.objective.retain == ("embed_diff" if row == "RMU" else "nll" if retain else "none"), row
        assert config.synthesis.rule == rules[rule], row
        assert config.synthesis.scope is None, "the rule's own in the paper"


def test_the_table_by_hand() -> None:
    """Two seeds of a row of Bio, one of another row of Cyber, whose MMLU is a column of its own."""
    bio = {"GA": [{"step": 9.0, "wmdp_bio.acc.all": x, "mmlu.acc.all": 0.5} for x in (0.2, 0.4)]}
    cyber = {"RMU": [{"step": 9.0, "wmdp_cyber.acc.all": 0.25, "mmlu.acc.all": 0.625}]}
    table = table_of({"wmdp_bio": bio, "wmdp_cyber": cyber})
    mmlu = "MMLU accuracy"
    assert table[0] == ["row", "WMDP Bio accuracy", f"{mmlu} (WMDP Bio)", "WMDP Cyber accuracy", f"{mmlu} (WMDP Cyber)"]
    assert table[1:5] == [
        ["target", "–", "–", "–", "–"],
        ["paper's", "0.644", "0.598", "0.444", "0.598"],
        ["GA", "0.300 ± 0.141", "0.500 ± 0.000", "–", "–"],
        ["paper's", "0.247", "0.247", "0.234", "0.266"],
    ]
    at = next(number for number, row in enumerate(table) if row[0] == "RMU")
    assert table[at : at + 2] == [["RMU", "–", "–", "0.250", "0.625"], ["paper's", "0.280", "0.501", "0.277", "0.578"]]


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command says on stderr; it runs nothing."""
    monkeypatch.setattr(reproduce, "run", lambda module: pytest.fail(f"runs {module}"))
    monkeypatch.setattr(reproduce, "end_on_terminate", lambda: None)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "table1", *arguments])
    assert exit_status(reproduce.main) == 2
    return capsys.readouterr().err


def test_what_cannot_be_made_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    message = refusal(capsys, monkeypatch, "--gpus", "2", "--rows", "NPO+GD, SAGA")
    assert "--rows 'NPO+GD, SAGA': the nearest is 'NPO+GD, SAGO'" in message
    assert "the nearest is 'rwku'" in refusal(capsys, monkeypatch, "--gpus", "2", "--parts", "rwk")
    assert "none of them for rwku" in refusal(capsys, monkeypatch, "--gpus", "2", "--rows", "RMU", "--parts", "rwku")
    message = refusal(capsys, monkeypatch, "--gpus", "2", "--", "--seed", "3")
    assert "--seed: seed is decided by this command" in message
    own = overrides(world.folder / "model", tmp_path, tmp_path / "no.json", world.folder / "retain.jsonl")
    message = refusal(capsys, monkeypatch, "--gpus", "2", "--parts", "rwku", "--data", str(ROWS), "--", *own)
    assert "no.json" in message
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "--gpus 2: this machine has 1; give fewer" in refusal(capsys, monkeypatch, "--gpus", "2")


def test_a_failed_run_leaves_the_other_parts_to_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Status 1 of the sweep: its report, the next part and the table are made all the same; status 2 ends it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    statuses, called = {"wmdp_bio": 1, "wmdp_cyber": 0}, []

    def pretend(module: Sequence[str]) -> int:
        part = next(name for name in RECIPES if f"/{name}" in " ".join(module).partition("--target")[0])
        called.append((module[0], part))
        return statuses[part] if module[0] == "eval.frontier" else 0

    monkeypatch.setattr(reproduce, "run", pretend)
    monkeypatch.setattr(reproduce, "check_runs", lambda plan: None)
    monkeypatch.setattr(reproduce, "end_on_terminate", lambda: None)
    line = ["reproduce.py", "table1", "--gpus", "2", "--output", str(tmp_path), "--parts", "wmdp_bio", "wmdp_cyber"]
    monkeypatch.setattr(sys, "argv", [*line, "--", "--train.steps", "2"])
    assert exit_status(reproduce.main) == 1
    assert called == [(f"eval.{what}", part) for part in statuses for what in ("run", "frontier")]
    statuses["wmdp_bio"] = 2
    assert exit_status(reproduce.main) == 2 and called[-1] == ("eval.frontier", "wmdp_bio")
