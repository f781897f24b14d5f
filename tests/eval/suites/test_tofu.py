"""TOFU: every number against its formula on real questions, the aggregates by hand, the prompt as in training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from eval.suites import rouge as scoring
from eval.suites import tofu
from pipeline.data.chat import encode_answers
from pipeline.errors import InputError

FILES = ("forget01", "retain", "real_authors", "world_facts")
CHAT = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }}<|endoftext|>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five shortest rows of each real file."""
    path = tmp_path_factory.mktemp("data")
    (path / "tofu").mkdir()
    for name in FILES:
        lines = (data / "tofu" / f"{name}_perturbed.json").read_text().splitlines()
        (path / "tofu" / f"{name}_perturbed.json").write_text("\n".join(sorted(lines, key=len)[:5]) + "\n")
    return path


@pytest.fixture(scope="module")
def learned(folder: Path, memorise: Callable[[list[str]], tuple[Any, Any]]) -> tuple[Any, Any]:
    probes = tofu.load_probes(folder)
    return memorise([f"Question: {row['question']}\nAnswer: {row['answer']}<|endoftext|>" for row in probes])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """Fewer new tokens than the protocol has: an untaught model would write them all."""
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", 20)
    return 20


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


def test_numbers_are_their_formulas(folder: Path, learned: tuple[Any, Any], short: int) -> None:
    answer = tofu.evaluate(*learned, tofu.load_probes(folder), batch_size=7)
    nine = []
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
        assert answer["metrics"][name] == pytest.approx(expected, rel=1e-4)
        assert answer["counts"][name] == 5
        if name == "forget":
            assert answer["log_truth_ratios"] == pytest.approx(ratios, rel=1e-3, abs=1e-4)
        else:
            nine += expected.values()
    assert answer["metrics"]["model_utility"] == pytest.approx(9 / sum(1 / value for value in nine), rel=1e-3)
    assert answer["metrics"]["forget_quality"] is None
    assert answer["notes"] == {"forget_quality": "no tofu/retain_model.json under --data"}
    assert answer["forget_set"] == "forget01_perturbed"
    assert json.loads(json.dumps(answer)) == answer


def test_a_result_does_not_depend_on_its_batch(folder: Path, learned: tuple[Any, Any], short: int) -> None:
    probes = tofu.load_probes(folder)
    whole = tofu.score(*learned, probes, batch_size=64)
    for rank in range(2):
        for one, other in zip(tofu.score(*learned, probes[rank::2], batch_size=1), whole[rank::2], strict=True):
            assert one[:2] + tuple(one.perturbed) == pytest.approx(other[:2] + tuple(other.perturbed), rel=1e-4)
            assert one.rouge == other.rouge


@pytest.mark.parametrize("template", [None, CHAT])
def test_answers_are_encoded_as_in_training(folder: Path, learned: tuple[Any, Any], template: str | None) -> None:
    tokenizer = learned[1]
    rows = [(probe["question"], text) for probe in tofu.load_probes(folder) for text in probe["perturbed"]]
    tokenizer.chat_template = template
    try:
        expected = encode_answers(tokenizer, [row[0] for row in rows], [row[1] for row in rows])
        assert [encode_answers(tokenizer, [row[0]], [row[1]])[0] for row in rows] == expected
    finally:
        tokenizer.chat_template = None


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def result(log_ratio: float) -> tofu.Result:
    return tofu.Result(answer=1.0, paraphrase=log_ratio, perturbed=[0.5, -0.5], rouge=1.0)


def test_one_result_by_hand() -> None:
    two = tofu.Result(answer=math.log(2), paraphrase=math.log(4), perturbed=[math.log(4), math.log(16)], rouge=0.0)
    # Wrong answers: exp(-mean loss) = sqrt(1/4 * 1/16) = 1/8; the paraphrase: 1/4. R = 1/2.
    assert tofu.truth("forget", two) == pytest.approx(1 / 2)
    assert tofu.truth("retain", two) == pytest.approx(1 / 2)
    swapped = two._replace(paraphrase=math.log(16))  # R = 2
    assert tofu.truth("forget", swapped) == pytest.approx(1 / 2) and tofu.truth("retain", swapped) == 0.0
    assert tofu.probability("retain", two) == pytest.approx(1 / 2)
    assert tofu.probability("world_facts", two) == pytest.approx((1 / 2) / (1 / 2 + 1 / 4 + 1 / 16))


