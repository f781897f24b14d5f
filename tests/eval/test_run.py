"""The evaluation command on real model folders and on a run folder, and every way to refuse."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import bios, run
from eval.batch_size import rows_or_auto
from eval.evaluation import find_models
from eval.suites import biographies
from eval.suites import bios as bios_suite
from pipeline.errors import InputError
from tests.conftest import processor_seconds

REPOSITORY = Path(__file__).resolve().parents[2]
ANSWERS = {"red": "apple", "green": "pear", "blue": "plum"}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "eval.run", *map(str, arguments)]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command in this process, which has torch loaded already."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    run.main()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `blank` and `taught` (models before and after learning three answers) and `data/probes.jsonl`."""
    folder = tmp_path_factory.mktemp("world")
    probes = [
        {"split": split, "kind": "QA", "prompt": f"{colour} fruit:", "answer": fruit}
        for split, (colour, fruit) in zip(("forget", "retain", "retain"), ANSWERS.items(), strict=True)
    ]
    texts = [f"{probe['prompt']} {probe['answer']}\n" for probe in probes]
    (folder / "data").mkdir()
    (folder / "data" / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    tokenizer = bios.build_tokenizer(texts)
    model: Any = bios.build_model(tokenizer, seed=0)
    for name, steps in (("blank", 0), ("taught", 60)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(steps):
            ids = torch.tensor([tokenizer(texts[step % 3]).input_ids])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run_folder(world: Path, tmp_path: Path) -> Path:
    """A run of 10 steps: blank at step 2, taught at 9; step 10 was exported before it became `final`."""
    folder = tmp_path / "run"
    for name, source in (("step-000009", "taught"), ("step-000002", "blank"), ("step-000010", "blank")):
        shutil.copytree(world / source, folder / "exports" / name)
    shutil.copytree(world / "taught", folder / "final")
    (folder / "exports" / "step-000011").mkdir()  # a kill left it empty
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 11)))
    return folder


