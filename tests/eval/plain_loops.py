"""What the suites measure, from the definitions alone: a row and a token at a time, without a batch or `generate`."""

from __future__ import annotations

import itertools
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer in the chat template, given the question, and the end of the turn behind them."""

    text: str
    log_p: list[float]
    standardised: list[float]  # (log p - mean) / sd, over the predicted distribution
    greedy: list[bool]
    closing: int

    def loss(self) -> float:
        return -fmean(self.log_p)

    def strength(self) -> float:
        """Extraction strength: 1 - k/T, all of the T tokens after the first k greedy."""
        own = self.greedy[: len(self.greedy) - self.closing]
        return 1 - next(k for k in range(len(own) + 1) if all(own[k:])) / len(own)

    def memorized(self) -> float:
        own = self.greedy[: len(self.greedy) - self.closing]
        return sum(own) / len(own)

    def familiarity(self, lowest: float) -> dict[str, float]:
        """The four scores of membership inference; the end of the turn counts for the first two alone."""
        end = len(self.log_p) - self.closing
        return {
            "loss": fmean(self.log_p),
            "zlib": fmean(self.log_p) / len(zlib.compress(self.text.encode())),
            "min_k": mean_of_lowest(self.log_p[:end], lowest),
            "min_k_plus": mean_of_lowest(self.standardised[:end], lowest),
        }


def mean_of_lowest(values: Sequence[float], share: float) -> float:
    return fmean(sorted(values)[: max(1, int(share * len(values)))])


def measures_of(answers: Sequence[Answer], *, ends: bool = True) -> dict[str, float]:
    """What a training measures of a set of answers: the end of the turn counts as a token of each, with `ends`."""
    last = [len(one.log_p) - (0 if ends else one.closing) for one in answers]
    pairs = zip(answers, last, strict=True)
    whole = [replace(one, log_p=one.log_p[:at], greedy=one.greedy[:at], closing=0) for one, at in pairs]
    return {
        "extraction_strength": fmean(one.strength() for one in whole),
        "exact_memorization": fmean(one.memorized() for one in whole),
        "probability": fmean(math.exp(-one.loss()) for one in whole),
        "loss": -sum(sum(one.log_p) for one in whole) / sum(len(one.log_p) for one in whole),
    }


@dataclass(frozen=True)
class Reader:
    """A model of transformers with its tokenizer."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def table(self, ids: list[int]) -> torch.Tensor:
        """[T - 1, V] float64 log-probabilities of what follows each token but the last."""
        return self.model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)

    def scored(self, text: str, ids: list[int], start: int, closing: int) -> Answer:
        """The tokens from `start` on."""
        log_p, standardised, greedy = [], [], []
        for row, token in zip(self.table(ids)[start - 1 :], ids[start:], strict=True):
            mean = float((row.exp() * row).sum())
            variance = float((row.exp() * row**2).sum()) - mean**2
            log_p.append(float(row[token]))
            standardised.append((log_p[-1] - mean) / math.sqrt(variance))
            greedy.append(int(row.argmax()) == token)
        return Answer(text, log_p, standardised, greedy, closing)

    def question(self, question: str) -> list[int]:
        """The ids of a question, up to where its answer begins."""
        turn = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def pair(self, question: str, answer: str) -> tuple[list[int], int, int]:
        """The ids of a question with its answer, which of them begins the answer, how many follow it."""
        head = self.question(question)
        tail = self.tokenizer("<|im_end|>\n", add_special_tokens=False).input_ids
        own = self.tokenizer(answer, add_special_tokens=False).input_ids
        return head + own + tail, len(head), len(tail)

    def answered(self, question: str, answer: str) -> Answer:
        return self.scored(answer, *self.pair(question, answer))

    def text(self, text: str) -> Answer:
        """A text without a question: its first token is predicted by nothing."""
        return self.scored(text, self.tokenizer(text).input_ids, 1, 0)

    @torch.no_grad()
    def writes(self, ids: list[int], length: int) -> str:
        """Greedy, until the end of text or of the turn."""
        new: list[int] = []
        past, following = None, ids
        while len(new) < length:
            out = self.model(input_ids=torch.tensor([following]), past_key_values=past, use_cache=True)
            past, following = out.past_key_values, [int(out.logits[0, -1].argmax())]
            if following == [self.tokenizer.eos_token_id]:
                break
            new += following
        return self.tokenizer.decode(new, skip_special_tokens=True)


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the table of the textbook."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, second in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if word == second else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def f1(reference: str, answer: str) -> float:
    """ROUGE-L of lower-case words, not stemmed."""
    one, other = words(reference), words(answer)
    found = common(one, other)
    return 2 * found / (len(one) + len(other)) if found else 0.0


def stemmed_recall(reference: str, answer: str) -> float:
    """ROUGE-L recall of the stems of words; those of up to three letters stay."""
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem
    one, other = ([stem(word) if len(word) > 3 else word for word in words(text)] for text in (reference, answer))
    return common(one, other) / len(one)


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """The chance that one of the first is above one of the second; a tie is half of one."""
    return fmean((one > other) + (one == other) / 2 for one in positives for other in negatives)


def harmonic(values: Sequence[float]) -> float:
    return len(values) / sum(1 / value for value in values) if all(values) else 0.0


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The greatest difference of two empirical distribution functions."""
    return max(abs(fmean(x <= at for x in one) - fmean(x <= at for x in other)) for at in (*one, *other))


def kolmogorov_smirnov(one: Sequence[float], other: Sequence[float]) -> float:
    """The p-value of the two-sample test: the share of all ways to divide the values that are as far apart."""
    found, ranks = distance(one, other), range(len(one) + len(other))
    ways = list(itertools.combinations(ranks, len(one)))
    apart = sum(distance(way, [*set(ranks) - set(way)]) >= found - 1e-9 for way in ways)
    return apart / len(ways)


def learn(model: Any, sequences: Sequence[tuple[list[int], int]], *, lr: float, steps: int) -> Iterator[int]:
    """Train on all sequences in every step, each alone: the step's number, before the first step and after each.

    The loss is the mean over the predicted tokens of all sequences, those from a sequence's number on. AdamW at a
    constant rate, without decay; the gradient is clipped to norm 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    tokens = sum(len(ids) - start for ids, start in sequences)
    for step in range(steps + 1):
        yield step
        if step == steps:
            return
        for ids, start in sequences:
            table = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            (-table.gather(1, torch.tensor(ids[start:])[:, None]).sum() / tokens).backward()
        with torch.no_grad():
            norm = math.sqrt(sum(float(one.grad.double().square().sum()) for one in model.parameters()))
            for one in model.parameters():
                one.grad /= max(norm, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the time of the processor that a block and its commands take; `pytest -s` shows it."""

    def used() -> float:
        return sum(os.times()[:4])  # of this process and of the children that have ended

    before = used()
    yield
    print(f"{what}: {used() - before:.1f} s of a core")
