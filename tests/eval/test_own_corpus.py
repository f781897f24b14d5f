"""The README's own corpus, as typed; the corpora of a run as probes; a sweep that is checked before it starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eval import frontier
from eval.files import exit_status
from eval.suites import corpus, progress, sharing
from eval.sweep import runs as sweep_runs
from pipeline.config.schema import REPOSITORY
from tests.conftest import World
from tests.interrupted import Copied

MODEL = "HuggingFaceH4/zephyr-7b-beta"


def readme(language: str, first: str) -> str:
    (block,) = re.findall(rf"^```{language}\n({first}.*?)^```", (REPOSITORY / "README.md").read_text(), re.S | re.M)
    return block


@pytest.fixture(scope="module")
def typed(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder, and what training and evaluation printed: the README's file and commands, with a small model in it.

    Only the model and the numbers of steps and sequences differ.
    """
    folder = tmp_path_factory.mktemp("typed")
    smaller = {MODEL: str(world.folder / "model"), "steps: 100": "steps: 4", "export_every: 10": "export_every: 2"}
    text = readme("yaml", "# my.yaml")
    for big, small in smaller.items():
        assert big in text
        text = text.replace(big, small)
    (folder / "my.yaml").write_text(text.replace("batch_size: 32", "batch_size: 16") + "cache: cache\n")
    for task in ("forget", "retain"):
        (folder / f"{task}.txt").write_text("".join(f"{line}\n" for line in world.documents(task)))
    train, evaluate = (
        re.sub(r"\s+#.*", "", line)
        for line in readme("bash", r"\. .venv/bin/activate").splitlines()
        if line.startswith(("bash launch/train.sh", "python -m eval.run"))
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    printed = []
    for command in (train.replace("launch/", f"{REPOSITORY}/launch/"), evaluate):
        done = subprocess.run(command.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        printed.append(done.stdout + done.stderr)
    return folder, *printed


def test_the_readmes_example_runs_as_it_stands(typed: tuple[Path, str, str]) -> None:
    """Without a GPU: float32, the DeepSpeed file for a CPU, a document a sequence, a learning rate that fits."""
    folder, printed, _ = typed
    config = yaml.safe_load((folder / "runs" / "mine" / "config.yaml").read_text())
    assert config["model"]["dtype"] == "float32" and config["train"]["deepspeed"] == "ds_configs/cpu.json"
    assert config["data"]["packing"] == "documents" and 1e-4 < config["optimizer"]["lr"] < 1e-1
    assert "data.packing: documents, because the documents of data." in printed
    assert f"optimizer.lr: {config['optimizer']['lr']:g}, which suits a model of" in printed
    assert "in 31 sequences" in printed and "in 38 sequences" in printed  # 40 lines without 5 %, a document each
    assert "unlearned\n" in printed
    assert "[INFO]" not in printed and "[WARNING]" not in printed  # the launcher's own


def test_held_out_documents_are_scored_and_were_not_trained_on(typed: tuple[Path, str, str], world: World) -> None:
    folder, _, printed = typed
    run = folder / "runs" / "mine"
    heldout = [json.loads(line)["text"] for line in (run / "heldout.jsonl").read_text().splitlines()]
    assert len(heldout) == 2 and set(heldout) <= set(world.documents("retain"))
    answer = json.loads((run / "evaluation.json").read_text())
    assert [entry["step"] for entry in answer["trajectory"]] == [2, 4]
    for entry in answer["trajectory"]:
        found = entry["suites"]["corpus"]
        assert found["counts"]["forget"]["documents"] == 31 and found["counts"]["retain"]["documents"] == 2
        assert found["retain_seen"] == {"documents": 2, "seen": 0}
    rows = [line.split() for line in printed.splitlines()]
    assert any(row[:1] == ["step"] and "ROUGE-L" in row for row in rows)
    for entry in answer["trajectory"]:
        (row,) = (row for row in rows if row[:1] == [str(entry["step"])])
        scores = entry["suites"]["corpus"]["metrics"]
        names = (("forget", "probability"), ("forget", "rouge"), ("retain", "probability"), ("retain", "rouge"))
        shown = [float(cell) for cell in row[1:]]
        assert shown == pytest.approx([scores[split][kind] for split, kind in names], rel=0.051, abs=1e-9)
    assert "## Scores on corpus" in (run / "final" / "README.md").read_text()


def test_a_retain_corpus_that_training_saw_is_marked(
    typed: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = typed
    monkeypatch.chdir(folder)
    run = Path("runs/mine")
    ours = corpus.load_probes(None, run=run)
    assert corpus.load_probes(run) == ours
    (run / "heldout.jsonl").rename(run / "elsewhere")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert corpus.seen_in_training(corpus.load_probes(None, run=run), config) == {"documents": 38, "seen": 38}
    (run / "elsewhere").rename(run / "heldout.jsonl")


def test_a_run_that_learns_says_trained(world: World, tmp_path: Path) -> None:
    sections = {"objective": {"forget": "none", "retain": "nll"}, "train": {"steps": 1}}
    command = Copied(world.write(tmp_path / "run.yaml", tmp_path / "run", **sections), ranks=1)
    command.call.result(200)  # or it raises how the rank ended
    printed = command.log.read_text()
    assert "\ntrained\n" in f"\n{printed}" and "unlearned" not in printed


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps


def test_a_recipe_names_its_suites(tmp_path: Path) -> None:
    recipes = REPOSITORY / "launch" / "recipes"
    assert sweep_runs.recipe_suites(recipes / "wmdp_cyber.yaml") == ["wmdp_cyber", "mmlu"]
    assert sweep_runs.recipe_suites(recipes / "rwku_batch50.yaml") == ["rwku"]
    own = tmp_path / "my.yaml"
    own.write_text(readme("yaml", "# my.yaml"))
    assert sweep_runs.recipe_suites(own) == ["corpus"]


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({}, ["--", "--train.stepss", "3"], "train.stepss"),
        ({}, ["--sweep", "synthesis.gama=1,2"], "synthesis.gama"),
        ({}, ["--sweep", "train.batch_size=12,13"], "batch_size 13"),
        ({"train": {"deepspeed": "nowhere.json"}}, [], "nowhere.json"),
        ({"data": {"forget": {"path": "broken.jsonl"}}}, [], "broken.jsonl, line 2"),
        ({}, ["--suite", "bios", "--data", "nowhere"], "nowhere"),
    ],
)
def test_a_sweep_is_refused_before_it_starts_anything(
    changed: dict[str, dict[str, object]],
    arguments: list[str],
    message: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    keys = world.configuration(tmp_path / "run")
    for section, values in changed.items():
        keys[section] = {**keys[section], **values}
    Path("recipe.yaml").write_text(yaml.safe_dump({**keys, "methods": {"mine": {}}, "suites": ["bios"]}))

    def started(*_: object) -> int:
        raise AssertionError("a command was started")

    monkeypatch.setattr(sweep_runs, "call", started)
    line = ["frontier", "--config", "recipe.yaml", "--methods", "mine", "--output", "out", *arguments]
    monkeypatch.setattr(sys, "argv", line)
    assert exit_status(frontier.main) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("out").exists()


def test_progress_is_shown_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line as soon as ten seconds have passed since the last, with what is left."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_last_line", [0.0])

    def work(batch: int) -> int:
        now[0] += 4.0
        return batch * batch

    assert sharing.share([1, 2, 3, 4, 5, 6, 7], work, "suite model") == [1, 4, 9, 16, 25, 36, 49]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "suite model: 3 of 7 batches, 0:00:16 left",
        "suite model: 6 of 7 batches, 0:00:04 left",
    ]
