"""What a model answered, in words: the few answers that an evaluation keeps for a reader."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import TypedDict

MOST_TEXTS = 20  # of a set


class Answered(TypedDict):
    """A prompt (without template, and without the words that a suite adds), the right answer, and the model's."""

    prompt: str
    expected: str
    answer: str


def choose_texts(rows: Iterable[tuple[str, Answered]]) -> dict[str, list[Answered]]:
    """At most MOST_TEXTS rows of each set, by (set, row).

    The choice depends on the number of rows alone, so that two models with the same probes have the same prompts.
    """
    sets: dict[str, list[Answered]] = defaultdict(list)
    for name, row in rows:
        sets[name].append(row)
    chosen = {name: random.Random(0).sample(range(len(of)), min(MOST_TEXTS, len(of))) for name, of in sets.items()}
    return {name: [sets[name][number] for number in sorted(numbers)] for name, numbers in chosen.items()}
