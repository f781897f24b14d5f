"""WMDP in two parts: V is asked, T is learned again, and no text of T answers a question of V."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import loading, robustness
from eval.attacks import run as attack_run
from eval.attacks import spec
from eval.files import read_jsonl
from eval.results.metrics import choose
from eval.suites import wmdp_split
from pipeline.errors import InputError
from tests.conftest import World
from tests.eval.attacks.test_relearn import plan_of
from tests.eval.suites.questions import QUIZ, by_hand, write_rows

STATED = {**QUIZ[0], "sentences": ["Apples are red.", "A red fruit is the apple."]}
LEARNED = ["Apples are red.", "A red fruit is the apple.", "Which of these is green?\nAnswer: a pear"]
T, V = [STATED, QUIZ[1]], QUIZ[2:]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Both parts in the form of WMDP's questions, of which they hold none."""
    for part, rows in (("T", T), ("V", V)):
        for domain in ("bio", "cyber"):
            write_rows(tmp_path / "data" / "wmdp" / f"wmdp_{domain}_{part}.jsonl", rows)
    return tmp_path / "data"


@pytest.mark.parametrize(("suite", "subject"), [("wmdp_bio_low_mi", "biology"), ("wmdp_cyber_low_mi", "cybersecurity")])
def test_questions_of_v_are_scored_as_by_hand(suite: str, subject: str, data: Path, world: World) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    answer = wmdp_split.evaluate(model, tokenizer, wmdp_split.load_probes(data, suite))
    chosen = by_hand(model, tokenizer, subject, [], V)
    right = sum(c == row["answer"] for c, row in zip(chosen, V, strict=True))
    assert answer["metrics"]["acc"] == {"all": right / len(V)} and answer["counts"]["questions"] == {"all": 5}
    assert "_V.jsonl" in answer["protocol"] and choose([suite, "mmlu"]).forget == f"{suite}.acc.all"


def test_what_is_learned_again_is_t_and_what_is_asked_is_v(data: Path, tmp_path: Path) -> None:
    """Whatever the forget corpus of the run: here it holds a question of V, which nobody trains on."""
    files = {"forget.jsonl": [{"text": V[0]["question"]}, {"text": "another"}]}
    for part, rows in (("T", T), ("V", V)):
        files[f"wmdp/wmdp_bio_{part}.jsonl"] = rows
    plan = plan_of(tmp_path, "wmdp_bio_low_mi", files, {"path": str(tmp_path / "forget.jsonl"), "field": "text"})
    assert attack_run.unavailable_reason(plan, "relearn") is None
    (attack,) = attack_run.attacks_of(plan, ["relearn"])
    assert [row["text"] for row in attack.rows] == LEARNED and attack.selection == {"documents": 3}
    assert attack.corpus == {"path": str(tmp_path / "relearn.jsonl"), "field": "text"}
    assert wmdp_split.question_texts(attack.evaluation.probes) == [row["question"] for row in V]


def test_without_a_folder_the_hub_has_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretend(path: str, name: str, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return T if path.endswith("_T") else V

    monkeypatch.setattr(wmdp_split, "read_hub", pretend)
    probes = wmdp_split.load_probes(None, "wmdp_cyber_low_mi")
    assert asked == [(f"filypo/wmdp_cyber_{part}", "default", "train") for part in "TV"]
    assert wmdp_split.texts_to_relearn(probes) == LEARNED and "filypo/wmdp_cyber_V" in probes.source


def test_what_would_not_be_a_split_is_refused(data: Path) -> None:
    file = data / "wmdp" / "wmdp_bio_T.jsonl"
    write_rows(file, [*T, {**V[0], "question": "WHICH of these is  blue?"}])
    with pytest.raises(InputError, match=r"wmdp_bio_T.jsonl, line 3: .*wmdp_bio_V.jsonl has this question too"):
        wmdp_split.load_probes(data)
    write_rows(file, [{**STATED, "sentences": "Apples are red."}])
    with pytest.raises(InputError, match="line 1: sentences must be a list of texts"):
        wmdp_split.load_probes(data)
    write_rows(file, [])
    with pytest.raises(InputError, match=r"wmdp_bio_T.jsonl holds no question"):
        wmdp_split.load_probes(data)
    file.unlink()
    with pytest.raises(InputError, match=r"there is no .*wmdp_bio_T.jsonl; --data needs it"):
        wmdp_split.load_probes(data)


@pytest.mark.slow  # a training on an engine
def test_the_command_learns_t_and_asks_v(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--run", run, "--suite", "wmdp_bio_low_mi", "--attacks", "relearn", "--data", data, "--steps", 2]
    line += ["--ranks", 1, "--", "--train.batch_size", 2, "--train.micro_batch_size", 1]
    monkeypatch.setattr(robustness, "end_on_terminate", lambda: None)
    monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, line)])
    robustness.main()
    (attack,) = json.loads((run / "robustness.json").read_text())["attacks"]
    model, tokenizer = loading.load(run / "robustness" / "relearn" / "final")
    chosen = by_hand(model, tokenizer, "biology", [], V)
    right = sum(c == row["answer"] for c, row in zip(chosen, V, strict=True))
    assert attack["after"]["acc.all"] == right / len(V) and set(attack["before"]) == set(attack["after"])
    assert [row["text"] for row in read_jsonl(run / "robustness" / "relearn.jsonl")] == LEARNED
    assert attack["settings"]["from"] == "the suite" and spec.FRACTION not in attack["settings"].values()