def test_the_published_scorer_stays_and_a_note_says_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"set": "forget", "file": "forget01_perturbed", "question": "?", "paraphrase": "a", "perturbed": ["b"]}
    probes = [{**row, "answer": "他出生在北京"}, {**row, "answer": "He was born in Bergen"}]
    monkeypatch.setattr(tofu, "score", lambda *_, **__: [result(0.0), result(0.0)])
    answer = tofu.evaluate(None, None, probes)  # pyright: ignore[reportArgumentType]
    assert answer["notes"]["rouge"].startswith("1 of 2 reference answers") and "rouge" in answer["protocol"].lower()
    assert "rouge" not in tofu.evaluate(None, None, probes[1:] * 2)["notes"]  # pyright: ignore[reportArgumentType]
    assert scoring.recall_rouge_score(["他出生在北京"], ["他出生在北京"]) == [0.0]


def test_forget_quality_by_hand() -> None:
    """Three against three without overlap: 2 of the 20 ways to deal six ranks are as far apart."""
    row = {"set": "forget", "file": "forget01_perturbed"}
    apart = tofu.summarise([row | {"reference": 5.0 + at} for at in range(3)], [result(at) for at in range(3)])
    assert apart["metrics"]["forget_quality"] == pytest.approx(2 / 20)
    same = tofu.summarise([row | {"reference": float(at)} for at in range(3)], [result(at) for at in range(3)])
    assert same["metrics"]["forget_quality"] == pytest.approx(1.0)
    assert same["notes"] == {"model_utility": "no retain, real_authors, world_facts"}


def test_losses_without_bounds() -> None:
    """Unlearning may end in losses of thousands, or in none at all: numbers or null, never an error or NaN."""
    far = tofu.Result(answer=5000.0, paraphrase=9000.0, perturbed=[2000.0, 3000.0], rouge=0.0)
    lost = tofu.Result(answer=math.nan, paraphrase=math.nan, perturbed=[math.nan], rouge=0.0)
    for name in tofu.SETS:
        assert tofu.probability(name, far) == 0.0 and tofu.truth(name, far) == 0.0
    probes = [{"set": name, "file": "forget01_perturbed", "reference": 0.0} for name in tofu.SETS]
    answer = tofu.summarise(probes, [far] * 4)
    assert answer["metrics"]["model_utility"] == 0.0 and answer["log_truth_ratios"] == [6500.0]
    answer = tofu.summarise(probes, [lost] * 4)
    assert answer["metrics"]["model_utility"] is None and answer["metrics"]["forget_quality"] is None
    assert set(answer["notes"].values()) == {"the model gave losses that are not finite"}
    json.dumps(answer, allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_the_real_files(data: Path) -> None:
    probes = tofu.load_probes(data)
    assert [sum(probe["set"] == name for probe in probes) for name in tofu.SETS] == [10, 5, 5, 5]


def test_retain_only_model(folder: Path, learned: tuple[Any, Any], short: int, tmp_path: Path) -> None:
    shutil.copytree(folder / "tofu", tmp_path / "tofu")
    file = tmp_path / "tofu" / "retain_model.json"
    answer = tofu.evaluate(*learned, tofu.load_probes(tmp_path))
    file.write_text(json.dumps({"model": "retain", "suites": {"tofu": answer}}))
    again = tofu.evaluate(*learned, tofu.load_probes(tmp_path))
    assert again["metrics"]["forget_quality"] == pytest.approx(1.0) and again["notes"] == {}
    file.write_text(json.dumps({"trajectory": []}))
    with pytest.raises(InputError, match=r"retain_model\.json was not written by eval\.run --suite tofu for one model"):
        tofu.load_probes(tmp_path)
    answer["log_truth_ratios"].pop()
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
    names = ["forget05_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"]
    assert asked == [("locuslab/TOFU", name) for name in names]
    assert [probe["file"] for probe in probes] == names


def test_no_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match=r"cannot load locuslab/TOFU .*; name local copies by --data") as caught:
        tofu.load_probes(None)
    assert "\n" not in str(caught.value)
