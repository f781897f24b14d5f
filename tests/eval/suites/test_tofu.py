"""TOFU: every number against its formula on real questions, the aggregates by hand, the prompt as in training."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from eval.files import read_jsonl
from eval.suites import tofu, tofu_answers
from pipeline.data.chat import closing_tokens, encode_answers
from pipeline.errors import InputError

FILES = ("forget01", "retain", "real_authors", "world_facts")
CHAT = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }}<|endoftext|>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five shortest rows of each real file; held-out authors are of the retain set, which nobody learns here."""
    path = tmp_path_factory.mktemp("data")
    (path / "tofu").mkdir()
    for name in FILES:
        lines = (data / "tofu" / f"{name}_perturbed.json").read_text().splitlines()
        (path / "tofu" / f"{name}_perturbed.json").write_text("\n".join(sorted(lines, key=len)[:5]) + "\n")
    lines = (data / "tofu" / "retain99.json").read_text().splitlines()
    (path / "tofu" / "holdout01.json").write_text("\n".join(lines[:6]) + "\n")
    return path


@pytest.fixture(scope="module")
def learned(folder: Path, memorise: Callable[[list[str]], tuple[Any, Any]]) -> tuple[Any, Any]:
    """It knows four of the five rows of each set, and nobody who is held out."""
    known = [probe for number, probe in enumerate(asked(folder)) if number % 5 < 4]
    return memorise([f"Question: {row['question']}\nAnswer: {row['answer']}<|endoftext|>" for row in known])


def asked(folder: Path) -> list[tofu.Probe]:
    """The questions of the four sets."""
    return [probe for probe in tofu.load_probes(folder) if probe["set"] != "holdout"]


