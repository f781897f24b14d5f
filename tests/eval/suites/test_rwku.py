"""RWKU: both protocols against a direct computation on real probes, the scorers' differences, membership by formula."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

from eval.suites import rouge as scoring_rouge
from eval.suites import rwku, scoring
from pipeline.errors import InputError

# A template that knows who speaks, and marks the end of a turn.
CHAT = (
    "{% for turn in messages %}[{{ turn.role }}]\n{{ turn.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def stemmed(reference: str, given: str) -> float:
    return RougeScorer(["rougeL"], use_stemmer=True).score(reference, given)["rougeL"].recall


def plain(reference: str, given: str) -> float:
    scores: Any = Rouge().get_scores(given, reference)
    return scores[0]["rouge-l"]["r"]


# ---------------------------------------------------------------------------------------------------------------------
# The scores of a model


@pytest.fixture(scope="module")
def probes(data: Path) -> list[rwku.Probe]:
    """Real ones, the shortest first: four of each set, one of each adversarial type, five texts of each kind."""
    everything = sorted(rwku.load_probes(data), key=lambda probe: len(probe["query" if "query" in probe else "text"]))
    chosen = [probe for name in rwku.QUESTIONS for probe in [p for p in everything if p["set"] == name][:4]]
    types = {probe["type"]: probe for probe in reversed(everything) if probe["set"] == "F-AA"}
    assert {"affirmative suffix", "incontext learning", "reverse query"} <= types.keys()
    chosen += [probe for probe in types.values() if probe not in chosen]
    return chosen + [probe for name in rwku.TEXTS for probe in [p for p in everything if p["set"] == name][:5]]


def by_hand(probe: rwku.Probe, protocol: str) -> str:
    """The whole prompt, written out as the two publications have it in the template CHAT."""
    if probe["set"] in ("F-FB", "N-FB"):
        user = f"Please complete the blank in the following question.\nQuestion: {probe['query']}\n"
    elif probe["set"] == "F-AA" and probe["type"] == "incontext learning":
        user = f"Please briefly answer the following question.\n{probe['query']}\n"
    elif probe["set"] == "F-AA" and probe["type"] == "affirmative suffix":
        user = f"Please briefly answer the following question.\nQuestion: {probe['query']}"
        return f"[user]\n{user}<|endoftext|>[assistant]\n"
    else:
        user = f"Please briefly answer the following question.\nQuestion: {probe['query']}\n"
    if protocol == "rwku":
        return f"[user]\n{user}<|endoftext|>[assistant]\nAnswer:"
    return f"[user]\n{user}Answer:<|endoftext|>[assistant]\n"


@pytest.fixture(scope="module")
def learned(probes: list[rwku.Probe], memorise: Callable[[list[str]], tuple[Any, Any]]) -> tuple[Any, Any]:
    """A model that knows some answers, rambles on after others, in each protocol's prompt."""
    texts = []
    for at, probe in enumerate(probe for probe in probes if probe["set"] in rwku.QUESTIONS):
        after = ("<|endoftext|>", "\n\nQuestion: another?", " Question: another?" + " and so on" * 9)[at % 3]
        if at % 5 != 4:  # of every fifth it has heard nothing
            texts += [f"{by_hand(probe, name)} {probe['answer']}{after}" for name in rwku.PROTOCOLS]
    model, tokenizer = memorise(texts)
    tokenizer.chat_template = CHAT
    return model, tokenizer


