"""What a model answered, in words: the few answers that an evaluation keeps for a reader."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import TypedDict, TypeVar

MOST_TEXTS = 20  # of a set


class Answered(TypedDict):
    """A prompt (without template, and without the words that a suite adds), the right answer, and the model's."""

    prompt: str
    expected: str
    answer: str


class TeacherForced(TypedDict):
    """A prompt, the right answer, and the greedy token at each place of it, given the right tokens before that.

    The model did not write this text: after a wrong token it sees the right one.
    """

    prompt: str
    expected: str
    teacher_forced: str


Kept = TypeVar("Kept", Answered, TeacherForced)


def chosen_rows(number: int) -> list[int]:
    """At most MOST_TEXTS of `number` rows, in their order.

    The choice depends on the number of rows alone, so that two models with the same probes have the same prompts.
    """
    return sorted(random.Random(0).sample(range(number), min(MOST_TEXTS, number)))


def choose_texts(rows: Iterable[tuple[str, Kept]]) -> dict[str, list[Kept]]:
    """The `chosen_rows` of each set, by (set, row)."""
    sets: dict[str, list[Kept]] = defaultdict(list)
    for name, row in rows:
        sets[name].append(row)
    return {name: [of[number] for number in chosen_rows(len(of))] for name, of in sets.items()}
