"""RWKU's utility sets: the prompts word for word, each score by hand, and what the harness makes of a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.results.general import general_ability
from eval.suites import rwku_utility
from eval.suites.shared_lm import SharedLM
from pipeline.errors import InputError
from tests.conftest import World

EXAMPLE = {"question": "Two and two?", "choices": ["1", "2", "3", "4"], "answer": 3}
ROWS: dict[str, list[dict[str, Any]]] = {  # in the form of the benchmark's, which they are not of
    "retain_mmlu": [
        {"task": "basic_sums", "examples": [EXAMPLE], "question": "One and one?", "choices": list("4321"), "answer": 2},
        {"task": "basic_sums", "examples": [], "question": "One and two?", "choices": list("4321"), "answer": 1},
    ],
    "retain_bbh": [{"task": "count", "cot": "\nQ: x\nA: so the answer is 1.\n", "question": "y", "answer": ["(B)"]}],
    "truthful": [
        {"question": "Is it so?", "mc1_targets": {"choices": ["No.", "Yes.", "Oh."], "labels": [0, 1, 0]}},
        {"question": "Why?", "mc1_targets": {"choices": ["So.", "Why."], "labels": [1, 0]}},
    ],
    "triviaqa": [{"question": "Who?", "answers": ["a Red Fox", "the fox"]}],
    "fluency": [{"instruction": "Say it."}],
}
HEAD = "The following are multiple choice questions (with answers) about basic sums.\n\n"
ASK = "Please following the previous examples and answer the given question.\n"
MMLU = [
    f"{HEAD}Question: Two and two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n"
    f"{ASK}Question: One and one?\nA. 4\nB. 3\nC. 2\nD. 1",
    f"{HEAD}{ASK}Question: One and two?\nA. 4\nB. 3\nC. 2\nD. 1",
]
BBH = (
    "Q: x\nA: so the answer is 1.\n\nFollowing previous examples, answer the following questions and end with 'so the "
    "answer is'\nQ: y"
)
SAID = {"y": "Hm. So the answer is b. Next", "Who?": "The red Foxes, the fox", "Say": "a b a b a"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text(prompt: str, expected: str, answer: str) -> dict[str, str]:
    return {"prompt": prompt, "expected": expected, "answer": answer}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "rwku" / "Batch" / "1-50"
    place.mkdir(parents=True)
    for name, rows in ROWS.items():
        (place / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_prompts_are_the_benchmarks_and_scores_those_by_hand(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that only pretends: it answers B and what SAID has. In plain text, then in a chat template."""
    asked: list[str] = []

    def choose(lm: SharedLM, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        asked.extend(request.args[0] + request.args[1] for request in requests)
        return [(float(request.args[1].strip() in ("B", "Yes.", "Why.")), False) for request in requests]

    def write(lm: SharedLM, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        questions = [request.args[0].rpartition("Q: ")[2].rpartition("Instruction: ")[2] for request in requests]
        return [next(text for start, text in SAID.items() if question.startswith(start)) for question in questions]

    monkeypatch.setattr(SharedLM, "loglikelihood", choose)
    monkeypatch.setattr(SharedLM, "generate_until", write)
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    answer = rwku_utility.evaluate(model, tokenizer, rwku_utility.load_probes(folder))
    for place in (f"{MMLU[0]} Answer: A", f"{MMLU[1]} Answer: D", f"{BBH} A:", "Instruction: Say it.\n"):
        assert place in asked, asked
    assert any(text.endswith("Barcelona, Spain.\n\nQ: Is it so? A: Yes.") for text in asked)
    trivia = "A: series finale\nPlease briefly answer the following question:\nQ: Who?\nA:"
    assert any(text.endswith(trivia) and text.startswith("\nQ: When did men's") for text in asked)
    one, two = 1.0, 2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)  # ab ba ab ba; aba bab aba
    assert answer["metrics"] == {
        "general": {"acc": 0.5},  # B is right for the second question alone
        "reason": {"exact_match": 1.0},  # "b" is "(B)" without marks and case
        "truthfulness": {"acc": 0.5},
        # red foxes fox beside red fox: two common words of three and two; beside fox: one of three and one
        "factuality": {"f1": pytest.approx(2 * 2 / (3 + 2)), "exact_match": 0.0},
        "fluency": {"entropy": pytest.approx((2 / 3 * one + 4 / 3 * two) / 2)},
    }
    assert answer["counts"] == {"general": 2, "reason": 1, "truthfulness": 2, "factuality": 1, "fluency": 1, "cut": 0}
    assert answer["texts"] == {
        "general": [
            text(f"Question: {question}\nA. 4\nB. 3\nC. 2\nD. 1", right, "B")
            for question, right in (("One and one?", "C"), ("One and two?", "B"))
        ],
        "reason": [text("y", "(B)", SAID["y"])],
        "truthfulness": [text("Is it so?", "Yes.", "Yes."), text("Why?", "So.", "Why.")],
        "factuality": [text("Who?", "a Red Fox / the fox", SAID["Who?"])],
        "fluency": [text("Say it.", "", SAID["Say"])],
    }
    columns = general_ability({"rwku_utility": answer}).columns
    assert "rwku_utility.general.acc" in columns and "rwku_utility.factuality.f1" in columns

    asked.clear()
    tokenizer.chat_template = TEMPLATE
    again = rwku_utility.evaluate(model, tokenizer, rwku_utility.load_probes(folder))
    assert again["metrics"] == answer["metrics"]
    for place in (f"<user>{MMLU[1]}<assistant>Answer: D", f"<user>{BBH}<assistant>A:"):
        assert place in asked, asked
    assert "<user>Instruction: Say it.\n<assistant>" in asked


def test_choices_of_a_model_are_those_by_hand(folder: Path, world: World) -> None:
    """The two sets of choices, with a forward pass for each answer."""
    for name in ("retain_bbh", "triviaqa", "fluency"):
        (folder / "rwku" / "Batch" / "1-50" / f"{name}.json").unlink()
    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")

    def loss(prompt: str, choice: str) -> float:
        start = len(tokenizer(prompt).input_ids)
        ids = torch.tensor([tokenizer(f"{prompt} {choice}").input_ids])
        with torch.no_grad():
            table = model(ids).logits[0].log_softmax(-1)
        return -sum(table[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))

    def right(prompts: list[str], choices: list[list[str]], answers: list[int]) -> float:
        losses = [[loss(prompt, choice) for choice in of] for prompt, of in zip(prompts, choices, strict=True)]
        return sum(of.index(min(of)) == answer for of, answer in zip(losses, answers, strict=True)) / len(answers)

    head = "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in rwku_utility.TRUTHFUL)
    truthful = [f"{head}\n\nQ: {row['question']} A:" for row in ROWS["truthful"]]
    answer = rwku_utility.evaluate(model, tokenizer, rwku_utility.load_probes(folder))
    assert answer["metrics"] == {
        "general": {"acc": right([f"{prompt} Answer:" for prompt in MMLU], [list("ABCD")] * 2, [2, 1])},
        "truthfulness": {"acc": right(truthful, [["No.", "Yes.", "Oh."], ["So.", "Why."]], [1, 0])},
    }


@pytest.mark.parametrize(
    ("answer", "found"), [("so the answer is (B).", 1.0), ("The answer is b", 0.0), (" B! ", 1.0), ("", 0.0)]
)
def test_the_answer_of_a_chain_of_thought(answer: str, found: float) -> None:
    """Behind "the answer is" up to a full stop; else the whole text."""
    assert rwku_utility.match_reason({"references": ["b"]}, [answer]) == {"exact_match": found}


def test_what_is_no_row_of_the_benchmark_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "rwku" / "Batch" / "1-50" / "retain_mmlu.json"
    file.write_text(json.dumps([ROWS["retain_mmlu"][0], {"question": "Which?"}]))
    with pytest.raises(InputError, match=r"retain_mmlu.json, row 2: is not as the rows of RWKU's utility_general are"):
        rwku_utility.load_probes(folder)
    with pytest.raises(InputError, match=r"retain_mmlu.json or its like"):
        rwku_utility.load_probes(tmp_path / "nothing")


def test_the_hub_gives_the_first_fifty_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    people = [f"person {n}" for n in range(60)]
    fluency = [{"subject": person, "instruction": "Say it."} for person in reversed(people)]
    rows = {"forget_level1": [{"subject": person} for person in people for _ in range(2)], "utility_fluency": fluency}
    monkeypatch.setattr(rwku_utility, "read_hub", lambda path, name: rows.get(name, []))
    assert rwku_utility.load_probes(None).counts == {"fluency": 50}