def test_one_model(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "new" / "answer.json"
    arguments = ("--model", world / "taught", "--suite", "bios", "bios", "--data", world / "data", "--output", output)
    evaluate(monkeypatch, *arguments)
    answer = json.loads(output.read_text())
    assert answer["suites"]["bios"]["metrics"] == {
        "forget": {"QA": 1.0, "all": 1.0},
        "retain": {"QA": 1.0, "all": 1.0},
    }
    assert answer["suites"]["bios"]["counts"] == {"forget": {"QA": 1}, "retain": {"QA": 2}}
    assert "ROUGE-L recall" in answer["suites"]["bios"]["protocol"]
    assert answer["versions"]["torch"] == torch.__version__
    assert set(answer["versions"]) == {"python", "torch", "transformers", "rouge_score"}
    assert answer["dtype"] == "float32" and answer["seconds"] > 0
    assert [path.name for path in output.parent.iterdir()] == ["answer.json"]  # no temporary file is left


def test_a_run_folder_gives_its_trajectory(world: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = run_folder / "evaluation.json"
    evaluate(monkeypatch, "--model", run_folder, "--suite", "bios", "--data", world / "data", "--output", output)
    trajectory = json.loads(output.read_text())["trajectory"]
    assert [(entry["step"], Path(entry["model"]).name) for entry in trajectory] == [
        (2, "step-000002"),
        (9, "step-000009"),
        (10, "final"),
    ]
    assert [entry["suites"]["bios"]["metrics"]["retain"]["all"] for entry in trajectory] == [0.0, 1.0, 1.0]


def test_the_table_and_the_card_begin_with_the_model_before(
    world: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it was evaluated; else one line says how, and following it brings the row."""
    sections = {"model": {"path": str(world / "taught")}, "objective": {"forget": "ga"}, "synthesis": {"rule": "sum"}}
    (run_folder / "config.yaml").write_text(json.dumps({**sections, "optimizer": {}, "seed": 0}))
    (run_folder / "final" / "README.md").write_text("tags: [unlearning]\n## How to use it\n")
    arguments = ["--suite", "bios", "--data", world / "data", "--output"]
    evaluate(monkeypatch, "--model", run_folder, *arguments, run_folder / "evaluation.json")
    printed = capsys.readouterr().out
    assert "before " not in printed.partition("wrote ")[0].partition("no evaluation")[0]
    (said,) = re.findall(r"`python -m eval.run (.*?)`", printed)
    evaluate(monkeypatch, *shlex.split(said))
    capsys.readouterr()
    evaluate(monkeypatch, "--model", run_folder, *arguments, run_folder / "evaluation.json")
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert rows[2:6] == [
        ["before", "1.000", "1.000"],
        ["2", "0.000", "0.000"],
        ["9", "1.000", "1.000"],
        ["10", "1.000", "1.000"],
    ]
    assert "python -m eval.run" not in printed
    card = (run_folder / "final" / "README.md").read_text()
    assert "| before | 1.000 | 1.000 |\n| 10 | 1.000 | 1.000 |" in card


def test_a_run_that_may_not_be_written_is_evaluated_all_the_same(
    world: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's model: its card and its TensorBoard log stay as they are, and the output has the scores."""
    (run_folder / "config.yaml").write_text("objective: {forget: none}\nmodel: {path: some-one/model}\n")
    (run_folder / "tensorboard").mkdir()
    (run_folder / "final" / "README.md").write_text("tags: [unlearning]\n## How to use it\n")

    def refuse(path: Path, *_: object) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("eval.reporting.card.write_whole", refuse)
    monkeypatch.setattr("eval.reporting.board.whole", refuse)
    output = run_folder.parent / "e.json"
    evaluate(monkeypatch, "--model", run_folder, "--suite", "bios", "--data", world / "data", "--output", output)
    assert len(json.loads(output.read_text())["trajectory"]) == 3
    captured = capsys.readouterr()
    notes = [line for line in captured.err.splitlines() if line.startswith("note: ")]
    assert captured.out.endswith(f"wrote {output}\n") and [note.split(" gets no")[0] for note in notes] == [
        f"note: the card of {run_folder / 'final'}",
        f"note: the TensorBoard log of {run_folder}",
    ]
    assert all("Permission denied" in note and str(output) in note for note in notes)


def test_a_batch_size_that_is_no_number_is_refused_in_plain_words() -> None:
    assert rows_or_auto("auto") == "auto" and rows_or_auto("8") == 8
    with pytest.raises(argparse.ArgumentTypeError, match="'x' is neither a number nor auto"):
        rows_or_auto("x")


def test_an_unfinished_run_is_evaluated_as_far_as_it_got(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "final")
    found = [(step, path.name) for step, path in find_models(run_folder)]
    assert found == [(2, "step-000002"), (9, "step-000009"), (10, "step-000010")]


def test_a_run_without_exports_on_the_way_has_its_final_model(run_folder: Path) -> None:
    """As a run that is measured by probes while it trains."""
    shutil.rmtree(run_folder / "exports")
    assert find_models(run_folder) == [(10, run_folder / "final")]


def test_without_data_the_probes_come_from_seed_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def recording(model: Any, tokenizer: Any, probes: Any, **options: Any) -> dict[str, Any]:
        asked.append(probes)
        return {"metrics": {}, "counts": {}, "protocol": ""}

    monkeypatch.setattr(bios_suite, "evaluate", recording)
    tokenizer = bios.build_tokenizer(["some text"])
    tokenizer.save_pretrained(tmp_path / "model")
    bios.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    evaluate(monkeypatch, "--model", tmp_path / "model", "--suite", "bios", "--output", tmp_path / "answer.json")
    assert asked == [biographies.generate(0).probes]


@pytest.mark.parametrize(
    ("changes", "culprit", "remedy"),
    [
        ({"--suite": "bois"}, "'bois'", "'bios'"),
        ({"--model": "nowhere"}, "nowhere", "name the folder of a model or of a run"),
        ({"--data": "nowhere"}, "nowhere", "python -m eval.bios"),
        ({"--batch-size": 0}, "--batch-size 0", "1 or more"),
        ({"--output": "."}, "--output .", "name a file"),
        ({"--forget-set": "forget05"}, "--forget-set", "belongs to suite tofu"),
    ],
)
def test_unusable_input(world: Path, tmp_path: Path, changes: dict[str, Any], culprit: str, remedy: str) -> None:
    arguments = {"--model": world / "blank", "--suite": "bios", "--output": tmp_path / "out.json", **changes}
    result = command(*(part for pair in arguments.items() for part in pair))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert culprit in result.stderr and remedy in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in place of a folder, and a folder that no process can write to; nothing is left of the attempt."""
    monkeypatch.setattr("eval.placement.load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("kept")
    arguments = ["--model", world / "blank", "--suite", "bios", "--data", world / "data"]
    for output in (tmp_path / "file" / "e.json", tmp_path / "file" / "new" / "e.json", Path("/proc/new/e.json")):
        with pytest.raises(InputError, match=rf"--output {output} cannot be written.*; name a file elsewhere"):
            evaluate(monkeypatch, *arguments, "--output", output)
    with pytest.raises(InputError, match="is neither a file nor a folder; name a file"):
        evaluate(monkeypatch, *arguments, "--output", "/dev/null")
    assert (tmp_path / "file").read_text() == "kept" and [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_what_was_evaluated_outlives_a_failure(world: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of three models cannot be loaded: the first two are in FILE.partial, and no report takes it for all."""
    weights = run_folder / "final" / "model.safetensors"
    whole, output = weights.read_bytes(), run_folder / "evaluation.json"
    weights.write_bytes(b"broken")
    arguments = ["--model", run_folder, "--suite", "bios", "--data", world / "data", "--output", output]
    with pytest.raises(InputError, match="final"):
        evaluate(monkeypatch, *arguments)
    assert not output.exists()
    partial = json.loads((run_folder / "evaluation.json.partial").read_text())["trajectory"]
    assert [entry["step"] for entry in partial if entry["suites"]] == [2, 9]
    weights.write_bytes(whole)
    evaluate(monkeypatch, *arguments)
    assert [entry["suites"] for entry in json.loads(output.read_text())["trajectory"]][:2] == [
        entry["suites"] for entry in partial[:2]
    ]
    assert not (run_folder / "evaluation.json.partial").exists()


def test_a_broken_model_leaves_a_file_that_every_program_reads(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has no NaN: jq and browsers refuse it. The table has a dash."""
    model: Any = AutoModelForCausalLM.from_pretrained(world / "taught")
    shutil.copytree(world / "taught", tmp_path / "broken")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    for split in ("forget", "retain"):
        (tmp_path / f"{split}.txt").write_text("red fruit: apple\n")
    output = tmp_path / "out.json"
    given = ("--suite", "corpus", "--data", tmp_path, "--output", output)
    evaluate(monkeypatch, "--model", tmp_path / "broken", *given)
    found = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["suites"]["corpus"]["metrics"]["forget"]["probability"] is None
    assert found["suites"]["corpus"]["metrics"]["forget"]["rouge"] == 0.0
    assert "retain ROUGE-L" in capsys.readouterr().out


def test_a_model_without_weights_is_named(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world / "blank", broken)
    (broken / "model.safetensors").unlink()
    result = command("--model", broken, "--suite", "bios", "--output", tmp_path / "out.json")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert str(broken) in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out.json").exists()


def test_a_run_without_exports_says_how_to_get_them(run_folder: Path) -> None:
    for name in ("exports", "final"):
        shutil.rmtree(run_folder / name)
    (run_folder / "exports").mkdir()
    result = command("--model", run_folder, "--suite", "bios", "--output", run_folder / "out.json")
    assert result.returncode == 2 and "train.export_every" in result.stderr


def test_help_is_quick() -> None:
    before = processor_seconds()
    result = command("--help")
    assert result.returncode == 0 and "bios" in result.stdout
    assert processor_seconds() - before < 2


def test_saved_models_differ(world: Path) -> None:
    """Guards the fixture: had nothing been learned, the trajectory test would prove nothing."""
    tokenizer = AutoTokenizer.from_pretrained(world / "blank")
    blank = AutoModelForCausalLM.from_pretrained(world / "blank")
    assert bios_suite.answer(blank, tokenizer, ["red fruit:"], batch_size=1, title="") != [ANSWERS["red"]]
