"""Attacks on the sets of a run's own configuration: what is learned again is in none of them, each number by hand."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import robustness
from eval.attacks import run as attack_run
from eval.files import read_jsonl, write_jsonl
from pipeline.config.load import resolve, to_yaml
from tests.conftest import World

QUESTIONS = [f"Where is lamp {n}?" for n in range(10)]
FORGET = [{"q": question, "a": f"kara loto mivi {n}"} for n, question in enumerate(QUESTIONS)]
RETAIN = [{"q": f"Who is {n}?", "a": f"nera suto {n}"} for n in range(6)]
CHOICE = [{"q": question, "c": ["kara", "lovi", "mito"], "right": n % 3} for n, question in enumerate(QUESTIONS)]


def by_hand(folder: Path, asked: list[str]) -> dict[str, float]:
    """Every measure of the questions in `asked`, a row and a token at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(question: str, answer: str) -> list[tuple[float, bool]]:
        """(loss, whether it is the greedy one) of each token of the answer."""
        head = tokenizer(f"Question: {question}\nAnswer: ").input_ids
        ids = [*tokenizer(f"Question: {question}\nAnswer: {answer}").input_ids, tokenizer.eos_token_id]
        start = next(n for n in range(len(ids)) if ids[: n + 1] != head[: n + 1])
        with torch.no_grad():
            table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return [(-table[n - 1, ids[n]].item(), int(table[n - 1].argmax()) == ids[n]) for n in range(start, len(ids))]

    found = {}
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        answers = [tokens(row["q"], row["a"]) for row in rows if row["q"] in asked]
        probabilities = [math.exp(-sum(loss for loss, _ in one) / len(one)) for one in answers]
        found[f"{name}.probability"] = sum(probabilities) / len(answers)
        found[f"{name}.exact_memorization"] = sum(sum(hit for _, hit in one) / len(one) for one in answers) / len(
            answers
        )
    hits = []
    for row in CHOICE:
        if row["q"] in asked:
            sums = [sum(loss for loss, _ in tokens(row["q"], option)) for option in row["c"]]
            hits.append(sums.index(min(sums)) == row["right"])
    return {**found, "choice.accuracy": sum(hits) / len(hits)}


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    """A finished run whose `final/` is a model that knows nothing, with a set of choices about what it forgot."""
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("choice", CHOICE)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    corpora = {name: {"path": str(tmp_path / f"{name}.jsonl"), "prompt": "q"} for name in ("forget", "retain")}
    data = {
        "max_length": 64,
        **{name: {**keys, "response": "a"} for name, keys in corpora.items()},
        "probes": {
            "choice": {"path": str(tmp_path / "choice.jsonl"), "prompt": "q", "choices": "c", "answer": "right"}
        },
    }
    file = world.write(tmp_path / "recipe.yaml", tmp_path / "run", data=data)
    shutil.copytree(world.folder / "model", tmp_path / "run" / "final")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(resolve(file)))
    return tmp_path / "run"


def test_sets_of_the_run_are_relearned_and_measured(run: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(line: list[str], log: Path) -> int:
        """Stands for the training: another model."""
        shutil.copytree(world.folder / "tied", log.with_suffix("") / "final")
        return 0

    monkeypatch.setattr(attack_run, "call", learn)
    monkeypatch.setattr(robustness, "end_on_terminate", lambda: None)
    monkeypatch.setattr(sys, "argv", ["robustness.py", "--run", str(run), "--suite", "probes", "--batch-size", "4"])
    assert robustness.exit_status(robustness.main) == 0
    answer = json.loads((run / "robustness.json").read_text())
    entries = {entry["name"]: entry for entry in answer["attacks"]}
    assert tuple(entries) == ("relearn", "retain", "int8", "int4", "nf4"), "the suite has no adversarial questions"

    (again,) = read_jsonl(run / "robustness" / "relearn.jsonl")  # a tenth
    assert again in FORGET and entries["relearn"]["excluded_probes"] == 2  # in two sets
    asked = [row["q"] for row in (*FORGET, *RETAIN) if row["q"] != again["q"]]
    for when, folder in (("before", "model"), ("after", "tied"), ("original", "model")):
        expected = by_hand(world.folder / folder, asked)
        assert {name: entries["relearn"][when][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    everything = by_hand(world.folder / "model", [row["q"] for row in (*FORGET, *RETAIN)])
    assert {name: entries["nf4"]["before"][name] for name in everything} == pytest.approx(everything, rel=1e-4)
    assert entries["nf4"]["settings"] == {"block": 64} and entries["nf4"]["after"] != entries["nf4"]["before"]


def test_a_forget_set_of_another_corpus_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (run / "config.yaml").read_text()
    other = run.parent / "other.jsonl"
    write_jsonl(other, [{**row, "q": f"In which room is lamp {n}?"} for n, row in enumerate(FORGET)])
    named = f"  probes:\n    forget: {{path: {other}, prompt: q, response: a}}\n"
    (run / "config.yaml").write_text(config.replace("  probes:\n", named))
    monkeypatch.setattr(sys, "argv", ["robustness.py", "--run", str(run), "--suite", "probes"])
    assert robustness.exit_status(robustness.main) == 2
    assert "10 of 10 probes of the forget set are about no row" in capsys.readouterr().err
