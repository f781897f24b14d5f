"""The corpus of a run as rows, the part of it that is learned again, and how likely a model finds a document."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.suites import scoring
from eval.suites.rouge import words
from pipeline.config.schema import Corpus
from pipeline.data.chat import encode_answers
from pipeline.data.corpus import read_rows, text_of
from pipeline.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Row = dict[str, Any]


MOST_DOCUMENTS = 500  # whose likelihood is taken: the mean hardly moves beyond, and a corpus may have millions


class Split(NamedTuple):
    """A corpus in two: `groups` are those learned again (a row that stands for itself has none)."""

    relearned: list[Row]
    held_out: list[Row]
    groups: list[str]


def columns_of(corpus: dict[str, Any]) -> list[str]:
    """The columns that training reads."""
    return [corpus[key] for key in ("field", "prompt", "response") if corpus.get(key) is not None]


def read_corpus(corpus: dict[str, Any]) -> list[Row]:
    """All rows, with all their columns, of `data.forget` of a resolved configuration, read as training reads it.

    Raises:
        UnusableInput: it cannot be read, or a row lacks a text that the configuration names.
    """
    described = Corpus(**corpus)
    located, _ = read_rows(described, "data.forget.")
    rows = []
    for where, row in located:
        for column in columns_of(corpus):
            text_of(where, row, column)
        rows.append(row)
    if not rows:
        raise InputError(f"{described.path} holds no row; the run was trained on it, put it back")
    return rows


def split_corpus(rows: Sequence[Row], group_of: Callable[[Row], str | None], fraction: float, seed: int) -> Split:
    """Whole groups, a `fraction` of them and at least one, chosen by `seed`; both parts keep the order of the rows.

    A row without a group is one of its own.

    Raises:
        UnusableInput: all rows are one group, so that nothing would be left to test on.
    """
    own: list[str | int] = []
    for number, row in enumerate(rows):
        group = group_of(row)
        own.append(number if group is None else group)
    names = list(dict.fromkeys(own))
    if len(names) < 2:
        raise InputError(f"relearn: the forget corpus is one group ({names[0]}); name a column that splits it")
    chosen = set(random.Random(seed).sample(names, max(1, round(fraction * len(names)))))
    relearned, held_out = [], []
    for row, name in zip(rows, own, strict=True):
        (relearned if name in chosen else held_out).append(row)
    return Split(relearned, held_out, [name for name in names if name in chosen and isinstance(name, str)])


def without_copies(split: Split, columns: Sequence[str]) -> Split:
    """The split without held-out rows whose texts under `columns` are those of a relearned row, word by word.

    Raises:
        UnusableInput: no other is left.
    """

    def texts(row: Row) -> list[list[str]]:
        return [words(row[column]) for column in columns]

    learned = {repr(texts(row)) for row in split.relearned}
    held_out = [row for row in split.held_out if repr(texts(row)) not in learned]
    if not held_out:
        raise InputError("relearn: all that is not learned again are copies of what is; remove the copies")
    return split._replace(held_out=held_out)


def sample(rows: Sequence[Row], seed: int) -> list[Row]:
    """At most MOST_DOCUMENTS of them, chosen by `seed`."""
    return list(rows) if len(rows) <= MOST_DOCUMENTS else random.Random(seed).sample(list(rows), MOST_DOCUMENTS)


def mean_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    data: dict[str, Any],
    *,
    batch_size: int,
    title: str,
) -> float:
    """Nats per predicted token of `rows` of `data.forget`, each by itself and cut at `data.max_length` tokens.

    NaN where no row predicts a token. `data` is that section of a resolved configuration.
    """
    corpus, longest = data["forget"], data["max_length"]
    encoded = []
    for row in rows:
        if corpus["prompt"] is not None:
            [(ids, start)] = encode_answers(tokenizer, [row[corpus["prompt"]]], [row[corpus["response"]]])
        else:
            ids, start = tokenizer(row[corpus["field"]], truncation=True, max_length=longest).input_ids, 1
        start = max(start, 1)  # nothing predicts a first token
        if len(ids[:longest]) > start:
            encoded.append((ids[:longest], start))
    counts = [len(ids) - start for ids, start in encoded]
    losses = scoring.answer_losses(model, encoded, batch_size=batch_size, title=title)
    return (
        sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts) if counts else float("nan")
    )
