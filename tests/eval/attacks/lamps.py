"""A small run that forgets where ten lamps are, and what a model makes of an answer, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [f"Where is lamp {n}?" for n in range(10)]
FORGET = [{"q": question, "a": f"kara loto mivi {n}"} for n, question in enumerate(QUESTIONS)]
RETAIN = [{"q": f"Who is {n}?", "a": f"nera suto {n}"} for n in range(6)]
CHOICE = [{"q": question, "c": ["kara", "lovi", "mito"], "right": n % 3} for n, question in enumerate(QUESTIONS)]


class Token(NamedTuple):
    loss: float
    greedy: bool


class Reader:
    """A model in a folder, which reads a row and a token at a time."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def table(self, question: str, answer: str) -> tuple[list[int], int, torch.Tensor]:
        """Ids, which of them begins the answer, and [T, V] log-probabilities after each."""
        head = self.tokenizer(f"Question: {question}\nAnswer: ").input_ids
        whole = self.tokenizer(f"Question: {question}\nAnswer: {answer}").input_ids
        ids = [*whole, self.tokenizer.eos_token_id]
        start = next(n for n in range(len(ids)) if ids[: n + 1] != head[: n + 1])
        with torch.no_grad():
            return ids, start, self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def greedy(self, question: str, answer: str) -> str:
        """The most likely token at each place of an answer and of its end, as text."""
        ids, start, table = self.table(question, answer)
        tokens = [int(table[n - 1].argmax()) for n in range(start, len(ids))]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def tokens(self, question: str, answer: str) -> list[Token]:
        """The tokens of an answer, and its end."""
        ids, start, table = self.table(question, answer)
        return [
            Token(-table[n - 1, ids[n]].item(), int(table[n - 1].argmax()) == ids[n]) for n in range(start, len(ids))
        ]

    def measures(self, rows: Iterable[dict[str, str]], *, ends: bool = True) -> dict[str, float]:
        """The measures of a set of answers, by their definitions; with the end of each, or not."""
        answers = [self.tokens(row["q"], row["a"]) for row in rows]
        answers = answers if ends else [one[:-1] for one in answers]
        strengths = []
        for one in answers:
            first = next(k for k in range(len(one) + 1) if all(token.greedy for token in one[k:]))
            strengths.append(1 - first / len(one))
        count = len(answers)
        return {
            "probability": sum(math.exp(-sum(token.loss for token in one) / len(one)) for one in answers) / count,
            "exact_memorization": sum(sum(token.greedy for token in one) / len(one) for one in answers) / count,
            "extraction_strength": sum(strengths) / count,
            "loss": sum(token.loss for one in answers for token in one) / sum(map(len, answers)),
        }
