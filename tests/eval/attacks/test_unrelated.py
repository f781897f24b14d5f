"""Fine-tuning on texts that have nothing to do with either corpus."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval import robustness
from eval.attacks import training
from eval.files import read_jsonl
from pipeline.config.load import resolve
from tests.conftest import World
from tests.distributed import run_distributed
from tests.eval.attacks.lamps import FORGET, Reader
from tests.interrupted import run_in_process

TEXTS = [f"rain falls on hill {number}" for number in range(8)]


def attack(run: Path, call: Any, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """The exit status of the attack `unrelated`, whose training is `call`."""
    monkeypatch.setattr(training, "call", call)
    monkeypatch.setattr(robustness, "end_on_terminate", lambda: None)
    line = ["--run", run, "--suite", "probes", "--attacks", "unrelated", "--lr", 0.01, *options]
    monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, line)])
    return robustness.exit_status(robustness.main)


@pytest.fixture
def texts(run: Path) -> Path:
    file = run.parent / "wiki.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


@pytest.mark.parametrize("questions", [False, True])
def test_it_trains_on_the_texts_alone_and_measures_the_forget_corpus_on_the_way(
    questions: bool, run: Path, texts: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    if questions:
        texts = texts.with_suffix(".jsonl")
        texts.write_text("".join(json.dumps({"prompt": f"{text}?", "response": "yes"}) + "\n" for text in TEXTS))

    def learn(line: list[str], log: Path) -> int:
        config = resolve(Path(line[line.index("--config") + 1]))
        assert config.tasks == ["retain"] and config.data.retain is not None
        assert config.data.retain.path == str(texts)
        columns = (config.data.retain.field, config.data.retain.prompt, config.data.retain.response)
        assert columns == ((None, "prompt", "response") if questions else ("text", None, None))
        assert config.train.probe_every == 2 and config.optimizer.schedule == "constant"
        probed = config.data.probes["forget"]
        assert (read_jsonl(Path(probed.path)), probed.prompt, probed.response) == (FORGET, "q", "a")
        rows = [{"step": step, "probe/forget/probability": 0.1 * step, "probe/retain/loss": 2.0} for step in (0, 20)]
        shutil.copytree(world.folder / "tied", log.with_suffix("") / "final")
        (log.with_suffix("") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    assert attack(run, learn, monkeypatch, "--texts", texts, "--steps", 20) == 0
    (entry,) = json.loads((run / "robustness.json").read_text())["attacks"]
    assert entry["settings"]["texts"] == str(texts) and entry["documents"] == 8
    assert entry["curve"][1] == {"step": 20, "forget": {"probability": 2.0}, "relearned": {"loss": 2.0}}
    assert "choice.accuracy" in entry["before"] and entry["before"].keys() == entry["after"].keys()
    assert entry["original"] == entry["before"] != entry["after"], "the model that the training left is measured"
    assert attack(run, None, monkeypatch, "--texts", texts, "--steps", 20) == 0, "nothing is missing"


def test_without_texts_it_says_what_to_give(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert attack(run, None, monkeypatch) == 2
    assert "unrelated needs texts" in (error := capsys.readouterr().err) and "--texts" in error


@pytest.mark.slow
def test_a_curve_begins_and_ends_with_its_models(
    run: Path, texts: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn(line: list[str], log: Path) -> int:
        run_distributed(run_in_process, 1, line[line.index("pipeline.train") + 1 :])
        return 0

    assert attack(run, learn, monkeypatch, "--texts", texts, "--steps", 4, "--ranks", 1) == 0
    (entry,) = json.loads((run / "robustness.json").read_text())["attacks"]
    assert [row["step"] for row in entry["curve"]] == [0, 1, 2, 3, 4]
    for when, folder in ((0, world.folder / "model"), (-1, run / "robustness" / "unrelated" / "final")):
        assert entry["curve"][when]["forget"] == pytest.approx(Reader(folder).measures(FORGET), rel=1e-4)
    assert entry["curve"][-1]["relearned"]["loss"] < entry["curve"][0]["relearned"]["loss"] - 0.1
    config = yaml.safe_load((run / "robustness" / "unrelated.yaml").read_text())
    assert config["data"]["retain"]["path"] == str(texts)
