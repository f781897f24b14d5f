"""The corpus of a run as rows, the part of it to relearn, and the likelihood that a model gives to documents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from eval.suites import scoring
from eval.suites.rouge import words
from pipeline.config.sources import Corpus
from pipeline.data.corpus import read_rows, text_of
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Row = Json


class Split(NamedTuple):
    """A corpus in two parts; `groups` are the names of the relearned groups (a row that is a group alone has none)."""

    relearned: list[Row]
    held_out: list[Row]
    groups: list[str]


def columns_of(corpus: Json) -> list[str]:
    """The columns that training reads."""
    return [corpus[key] for key in ("field", "prompt", "response") if corpus.get(key) is not None]


def read_corpus(corpus: Json) -> list[Row]:
    """All rows, with all their columns, of `data.forget` of a resolved configuration, read as training reads it.

    Raises:
        InputError: the corpus cannot be read, or a row lacks a text that the configuration names.
    """
    described = Corpus(**corpus)
    located, _ = read_rows(described, "data.forget.")
    rows = []
    for where, row in located:
        for column in columns_of(corpus):
            text_of(where, row, column)
        rows.append(row)
    if not rows:
        raise InputError(f"{described.path} holds no row, but the run was trained on it; restore the file")
    return rows


def split_corpus(rows: Sequence[Row], group_of: Callable[[Row], str | None], fraction: float, seed: int) -> Split:
    """Split by whole groups: `seed` chooses a `fraction` of them, at least one. Both parts keep the order of the rows.

    A row without a group is a group of its own.

    Raises:
        InputError: all rows are one group, so that no row would remain for the test.
    """
    own: list[str | int] = []
    for number, row in enumerate(rows):
        group = group_of(row)
        own.append(number if group is None else group)
    names = list(dict.fromkeys(own))
    if len(names) < 2:
        raise InputError(
            f"relearn: the forget corpus is one group ({names[0]}); name a column that splits it by --group"
        )
    chosen = set(random.Random(seed).sample(names, max(1, round(fraction * len(names)))))
    relearned, held_out = [], []
    for row, name in zip(rows, own, strict=True):
        (relearned if name in chosen else held_out).append(row)
    return Split(relearned, held_out, [name for name in names if name in chosen and isinstance(name, str)])


def without_copies(split: Split, columns: Sequence[str]) -> Split:
    """The split without held-out rows whose texts under `columns` have the words of a relearned row.

    Raises:
        InputError: no held-out row remains.
    """

    def texts(row: Row) -> list[list[str]]:
        return [words(row[column]) for column in columns]

    learned = {repr(texts(row)) for row in split.relearned}
    held_out = [row for row in split.held_out if repr(texts(row)) not in learned]
    if not held_out:
        raise InputError("relearn: all held-out rows are copies of relearned rows; remove the copies from the corpus")
    return split._replace(held_out=held_out)


def mean_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    data: Json,
    *,
    batch_size: int,
    title: str,
) -> float:
    """Nats per predicted token of `rows` of `data.forget`, each row alone and cut at `data.max_length` tokens.

    NaN if no row predicts a token. `data` is the section of a resolved configuration.
    """
    corpus, max_length = data["forget"], data["max_length"]
    encoded = []
    for row in rows:
        question, text = corpus["prompt"], row[corpus["response"] or corpus["field"]]
        ids, start = scoring.encode_document(tokenizer, text, max_length, None if question is None else row[question])
        if len(ids) > start:
            encoded.append((ids, start))
    counts = [len(ids) - start for ids, start in encoded]
    losses = scoring.answer_losses(model, encoded, batch_size=batch_size, title=title)
    return (
        sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts) if counts else float("nan")
    )
