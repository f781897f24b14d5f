"""Which probes are about which rows of a corpus. The match is by text, whatever the names of the corpus's columns.

A probe's *key* is the text that identifies its rows (a person's name, a question, a document); `group_of` of its suite
returns it. A row is about the keys that equal one of its values, or else about the keys whose words its texts contain.
Case, punctuation, white space and compatible forms of characters do not count (`rouge.words`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from eval.suites.rouge import words

START = 3  # words of a key that index it: few keys of a corpus share them


class Matcher:
    """Finds keys in rows. Two keys with the same words are one key, with the name of the first."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.names: dict[tuple[str, ...], str] = {}
        for key in keys:
            self.names.setdefault(tuple(words(key)), key)
        self.names.pop((), None)  # without words it would match every text
        self.by_start: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        for key in self.names:
            self.by_start[key[:START]].append(key)
        self.sizes = sorted({len(start) for start in self.by_start})

    def name(self, key: str | None) -> str | None:
        """The name that `find` returns for a key; None for a key without words."""
        return None if key is None else self.names.get(tuple(words(key)))

    def find(self, row: Mapping[str, object]) -> list[str]:
        """The names of the keys that a row is about, in their order in the row."""
        texts = [tuple(words(value)) for value in row.values() if isinstance(value, str)]
        whole = [self.names[text] for text in texts if text in self.names]
        return whole or list(dict.fromkeys(name for text in texts for name in self._inside(text)))

    def _inside(self, text: tuple[str, ...]) -> Iterable[str]:
        for at in range(len(text)):
            for size in self.sizes:
                for key in self.by_start.get(text[at : at + size], ()):
                    if text[at : at + len(key)] == key:
                        yield self.names[key]
