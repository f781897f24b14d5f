"""Rows of text -> rows of the table of token sequences, with what is counted on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any, Literal, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from pipeline.config.objectives import Pairing
from pipeline.data.chat import begun, encode_answers, ended, first_tokens
from pipeline.data.corpus import Row, document_key

T = TypeVar("T")


FORMAT_VERSION = 3  # of the table; increase it whenever the same text becomes other tokens or columns


TableRow = dict[str, Any]  # a column of ids holds a list, any other a number


COUNTS = ("documents", "tokens", "unused", "dropped", "empty")  # the fields of Usage


Counts = dict[str, int]  # by the names of COUNTS


@dataclass(frozen=True)
class TokenOptions:
    """What decides the tokens of a corpus, beside its text and the tokenizer; the keys of `data` describe each."""

    max_length: int
    packing: Literal["blocks", "documents"]
    long_documents: Literal["split", "truncate"] = "split"
    pairing: Pairing | None = None

    @property
    def splits(self) -> bool:
        """Whether a document or a joined stream longer than `max_length` becomes several sequences with no token lost.

        The two sides of a pair never do, because each sequence of one side needs its counterpart.
        """
        return self.long_documents == "split" and self.pairing is None


@dataclass(frozen=True)
class Usage:
    """How much of a corpus became sequences."""

    documents: int
    tokens: int  # of all documents
    unused: int  # of those tokens, in no row of the table
    dropped: int  # documents of which nothing would be predicted
    empty: int  # documents with an empty text or answer


class Encoded(NamedTuple):
    """A document as sequences, each with the length of its prompt; and the number of all of its tokens."""

    pieces: list[tuple[list[int], int]]
    size: int


Encoder = Callable[[list[Row], int], list[Encoded]]  # encodes text number `which` of each of some rows


def encoder(tokenizer: PreTrainedTokenizerBase, options: TokenOptions) -> Encoder:
    """A function that makes sequences of rows; see `pipeline.data.tokenize`. The tokenizer does not change."""
    tokenizer = copy.deepcopy(tokenizer)  # a call with truncation changes the state that is saved with a model
    max_length = options.max_length
    begin: Any = tokenizer.bos_token_id
    end: Any = tokenizer.eos_token_id

    def encode(batch: list[Row], which: int) -> list[Encoded]:
        texts = [row.texts[which] for row in batch]
        if batch[0].prompt is not None:
            answers = encode_answers(tokenizer, [str(row.prompt) for row in batch], texts)
            return [Encoded([(ids[:max_length], start)], len(ids)) for ids, start in answers]
        whole = [begun(ids, begin) for ids in tokenizer(texts, verbose=False).input_ids]
        if options.packing == "blocks":
            return [Encoded([(ids, 0)], len(ids)) for ids in (ended(ids, end) for ids in whole)]
        if options.splits:
            parts = (split_document(ids, max_length, begin) for ids in whole)
            return [Encoded([(part, 0) for part in some], len(ids)) for some, ids in zip(parts, whole, strict=True)]
        long = [number for number, ids in enumerate(whole) if len(ids) > max_length]
        cut: dict[int, list[int]] = {}
        if long:
            cut = dict(zip(long, first_tokens(tokenizer, [texts[at] for at in long], max_length), strict=True))
        return [Encoded([(cut.get(at, ids), 0)], len(ids)) for at, ids in enumerate(whole)]

    return encode


def split_document(ids: list[int], max_length: int, begin: object) -> list[list[int]]:
    """`ids` as the fewest pieces of at most `max_length` tokens, of equal length but for one token.

    Each token but the first is predicted in one piece: a further piece begins with the token before it or, where the
    document begins with the token `begin`, with that.
    """
    predicted = max(len(ids) - 1, 0)
    count = max(-(-predicted // (max_length - 1)), 1)
    ends = [1 + predicted * number // count for number in range(count + 1)]
    first = ids[:1] if ids[:1] == [begin] else None
    return [(first or ids[start - 1 : start]) + ids[start:stop] for start, stop in pairwise(ends)]


def table_rows(
    rows: list[Row], encode: Encoder, columns: Sequence[tuple[str, str]], packing: str
) -> tuple[list[TableRow], Counts]:
    """Rows of the table: sequences, and the key of their document; and what the COUNTS of `rows` are.

    Args:
        columns: names for ids and for the length of the prompt, of each text of a row.
    """
    count: Counts = {name: 0 for name in COUNTS}
    table: list[TableRow] = []
    for batch in _batched(rows):
        for row, *sides in zip(batch, *(encode(batch, which) for which in range(len(columns))), strict=True):
            pieces = list(zip(*(side.pieces for side in sides), strict=True))
            size = sides[0].size
            count["documents"] += 1
            count["tokens"] += size
            count["empty"] += not all(text.strip() for text in row.texts)
            # The first token of a document follows nothing; in a block it follows another document.
            if packing == "documents" and not all(len(ids) > max(start, 1) for piece in pieces for ids, start in piece):
                count["unused"] += size
                count["dropped"] += 1
                continue
            count["unused"] += size - len(sides[0].pieces[0][0]) if len(pieces) == 1 else 0
            key: int | None = document_key(row)
            for piece in pieces:
                table.append(dict(zip(chain(*columns), chain(*piece), strict=True)) | {"key": key})
                key = None
    return table, count


def minimum_content(questions: bool, max_length: int) -> str:
    """What a document needs so that the model predicts at least one of its tokens."""
    return f"an answer within {max_length} tokens (data.max_length)" if questions else "two tokens or more"


def _batched(items: Iterable[T], size: int = 1000) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