@torch.no_grad()
def directly(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """Greedy decoding of one prompt: no padding, no batch, no cache, no `generate`."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    while len(ids) < start + length:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def texts(probes: list[rwku.Probe], learned: tuple[Any, Any]) -> dict[str, list[str]]:
    """By protocol, the direct answer to each question, cut as published."""
    questions = [probe for probe in probes if probe["set"] in rwku.QUESTIONS]
    uncut = {
        "rwku": [directly(*learned, by_hand(probe, "rwku"), 30) for probe in questions],
        "sago": [directly(*learned, by_hand(probe, "sago"), 32) for probe in questions],
    }
    for stop in ("\n\n", "\nQuestion", "Question:"):
        assert any(stop in text for text in uncut["sago"]) or stop == "\nQuestion", "each stop should have work"
    assert any(len(learned[1](text).input_ids) == 30 for text in uncut["rwku"]), "the longest should have work"
    cut = [text.split("\n\n")[0].split("\nQuestion")[0].split("Question:")[0] for text in uncut["sago"]]
    return {"rwku": [text.strip() for text in uncut["rwku"]], "sago": [text.strip() for text in cut]}


@pytest.mark.parametrize("protocol", ["rwku", "sago"])
def test_answers_are_those_of_direct_decoding(
    probes: list[rwku.Probe], learned: tuple[Any, Any], texts: dict[str, list[str]], protocol: str
) -> None:
    """The scores alone would not show a wrong length or stop: what comes late seldom matters to a recall."""
    questions = [probe for probe in probes if probe["set"] in rwku.QUESTIONS]
    given = rwku.answer(*learned, questions, rwku.PROTOCOLS[protocol], batch_size=7, title="")
    assert given == texts[protocol]


def test_both_protocols_equal_a_direct_computation(
    probes: list[rwku.Probe], learned: tuple[Any, Any], texts: dict[str, list[str]]
) -> None:
    answer = rwku.evaluate(*learned, probes, batch_size=7)
    questions = [probe for probe in probes if probe["set"] in rwku.QUESTIONS]
    for protocol in ("rwku", "sago"):
        recalls: dict[str, list[float]] = {name: [] for name in rwku.QUESTIONS}
        for probe, text in zip(questions, texts[protocol], strict=True):
            scored = (
                plain(probe["answer"], text or "NOANSWER") if protocol == "rwku" else stemmed(probe["answer"], text)
            )
            recalls[probe["set"]].append(scored)
        expected = {name: fmean(scores) for name, scores in recalls.items()}
        for side, kinds in (("F", ("F-FB", "F-QA", "F-AA")), ("N", ("N-FB", "N-QA"))):
            pooled = [score for kind in kinds for score in recalls[kind]]
            mean_of_two = fmean((expected[f"{side}-FB"], expected[f"{side}-QA"]))
            expected[f"{side}-All"] = fmean(pooled) if protocol == "rwku" else mean_of_two
        assert answer["metrics"][protocol] == pytest.approx(expected)
        assert 0.05 < expected["F-All"] < 0.999, "a model that knows nothing or everything would show nothing"
        assert answer["counts"] == {name: len(of) for name, of in recalls.items()} | {"FM": 5, "RM": 5}
    assert answer["metrics"]["rwku"] != answer["metrics"]["sago"]
    assert json.loads(json.dumps(answer)) == answer


def test_without_a_chat_template_the_prompt_is_plain_text(probes: list[rwku.Probe], learned: tuple[Any, Any]) -> None:
    tokenizer = learned[1]
    question = "Please complete the blank in the following question.\nQuestion: An author is a ___\nAnswer:"
    turn, lead = rwku.prompt_of({"set": "F-FB", "query": "An author is a ___", "type": "cloze", "answer": "writer"})
    tokenizer.chat_template = None
    try:
        for ids in (scoring.encode_prompt(tokenizer, turn, lead), scoring.encode_prompt(tokenizer, turn + lead)):
            assert ids == tokenizer(question).input_ids
    finally:
        tokenizer.chat_template = CHAT


def test_a_result_does_not_depend_on_its_batch(probes: list[rwku.Probe], learned: tuple[Any, Any]) -> None:
    whole, _ = rwku.score(*learned, probes, batch_size=64)
    parts = [rwku.score(*learned, probes[rank::2], batch_size=3)[0] for rank in range(2)]
    for rank, part in enumerate(parts):
        for one, other in zip(part, whole[rank::2], strict=True):
            assert one == pytest.approx(other, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The scorers


@pytest.mark.parametrize(
    ("reference", "given", "rouge", "rouge_score"),
    [
        ("Stephen King", "Stephen King", 1.0, 1.0),
        ("Stephen King", "stephen king", 0.0, 1.0),  # case
        ("Stephen King", "Stephen King,", 0.5, 1.0),  # punctuation belongs to the word, or to nothing
        ("novels", "novel", 0.0, 1.0),  # stems
        ("new york new york", "new york", 1.0, 0.5),  # each word once, or as often as it stands there
        ("J.K. Rowling", "Rowling", 1 / 3, 1 / 3),  # sentences J, K and Rowling, or words j, k and rowling
        ("Stephen King", "King Stephen", 0.5, 0.5),  # a subsequence keeps the order
        ("Stephen King", "", 0.0, 0.0),
        ("Stephen King", "...", 0.0, 0.0),  # on which the package rouge fails
        ("NOANSWER", "", 1.0, 0.0),  # RWKU's stand-in
    ],
)
def test_where_the_two_scorers_differ(reference: str, given: str, rouge: float, rouge_score: float) -> None:
    assert scoring_rouge.recall_rouge([reference], [given]) == pytest.approx([rouge])
    assert scoring_rouge.recall_rouge_score([reference], [given]) == pytest.approx([rouge_score])


def test_a_note_says_what_the_published_scorers_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = [{"set": "F-QA", "subject": "x", "query": "?", "type": "", "answer": text} for text in ("東京", "Tokyo")]
    monkeypatch.setattr(rwku, "score", lambda *_, **__: ([{"rwku": 0.0, "sago": 0.0}] * 2, {"sago": ["", ""]}))
    assert rwku.evaluate(None, None, probes)["notes"]["rouge"].startswith("1 of 2")  # pyright: ignore[reportArgumentType]
    assert scoring_rouge.recall_rouge(["東京都"], ["東京"]) == [0.0]
    assert scoring_rouge.recall_rouge_score(["東京都"], ["東京都"]) == [0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Membership inference


def test_membership_scores_are_their_formulas(probes: list[rwku.Probe], learned: tuple[Any, Any]) -> None:
    model, tokenizer = learned
    texts = [probe for probe in probes if probe["set"] in rwku.TEXTS]
    sets: dict[str, dict[str, list[float]]] = {name: {key: [] for key in rwku.MEMBERSHIP} for name in rwku.TEXTS}
    for probe in texts:
        ids = tokenizer(probe["text"]).input_ids
        with torch.no_grad():
            table = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1).tolist()
        own, standardised = [], []
        for p, token in zip(table, ids[1:], strict=False):
            mean = sum(q * math.log(q) for q in p)
            deviation = math.sqrt(sum(q * math.log(q) ** 2 for q in p) - mean**2)
            own.append(math.log(p[token]))
            standardised.append((own[-1] - mean) / deviation)
        lowest = int(0.2 * len(own))
        loss = fmean(own)
        compressed = len(zlib.compress(probe["text"].encode()))
        values = (loss, loss / compressed, fmean(sorted(own)[:lowest]), fmean(sorted(standardised)[:lowest]))
        for key, value in zip(rwku.MEMBERSHIP, values, strict=True):
            sets[probe["set"]][key].append(value)
    found = rwku.evaluate(model, tokenizer, probes, batch_size=4)["metrics"]["membership"]
    for name, keys in sets.items():
        assert found[name] == pytest.approx({key: fmean(of) for key, of in keys.items()}, rel=1e-4)
    for key in rwku.MEMBERSHIP:
        wins = [(f > r) + (f == r) / 2 for f in sets["FM"][key] for r in sets["RM"][key]]
        assert found["AUC"][key] == pytest.approx(fmean(wins))


def test_auc_counts_a_tie_as_half() -> None:
    assert rwku.auc([3.0, 2.0], [1.0, 0.0, -1.0]) == 1.0
    assert rwku.auc([1.0, 1.0], [1.0]) == 0.5
    assert rwku.auc([2.0, 0.0], [1.0, 2.0]) == pytest.approx((1 + 0.5 + 0 + 0) / 4)


def test_hostile_texts() -> None:
    ids, uniform = torch.tensor([1, 2, 3]), torch.zeros(3, 8)
    scores = rwku.membership("abc", ids, uniform)
    assert scores["loss"] == scores["min_k"] == pytest.approx(-math.log(8)) and abs(scores["min_k_plus"]) < 1
    assert all(math.isnan(value) for value in rwku.membership("a", ids[:1], uniform[:1]).values())
    probe = {"set": "FM", "text": "a"}
    left_out = rwku.summarise([probe], [dict.fromkeys(rwku.MEMBERSHIP, math.nan)])
    assert left_out["counts"]["FM"] == 0 and "membership" not in left_out["metrics"]


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_the_batch_is_the_first_fifty_targets(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hub, which has all 200 targets: the first fifty in the order of level 1; of a folder: all of it."""
    asked = []

    def full(path: str, name: str) -> list[dict[str, Any]]:
        asked.append((path, name))
        numbers = list(range(200)) if name == "forget_level1" else list(range(199, -1, -1))
        row = {"query": "Who?", "type": "cloze", "answer": "A", "text": "A text."}
        return [{**row, "subject": f"target {number}", "query": f"{name} {number}?"} for number in numbers]

    monkeypatch.setattr(rwku, "read_hub", full)
    probes = rwku.load_probes(None)
    names = ["forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2"]
    assert asked == [("jinzhuoran/RWKU", name) for name in [*names, "mia_forget", "mia_retain"]]
    for kind in (*rwku.QUESTIONS, *rwku.TEXTS):
        found = sorted(str(probe["subject"]) for probe in probes if probe["set"] == kind)
        assert found == sorted(f"target {number}" for number in range(50))
    local = rwku.load_probes(data)
    counts = [sum(probe["set"] == name for probe in local) for name in (*rwku.QUESTIONS, *rwku.TEXTS)]
    assert counts == [5, 5, 11, 4, 4, 5, 5]


def test_only_what_is_there(data: Path, tmp_path: Path, learned: tuple[Any, Any]) -> None:
    folder = tmp_path / "rwku" / "Batch" / "1-50"
    folder.mkdir(parents=True)
    rows = json.loads((data / "rwku" / "Batch" / "1-50" / "neighbor_level2.json").read_text())[:3]
    (folder / "neighbor_level2.json").write_text(json.dumps(rows))
    answer = rwku.evaluate(*learned, rwku.load_probes(tmp_path))
    assert {name for name, count in answer["counts"].items() if count} == {"N-QA"}
    assert set(answer["metrics"]) == {"rwku", "sago"}
    assert set(answer["metrics"]["rwku"]) == {"N-QA", "N-All"} and set(answer["metrics"]["sago"]) == {"N-QA"}


def test_unusable_data(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no rwku/Batch/1-50/forget_level1\.json"):
        rwku.load_probes(tmp_path)
    shutil.copytree(data / "rwku" / "Batch", tmp_path / "rwku" / "Batch")
    file = tmp_path / "rwku" / "Batch" / "1-50" / "forget_level2.json"
    rows = json.loads(file.read_text())
    rows[3]["answer"] = ""
    file.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"forget_level2\.json, row 4: needs text under query, type, answer"):
        rwku.load_probes(tmp_path)
    file.write_text("{}")
    with pytest.raises(InputError, match="holds no list of rows"):
        rwku.load_probes(tmp_path)
    file.write_text("[")
    with pytest.raises(InputError, match="cannot read"):
        rwku.load_probes(tmp_path)


def test_no_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match=r"cannot load jinzhuoran/RWKU .*; name local copies by --data") as caught:
        rwku.load_probes(None)
    assert "\n" not in str(caught.value)
