"""Rows of text -> rows of the file of token sequences, with what is counted on the way."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import encode_answers, ended
from pipeline.data.corpus import Row, normalised
from pipeline.errors import InputError

T = TypeVar("T")


FORM = 2  # of the file; to be counted up whenever the same text becomes other tokens or columns


COUNTS = ("documents", "tokens", "unused", "dropped", "empty")


@dataclass(frozen=True)
class Usage:
    """What became of a corpus."""

    documents: int
    tokens: int  # of all documents
    unused: int  # of those tokens, in no row of the file
    dropped: int  # documents of which nothing would be predicted
    empty: int  # documents with an empty text or answer


class Encoded(NamedTuple):
    """A document as sequences, each with the number of tokens it begins with that are given; and all of its tokens."""

    pieces: list[tuple[list[int], int]]
    size: int


Encoder = Callable[[list[Row], int], list[Encoded]]  # text `which` of each of some rows


def encoder(tokenizer: PreTrainedTokenizerBase, *, max_length: int, packing: str, split: bool) -> Encoder:
    """What makes sequences of rows; see `data.tokenize`. The tokenizer stays as it is."""
    tokenizer = copy.deepcopy(tokenizer)  # a call with truncation leaves it in the state that is saved with a model
    end: Any = tokenizer.eos_token_id

    def encode(batch: list[Row], which: int) -> list[Encoded]:
        texts = [row.texts[which] for row in batch]
        if batch[0].prompt is not None:
            answers = encode_answers(tokenizer, [str(row.prompt) for row in batch], texts)
            return [Encoded([(ids[:max_length], start)], len(ids)) for ids, start in answers]
        whole: list[list[int]] = tokenizer(texts, verbose=False).input_ids
        if packing == "blocks":
            return [Encoded([(ids, 0)], len(ids)) for ids in (ended(ids, end) for ids in whole)]
        if split:
            parts = (split_document(ids, max_length, tokenizer.bos_token_id) for ids in whole)
            return [Encoded([(part, 0) for part in some], len(ids)) for some, ids in zip(parts, whole, strict=True)]
        long = [number for number, ids in enumerate(whole) if len(ids) > max_length]
        cut: dict[int, list[int]] = {}
        if long:  # by the tokenizer, which may keep tokens of its own at the end
            shorter = tokenizer([texts[number] for number in long], truncation=True, max_length=max_length)
            cut = dict(zip(long, shorter.input_ids, strict=True))
        return [Encoded([(cut.get(at, ids), 0)], len(ids)) for at, ids in enumerate(whole)]

    return encode


def split_document(ids: list[int], max_length: int, begin: Any) -> list[list[int]]:
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
    rows: Iterable[Row], encode: Encoder, columns: list[tuple[str, str]], packing: str, source: tuple[str, str]
) -> Iterator[dict[str, Any]]:
    """The rows of the file: sequences, the key of their document, and the COUNTS since the row before.

    Args:
        columns: names for ids and for the number of given tokens, of each text of a row.
        source: the path of the corpus and what its documents need, for the message.

    Raises:
        InputError: nothing would be predicted.
    """
    count = dict.fromkeys(COUNTS, 0)
    last: dict[str, Any] | None = None  # waits: what is left out behind it is counted with it
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
            key: int | None = _key(row)
            for piece in pieces:
                if last is not None:
                    yield last
                last = dict(zip(chain(*columns), chain(*piece), strict=True)) | {"key": key, **count}
                key, count = None, dict.fromkeys(COUNTS, 0)
    if last is None:
        path, needed = source
        raise InputError(f"{path} holds no text" + (f" with {needed}" if count["dropped"] else ""))
    yield last | {name: last[name] + number for name, number in count.items()}


def wanted(questions: bool, max_length: int) -> str:
    """What a document needs so that something of it is predicted."""
    return f"an answer within {max_length} tokens (data.max_length)" if questions else "two tokens or more"


def _key(row: Row) -> int:
    """Equal for rows whose question and text are duplicates; 64 bits, signed."""
    texts = json.dumps([normalised(text) for text in (row.prompt or "", row.texts[0])])
    return int.from_bytes(hashlib.blake2b(texts.encode(), digest_size=8).digest(), "big", signed=True)


def _batched(items: Iterable[T], size: int = 1000) -> Iterator[list[T]]:
    walk = iter(items)
    while batch := list(islice(walk, size)):
        yield batch
