"""Attacks on the sets of a run's own configuration: what is learned again is in none of them, each number by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from eval import loading, robustness
from eval.attacks import training
from eval.evaluation import load_suites
from eval.files import read_jsonl, write_jsonl
from eval.results.metrics import flatten
from tests.conftest import World
from tests.eval.attacks.lamps import CHOICE, FORGET, RETAIN, Reader


def by_hand(folder: Path, asked: list[str]) -> dict[str, float]:
    """Every measure of the questions in `asked`, a row and a token at a time."""
    reader, found = Reader(folder), {}
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        measures = reader.measures(row for row in rows if row["q"] in asked)
        found |= {f"{name}.{measure}": value for measure, value in measures.items()}
    hits = []
    for row in CHOICE:
        if row["q"] in asked:
            sums = [sum(token.loss for token in reader.tokens(row["q"], option)) for option in row["c"]]
            hits.append(sums.index(min(sums)) == row["right"])
    return {**found, "choice.accuracy": sum(hits) / len(hits)}


def test_texts_are_the_greedy_tokens_of_a_plain_loop(run: Path, world: World, tmp_path: Path) -> None:
    """Questions, texts without questions, and choices; at most 20 of a set."""
    documents = [{"text": text} for text in world.documents("retain")[:25]]
    write_jsonl(tmp_path / "texts.jsonl", documents)
    config = (run / "config.yaml").read_text()
    named = f"  probes:\n    texts: {{path: {tmp_path / 'texts.jsonl'}}}\n"
    (run / "config.yaml").write_text(config.replace("  probes:\n", named))
    model, tokenizer = loading.load(run / "final")
    suite = load_suites(["probes"], None, {"probes": {"run": run / "config.yaml"}})[0]
    found = suite.module.evaluate(model, tokenizer, suite.probes, batch_size=4, title="")
    expected = by_hand(run / "final", [row["q"] for row in (*FORGET, *RETAIN)])
    scores = flatten(found["metrics"])
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    kept, reader = found["texts"], Reader(run / "final")

    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        assert kept[name] == [
            {"prompt": row["q"], "expected": row["a"], "teacher_forced": reader.greedy(row["q"], row["a"])}
            for row in rows
        ]
    for row, shown in zip(CHOICE, kept["choice"], strict=True):
        sums = [sum(token.loss for token in reader.tokens(row["q"], option)) for option in row["c"]]
        chosen = row["c"][sums.index(min(sums))]
        assert shown == {"prompt": row["q"], "expected": row["c"][row["right"]], "answer": chosen}
    assert len(kept["texts"]) == 20
    whole = {"".join(row["text"].split()) for row in documents}
    for shown in kept["texts"]:
        assert "".join((shown["prompt"] + shown["expected"]).split()) in whole


def test_sets_of_the_run_are_relearned_and_measured(run: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(line: list[str], log: Path) -> int:
        """Stands for the training: another model."""
        shutil.copytree(world.folder / "tied", log.with_suffix("") / "final")
        return 0

    monkeypatch.setattr(training, "call", learn)
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
