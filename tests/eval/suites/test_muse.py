"""MUSE: each number against the benchmark's definition, by plain loops on a model that has learned some of it.

The rows are made here, in the form of the benchmark's files: its news are other people's texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from eval.suites import muse
from pipeline.errors import InputError
from tests.eval.plain_loops import f1

TOWNS = ("Lyon", "Graz", "Brno", "Lima", "Kyoto", "Oslo", "Bari", "Cork", "Turku", "Ghent")
THINGS = ("red lamp", "blue boat", "old mill", "tall oak", "grey horse", "new bell")
FORGET = [{"question": f"Where is the {thing}?", "answer": TOWNS[n]} for n, thing in enumerate(THINGS)]
RETAIN = [{"question": f"Who paints the {thing}?", "answer": f"Ann {TOWNS[-n]}"} for n, thing in enumerate(THINGS)]
EXAMPLES = [{"question": f"Is {town} far?", "answer": "No"} for town in TOWNS[:3]]
PASSAGES = [
    {"prompt": f"Last night the {thing} stood", "gt": f"in {TOWNS[n]}, and nobody, they say, walked by. " * (1 + 4 * n)}
    for n, thing in enumerate(THINGS[:4])
]
SEEN = [f"The {thing} is known in {TOWNS[n]}, where it rained for {n + 3} days." for n, thing in enumerate(THINGS)]
UNSEEN = [
    f"A {n + 3}rd rain of days is by {TOWNS[-n]} unheard: {thing}, known where?" for n, thing in enumerate(THINGS)
]
FILES: dict[str, list[Any]] = {
    "knowmem_forget_qa": FORGET,
    "knowmem_forget_qa_icl": EXAMPLES,
    "knowmem_retain_qa": RETAIN,
    "knowmem_retain_qa_icl": EXAMPLES[::-1],
    "verbmem_forget": PASSAGES,
    "privleak_forget": SEEN,
    "privleak_holdout": UNSEEN,
}


def write(folder: Path, **files: Any) -> Path:
    (folder / "muse_news").mkdir(parents=True, exist_ok=True)
    for name, rows in (files or FILES).items():
        (folder / "muse_news" / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


def prompt_of(row: dict[str, str], examples: list[dict[str, str]]) -> str:
    before = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in examples)
    return before + f"Question: {row['question']}\nAnswer: "


@pytest.fixture(scope="module")
def learned(memorise: Callable[[list[str]], tuple[Any, Any]]) -> tuple[Any, Any]:
    """It knows some of what it was to forget, and half of what it was to retain.

    The prompt ends with a space, which is a token of its own: a second one keeps it so in front of an answer.
    """
    texts = [f"{prompt_of(row, EXAMPLES)} {row['answer']}\n\nQuestion: Why?" for row in FORGET]
    texts += [f"{prompt_of(row, EXAMPLES[::-1])} {row['answer']}\n\n" for row in RETAIN[:3]]
    return memorise([*texts, *(f"{row['prompt']} {row['gt']}" for row in PASSAGES), *SEEN])


@pytest.fixture(scope="module")
def evaluated(folder: Path, learned: tuple[Any, Any]) -> dict[str, Any]:
    return muse.evaluate(*learned, muse.load_probes(folder), batch_size=4)


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """Greedy: no padding, no batch, no cache, no `generate`."""
    ids, new = tokenizer(prompt).input_ids, list[int]()
    while len(new) < length and new[-1:] != [tokenizer.eos_token_id]:
        new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


def test_knowledge_and_verbatim_memory_by_their_definitions(
    learned: tuple[Any, Any], evaluated: dict[str, Any]
) -> None:
    model, tokenizer = learned
    metrics = evaluated["metrics"]
    for side, rows, examples in (("forget", FORGET, EXAMPLES), ("retain", RETAIN, EXAMPLES[::-1])):
        scores = []
        for row in rows:
            answer = written(model, tokenizer, prompt_of(row, examples), 32)
            for stop in ("\n\n", "\nQuestion", "Question:"):
                answer = answer.split(stop)[0]
            scores.append(f1(row["answer"], answer))
        assert metrics[side]["knowmem"] == pytest.approx(fmean(scores)) and fmean(scores) > 0.2
    scores = []
    for row in PASSAGES:
        reference = tokenizer.decode(tokenizer(row["gt"]).input_ids[:128], skip_special_tokens=True)
        scores.append(f1(reference, written(model, tokenizer, row["prompt"], 128)))
    assert len(tokenizer(PASSAGES[-1]["gt"]).input_ids) > 128, "the longest one is cut"
    assert metrics["forget"]["verbmem"] == pytest.approx(fmean(scores)) and fmean(scores) > 0.2
    assert evaluated["texts"]["forget_knowmem"][0]["prompt"] == FORGET[0]["question"], "without the examples"


def test_privacy_leakage_by_its_definition(learned: tuple[Any, Any], evaluated: dict[str, Any]) -> None:
    model, tokenizer = learned
    sides = []
    for texts in (SEEN, UNSEEN):
        scores = []
        for text in texts:
            ids = tokenizer(text).input_ids
            with torch.no_grad():
                table = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1).tolist()
            own = sorted(math.log(table[at][token]) for at, token in enumerate(ids[1:]))
            scores.append(fmean(own[: int(0.4 * len(own))]))
        sides.append(scores)
    area = fmean((held > seen) + (held == seen) / 2 for seen in sides[0] for held in sides[1])
    metrics = evaluated["metrics"]
    assert area < 0.3, "what it has seen is more familiar"
    assert metrics["membership"]["AUC"]["min_k"] == pytest.approx(area)
    assert metrics["privleak"] == pytest.approx((area - 0.4772) / 0.4772 * 100)


def test_a_retrained_model_of_ones_own(folder: Path, learned: tuple[Any, Any], tmp_path: Path) -> None:
    write(tmp_path, privleak_forget=SEEN, privleak_holdout=UNSEEN)
    path = tmp_path / "muse_news" / "retrain_model.json"
    path.write_text(json.dumps({"suites": {"muse_news": {"metrics": {"membership": {"AUC": {"min_k": 0.25}}}}}}))
    probes = muse.load_probes(tmp_path)
    answer = muse.evaluate(*learned, probes)
    area = answer["metrics"]["membership"]["AUC"]["min_k"]
    assert answer["metrics"]["privleak"] == pytest.approx(100 * (area - 0.25) / 0.25)
    assert answer["counts"]["knowmem_forget_qa"] == 0 and "forget" not in answer["metrics"]
    assert json.loads(json.dumps(answer)) == answer
    path.write_text("{}")
    with pytest.raises(InputError, match=r"retrain_model\.json was not written by eval\.run --suite muse_news"):
        muse.load_probes(tmp_path)


def test_a_broken_model_has_no_leakage(folder: Path, learned: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muse, "familiarity", lambda *_: [math.nan])
    probes = [probe for probe in muse.load_probes(folder) if probe["set"].startswith("privleak")]
    answer = muse.evaluate(*learned, probes)
    assert answer["notes"] == {"privleak": "the model gave scores that are not finite"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"other": []}, "has no muse_news/knowmem_forget_qa.json or its like"),
        ({"knowmem_forget_qa": FORGET}, "without knowmem_forget_qa_icl.json"),
        ({"verbmem_forget": [{"prompt": "a"}]}, "row 1: needs text under prompt, gt"),
        ({"privleak_forget": ["a", 3]}, "row 2: needs text under text"),
        ({"privleak_forget": {}}, "holds no list of rows"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        muse.load_probes(write(tmp_path, **files))


def test_the_hub_gives_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits: dict[str, dict[str, list[Any]]] = {
        "knowmem": {"forget_qa": FORGET, "forget_qa_icl": EXAMPLES, "retain_qa": RETAIN, "retain_qa_icl": EXAMPLES},
        "verbmem": {"forget": PASSAGES},
        "privleak": {name: [{"text": text} for text in SEEN] for name in ("forget", "retain", "holdout")},
    }

    def load_dataset(path: str, name: str) -> dict[str, list[Any]]:
        assert path == "muse-bench/MUSE-Books"
        return splits[name]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    probes = muse.load_probes(None, "muse_books")
    counts = {name: sum(probe["set"] == name for probe in probes) for name in muse.FILES}
    assert list(counts.values()) == [4, 6, 6, 6, 6] and probes[0]["suite"] == "muse_books"
    del splits["privleak"]["holdout"]
    with pytest.raises(InputError, match="has no split holdout; it has forget, retain"):
        muse.load_probes(None, "muse_books")