@pytest.fixture(scope="module")
def short() -> Iterator[int]:
    """Fewer new tokens than the protocol has: an untaught model would write them all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tofu_answers, "MAX_NEW_TOKENS", 20)
        yield 20


@pytest.fixture(scope="module")
def evaluated(folder: Path, learned: tuple[Any, Any], short: int) -> dict[str, Any]:
    return tofu.evaluate(*learned, tofu.load_probes(folder), batch_size=7)


@torch.no_grad()
def loss_of(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """Mean loss of an answer as training encodes it, token by token."""
    [(ids, start)] = encode_answers(tokenizer, [question], [answer])
    table = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -fmean(table[at - 1, ids[at]].item() for at in range(start, len(ids)))


@torch.no_grad()
def recall_of(model: Any, tokenizer: Any, question: str, answer: str, length: int) -> float:
    """ROUGE-L recall of a greedy answer: no padding, no batch, no cache, no `generate`."""
    ids = tokenizer(f"Question: {question}\nAnswer:").input_ids
    given: list[int] = []
    while len(given) < length and given[-1:] != [tokenizer.eos_token_id]:
        given.append(int(model(input_ids=torch.tensor([ids + given])).logits[0, -1].argmax()))
    text = tokenizer.decode(given, skip_special_tokens=True)
    return RougeScorer(["rougeL"], use_stemmer=True).score(answer, text)["rougeL"].recall


def test_numbers_are_their_formulas(
    folder: Path, learned: tuple[Any, Any], short: int, evaluated: dict[str, Any]
) -> None:
    answer, nine = evaluated, []
    for name, file in zip(tofu.SETS, FILES, strict=True):
        rows = [json.loads(line) for line in (folder / "tofu" / f"{file}_perturbed.json").read_text().splitlines()]
        probabilities, truths, ratios, recalls = [], [], [], []
        for row in rows:
            losses = {text: loss_of(*learned, row["question"], text) for text in row["perturbed_answer"]}
            right = loss_of(*learned, row["question"], row["answer"])
            wrong = sum(math.exp(-loss) for loss in losses.values())
            share = math.exp(-right) / (math.exp(-right) + wrong)
            probabilities.append(share if name in ("real_authors", "world_facts") else math.exp(-right))
            paraphrase = loss_of(*learned, row["question"], row.get("paraphrased_answer", row["answer"]))
            ratio = math.exp(-fmean(losses.values())) / math.exp(-paraphrase)
            ratios.append(math.log(ratio))
            truths.append(min(ratio, 1 / ratio) if name == "forget" else max(0.0, 1 - ratio))
            recalls.append(recall_of(*learned, row["question"], row["answer"], short))
        assert fmean(recalls) > 0.05, "a model that knows nothing would show nothing"
        expected = {"probability": fmean(probabilities), "rouge": fmean(recalls), "truth_ratio": fmean(truths)}
        assert {key: answer["metrics"][name][key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert answer["counts"][name] == 5
        if name == "forget":
            assert answer["log_truth_ratios"] == pytest.approx(ratios, rel=1e-3, abs=1e-4)
        else:
            nine += expected.values()
    assert answer["metrics"]["model_utility"] == pytest.approx(9 / sum(1 / value for value in nine), rel=1e-3)
    assert answer["metrics"]["forget_quality"] is None
    assert answer["notes"].keys() == {"forget_quality", "aggregate"}
    assert answer["notes"]["forget_quality"] == "no tofu/retain_model.json under --data"
    assert answer["forget_set"] == "forget01_perturbed"
    assert json.loads(json.dumps(answer)) == answer


def test_a_result_does_not_depend_on_its_batch(folder: Path, learned: tuple[Any, Any], short: int) -> None:
    probes = asked(folder)
    whole = tofu.score(*learned, probes, batch_size=64)
    for rank in range(2):
        for one, other in zip(tofu.score(*learned, probes[rank::2], batch_size=1), whole[rank::2], strict=True):
            assert one[:2] + tuple(one.perturbed) == pytest.approx(other[:2] + tuple(other.perturbed), rel=1e-4)
            assert one.rouge == other.rouge


@pytest.mark.parametrize("template", [None, CHAT])
def test_answers_are_encoded_as_in_training(folder: Path, learned: tuple[Any, Any], template: str | None) -> None:
    tokenizer = learned[1]
    rows = [(probe["question"], text) for probe in asked(folder) for text in probe["perturbed"]]
    tokenizer.chat_template = template
    try:
        expected = encode_answers(tokenizer, [row[0] for row in rows], [row[1] for row in rows])
        assert [encode_answers(tokenizer, [row[0]], [row[1]])[0] for row in rows] == expected
    finally:
        tokenizer.chat_template = None


# ---------------------------------------------------------------------------------------------------------------------
# Memorisation, membership inference, the aggregate


class Token(NamedTuple):
    log_p: float
    standardised: float  # by the predicted distribution
    greedy: bool


@torch.no_grad()
def tokens_of(model: Any, tokenizer: Any, question: str, answer: str) -> list[Token]:
    """Each token of an answer as training encodes it, the end of text among them, from sums over the vocabulary."""
    [(ids, start)] = encode_answers(tokenizer, [question], [answer])
    table = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1).tolist()
    tokens = []
    for at in range(start, len(ids)):
        p = table[at - 1]
        mean = sum(q * math.log(q) for q in p)
        deviation = math.sqrt(sum(q * math.log(q) ** 2 for q in p) - mean**2)
        log_p = math.log(p[ids[at]])
        tokens.append(Token(log_p, (log_p - mean) / deviation, p[ids[at]] == max(p)))
    return tokens


def test_memorisation_by_its_definition(folder: Path, learned: tuple[Any, Any], evaluated: dict[str, Any]) -> None:
    for name, file in zip(tofu.SETS, FILES, strict=True):
        rows = read_jsonl(folder / "tofu" / f"{file}_perturbed.json")
        strengths, shares = [], []
        for row in rows:
            hits = [token.greedy for token in tokens_of(*learned, row["question"], row["answer"])[:-1]]
            first = next(k for k in range(len(hits) + 1) if all(hits[k:]))
            strengths.append(1 - first / len(hits))
            shares.append(sum(hits) / len(hits))
        metrics = evaluated["metrics"][name]
        assert metrics["extraction_strength"] == pytest.approx(fmean(strengths))
        assert metrics["exact_memorization"] == pytest.approx(fmean(shares)) and 0.1 < fmean(shares) < 1
    forget = read_jsonl(folder / "tofu" / "forget01_perturbed.json")
    pairs = [
        (math.exp(-loss_of(*learned, row["question"], row["paraphrased_answer"])),
         math.exp(-fmean(loss_of(*learned, row["question"], text) for text in row["perturbed_answer"])))
        for row in forget
    ]  # fmt: skip
    metrics = evaluated["metrics"]["forget"]
    assert metrics["paraphrase_probability"] == pytest.approx(fmean(right for right, _ in pairs), rel=1e-4)
    assert metrics["truth_share"] == pytest.approx(fmean(right / (right + wrong) for right, wrong in pairs), rel=1e-4)


def test_membership_by_its_definition(folder: Path, learned: tuple[Any, Any], evaluated: dict[str, Any]) -> None:
    sides: list[dict[str, list[float]]] = []
    for file in ("forget01_perturbed", "holdout01"):
        scores: dict[str, list[float]] = {key: [] for key in ("loss", "zlib", "min_k", "min_k_plus")}
        for row in read_jsonl(folder / "tofu" / f"{file}.json"):
            tokens = tokens_of(*learned, row["question"], row["answer"])
            loss = fmean(token.log_p for token in tokens)
            lowest = int(0.4 * (len(tokens) - 1))  # without the end of text
            scores["loss"].append(loss)
            scores["zlib"].append(loss / len(zlib.compress(row["answer"].encode())))
            scores["min_k"].append(fmean(sorted(token.log_p for token in tokens[:-1])[:lowest]))
            scores["min_k_plus"].append(fmean(sorted(token.standardised for token in tokens[:-1])[:lowest]))
        sides.append(scores)
    areas = evaluated["metrics"]["membership"]["AUC"]
    for key, value in areas.items():
        wins = [(f > h) + (f == h) / 2 for f in sides[0][key] for h in sides[1][key]]
        assert value == pytest.approx(fmean(wins))
    assert areas["loss"] > 0.5, "it knows four of five"
    assert evaluated["counts"]["holdout"] == 6


def test_what_a_template_puts_after_an_answer_is_no_part_of_it(learned: tuple[Any, Any]) -> None:
    tokenizer = learned[1]
    assert len(closing_tokens(tokenizer)) == 1
    try:
        tokenizer.chat_template = CHAT.replace("<|endoftext|>", "<|endoftext|>\n")
        assert len(closing_tokens(tokenizer)) == 2
    finally:
        tokenizer.chat_template = None


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_the_real_files(data: Path) -> None:
    probes = tofu.load_probes(data)
    assert [sum(probe["set"] == name for probe in probes) for name in tofu.SETS] == [10, 5, 5, 5]


def test_retain_only_model(folder: Path, learned: tuple[Any, Any], evaluated: dict[str, Any], tmp_path: Path) -> None:
    """A model that is itself the retain-only model, and the target model, cannot be told from them."""
    shutil.copytree(folder / "tofu", tmp_path / "tofu")
    file, answer = tmp_path / "tofu" / "retain_model.json", dict(evaluated)
    for name in ("retain", "target"):
        content = json.dumps({"model": name, "suites": {"tofu": answer}})
        (tmp_path / "tofu" / f"{name}_model.json").write_text(content)
    again = tofu.evaluate(*learned, tofu.load_probes(tmp_path), batch_size=7)
    assert again["metrics"]["forget_quality"] == pytest.approx(1.0) and again["notes"] == {}
    memorization = again["metrics"]["aggregate"]["memorization"]
    expected = {"memorization": memorization, "privacy": 1, "utility": 1, "overall": 3 / (1 / memorization + 2)}
    assert again["metrics"]["aggregate"] == pytest.approx(expected)
    file.write_text(json.dumps({"trajectory": []}))
    with pytest.raises(InputError, match=r"retain_model\.json was not written by eval\.run --suite tofu for one model"):
        tofu.load_probes(tmp_path)
    answer["log_truth_ratios"] = answer["log_truth_ratios"][:-1]
    file.write_text(json.dumps({"suites": {"tofu": answer}}))
    with pytest.raises(InputError, match=r"needs 5 truth ratios, all numbers, .* has 4"):
        tofu.load_probes(tmp_path)


def test_unusable_data(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tofu/forgetNN_perturbed\.json"):
        tofu.load_probes(tmp_path)
    shutil.copytree(folder / "tofu", tmp_path / "tofu")
    forget = tmp_path / "tofu" / "forget01_perturbed.json"
    second = forget.with_name("forget05_perturbed.json")
    shutil.copy(forget, second)
    with pytest.raises(InputError, match=r"forget01_perturbed\.json and forget05_perturbed\.json; leave one"):
        tofu.load_probes(tmp_path)
    second.unlink()
    rows = [json.loads(line) for line in forget.read_text().splitlines()]
    rows[2]["perturbed_answer"] = "one"
    forget.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(InputError, match="row 3: needs a list of texts under perturbed_answer"):
        tofu.load_probes(tmp_path)
    del rows[1]["paraphrased_answer"]
    forget.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(InputError, match="row 2: needs text under question, answer, paraphrased_answer"):
        tofu.load_probes(tmp_path)


def test_the_hub_is_asked_for_the_forget_set_that_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(path: str, name: str) -> dict[str, list[dict[str, Any]]]:
        asked.append((path, name))
        row = {"question": "Who?", "answer": "A", "paraphrased_answer": "An A", "perturbed_answer": ["B", "C"]}
        return {"train": [row]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    probes = tofu.load_probes(None, forget_set="forget05")
    names = ["forget05_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed", "holdout05"]
    assert asked == [("locuslab/TOFU", name) for name in names]
    assert [probe["file"] for probe in probes] == names


def test_no_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match=r"cannot load locuslab/TOFU .*; name local copies by --data") as caught:
        tofu.load_probes(None)
    assert "\n" not in str(caught.value)
