"""Questions with four choices, a small model that answers them, and its choices computed by hand.

The MMLU questions are real ones (`tests/data`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval import bios

SUBJECTS = ("astronomy", "marketing", "miscellaneous")
NUM_QUESTIONS = {
    "astronomy": 7,
    "marketing": 5,
    "miscellaneous": 8,
}  # unequal, so that a plain mean of subjects is wrong
QUIZ = [  # the form of WMDP, not its questions
    {
        "question": f"Which of these is {colour}? ",
        "choices": ["a plum", "a pear", "an apple", "a lime"],
        "answer": answer,
    }
    for colour, answer in (("red", 2), ("green", 1), ("blue", 0), ("sour", 3), ("round", 2), ("oval", 0), ("small", 1))
]
FRUIT = {"red": "apple", "green": "pear", "blue": "plum"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_folder(folder: Path, data: Path) -> None:
    """`data/` (three MMLU subjects, a quiz, three probes); `run/`: a model before and after learning."""
    texts = []
    for subject in SUBJECTS:
        for split in ("dev", "test"):
            rows = read_rows(data / "mmlu" / split / f"{subject}.jsonl")
            write_rows(folder / "data" / "mmlu" / split / f"{subject}.jsonl", rows)
        texts += [" ".join([row["question"], *row["choices"]]) for row in rows]
    write_rows(folder / "data" / "wmdp" / "wmdp_bio.jsonl", QUIZ)
    probes = [{"split": "retain", "kind": "QA", "prompt": f"{c} fruit:", "answer": f} for c, f in FRUIT.items()]
    write_rows(folder / "data" / "bios" / "probes.jsonl", probes)
    answers = [f"{probe['prompt']} {probe['answer']}\n" for probe in probes]
    tokenizer = bios.build_tokenizer([*texts, *answers])
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.2,  # a timid model gives every question the same answer
    )
    model: Any = LlamaForCausalLM(shape)
    for name, steps in (("exports/step-000001", 0), ("final", 90)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(steps):
            ids = torch.tensor([tokenizer(answers[step % 3]).input_ids])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / "run" / name)
        tokenizer.save_pretrained(folder / "run" / name)
    write_rows(folder / "run" / "metrics.jsonl", [{"step": 1}, {"step": 2}])


def by_hand(
    model: Any, tokenizer: Any, subject: str, dev: list[dict[str, Any]], test: list[dict[str, Any]]
) -> list[int]:
    """The choice of each question: the prompt in full, one forward pass for each of the four answers."""

    def put(row: dict[str, Any], answer: str = "") -> str:
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
        return f"{row['question'].strip()}\n{choices}Answer:{answer}"

    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    examples = "".join(put(row, f" {'ABCD'[row['answer']]}") + "\n\n" for row in dev)
    chosen = []
    for row in test:
        prompt = head + examples + put(row)
        start = len(tokenizer(prompt).input_ids)
        scores = []
        for letter in "ABCD":
            ids = torch.tensor([tokenizer(f"{prompt} {letter}").input_ids])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
        chosen.append(scores.index(max(scores)))
    return chosen


ROW = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
