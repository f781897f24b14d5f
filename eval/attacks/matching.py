"""Which probes ask about which rows of a corpus: found by text, whatever the columns of the corpus are called.

A probe's *key* is the text that tells a row of it (a person's name, a question, a document); its suite's `group_of`
says it. A row is about the keys that are one of its values as a whole, else about those that stand in its texts, word
by word. Case, punctuation, white space and compatible forms of characters do not count (`scoring.words`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from eval.suites.rouge import words

START = 3  # words of a key by which it is looked up: few keys of a corpus share them


class Matcher:
    """Finds keys in rows. Two keys of the same words are one, by the name of the first."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.names: dict[tuple[str, ...], str] = {}
        for key in keys:
            self.names.setdefault(tuple(words(key)), key)
        self.names.pop((), None)  # no word: it would stand everywhere
        self.begun: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        for key in self.names:
            self.begun[key[:START]].append(key)
        self.sizes = sorted({len(start) for start in self.begun})

    def name(self, key: str | None) -> str | None:
        """The name under which `find` knows a key; None of a key without words."""
        return None if key is None else self.names.get(tuple(words(key)))

    def find(self, row: Mapping[str, Any]) -> list[str]:
        """The names of the keys that a row is about, in the order in which they stand there."""
        texts = [tuple(words(value)) for value in row.values() if isinstance(value, str)]
        whole = [self.names[text] for text in texts if text in self.names]
        return whole or list(dict.fromkeys(name for text in texts for name in self._inside(text)))

    def _inside(self, text: tuple[str, ...]) -> Iterable[str]:
        for at in range(len(text)):
            for size in self.sizes:
                for key in self.begun.get(text[at : at + size], ()):
                    if text[at : at + len(key)] == key:
                        yield self.names[key]
