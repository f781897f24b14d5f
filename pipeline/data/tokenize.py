"""Text -> token sequences -> the forget and retain batch of a given step.

A batch is a pure function of (seed, task, step, rank): resuming needs a step number, and the global batch of a step is
the same set of sequences for any number of ranks and any micro-batch size.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import Corpus
from pipeline.data.corpus import Pairing, read
from pipeline.data.encode import COUNTS, FORM, Usage, encoder, table_rows, wanted
from pipeline.errors import InputError, disk_errors
from pipeline.monitoring.console import is_live

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sequences:
    """A tokenised corpus: `len()` sequences of token ids, read from disk as they are asked for."""

    rows: pa.ChunkedArray  # of lists of token ids, one per document, or several where a document is split
    block: int  # 0: each row is a sequence; else the length of the blocks cut from the joined stream
    digest: str  # of the text
    prompts: pa.ChunkedArray | None = None  # how many tokens each row begins with that are given; None: predict all
    short_block: bool = False  # whether what fills no block is a sequence too, if it predicts anything
    keys: pa.ChunkedArray | None = None  # int64 per row, equal for equal documents; null but for a document's first row
    usage: Usage | None = None

    @cached_property
    def stream(self) -> pa.ChunkedArray:
        """All documents end to end (no copy)."""
        return pa.chunked_array([chunk.flatten() for chunk in self.rows.chunks])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        if self.block:
            return min(self.block, len(self.stream))
        return pc.max(pc.list_value_length(self.rows)).as_py()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(pc.max(column).as_py() for column in self.stream.chunks if len(column))  # pyright: ignore[reportAttributeAccessIssue]

    def __len__(self) -> int:
        if not self.block:
            return len(self.rows)
        full, rest = divmod(len(self.stream), self.block)
        return full + (self.short_block and rest > 1)

    def __getitem__(self, index: int) -> np.ndarray:
        """[T] token ids of sequence `index`."""
        if self.block:
            return self.stream.slice(index * self.block, self.block).to_numpy()
        return np.asarray(self.rows[index].values)

    def given(self, indices: np.ndarray) -> np.ndarray:
        """[B] int64: tokens at the start of sequences `indices` that carry no label (their prompts)."""
        if self.prompts is None:
            return np.zeros(len(indices), dtype=np.int64)
        return np.array([self.prompts[int(index)].as_py() for index in indices])

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """[B] int64: tokens that sequences `indices` predict: all but their prompt, or but their first token."""
        if self.block:
            return np.minimum(self.block, len(self.stream) - np.asarray(indices) * self.block) - 1
        sizes = np.array([len(self.rows[int(index)].values) for index in indices])
        return sizes - np.maximum(self.given(indices), 1)


def tokenize(
    corpus: Corpus,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packing: str,
    cache: Path,
    show_progress: bool,
    pairing: Pairing | None = None,
    long_documents: str = "split",
) -> tuple[Sequences, Sequences | None]:
    """The corpus as token sequences, from the cache on disk if text, tokenizer and packing are unchanged.

    packing `documents`: with long_documents `truncate`, each document is `tokenizer(text, truncation=True,
    max_length=max_length).input_ids`; with `split`, a longer one is several sequences (see `encode.split_document`).
    Of a question with its answer, the first `max_length` ids of the conversation (see `chat.encode_answers`).
    packing `blocks`: documents joined by the end-of-text token, cut into blocks of `max_length`; what is left at the
    end is a shorter block with `split`, and in no sequence with `truncate`.

    The tokenizer stays as it is: it is exported with the model.

    Returns:
        The sequences; and with `pairing`, which needs `documents`, what to prefer to each of them, in the same order.
        A row of which either predicts nothing is in neither.

    Raises:
        InputError: malformed or missing text (with the line), or too little of it. `key` names the corpus.
        ranks.Failure: the disk does not take it.
    """
    rows, digest = read(corpus, key, pairing)
    questions = corpus.prompt is not None
    assert packing == "documents" or not (questions or pairing), "refused by the configuration"
    if packing == "blocks" and tokenizer.eos_token_id is None:
        raise InputError(f"data.packing: blocks needs an end-of-text token, and the tokenizer of {key} has none")
    if questions and tokenizer.chat_template is None and tokenizer.eos_token_id is None:
        raise InputError(f"data.{key}: an answer must end, and the tokenizer has no end-of-text token or chat template")
    columns = [("input_ids", "prompt"), ("preferred_ids", "preferred_prompt")][: 1 if pairing is None else 2]
    split = long_documents == "split" and pairing is None

    def tokens() -> Iterator[dict[str, Any]]:
        progress = tqdm(rows, f"tokenising {key}", disable=not (show_progress and is_live()), unit=" documents")
        encode = encoder(tokenizer, max_length=max_length, packing=packing, split=split)
        return table_rows(progress, encode, columns, packing, (corpus.path, wanted(questions, max_length)))

    recipe = [FORM, digest, tokenizer_digest(tokenizer), packing]
    recipe += [max_length, split] if packing == "documents" else []
    features = {name: datasets.List(datasets.Value("int32")) for name, _ in columns}
    features |= {name: datasets.Value("int32") for _, name in columns}
    features |= {name: datasets.Value("int64") for name in ("key", *COUNTS)}
    try:
        with disk_errors(cache / "tokens"):
            table = datasets.Dataset.from_generator(
                tokens,
                features=datasets.Features(features),
                cache_dir=str(cache / "tokens"),
                fingerprint=hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32],
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise InputError(f"data.{key}: {error.__cause__}") from None
        raise
    made = [
        Sequences(
            table.data.column(ids),
            max_length if packing == "blocks" else 0,
            digest if ids == "input_ids" else f"{digest}-{ids}",
            table.data.column(prompt) if questions else None,
            short_block=split,
            keys=table.data.column("key"),
            usage=Usage(*(pc.sum(table.data.column(name)).as_py() for name in COUNTS)),  # pyright: ignore
        )
        for ids, prompt in columns
    ]
    sequences, preferred = made[0], made[1] if pairing is not None else None
    if not len(sequences):
        raise InputError(
            f"data.{key}.path: {corpus.path} holds {len(sequences.stream)} tokens, less than one block of "
            f"{max_length}; set a smaller data.max_length, data.packing: documents or data.long_documents: split"
        )
    return sequences, preferred


def num_shared(one: Sequences, other: Sequences) -> int:
    """How many documents of `one` are in `other` too, but for case, white space and Unicode's forms of a character."""
    mine, theirs = one.keys, other.keys
    assert mine is not None and theirs is not None
    return int(np.isin(mine.drop_null().to_numpy(), theirs.drop_null().to_numpy()).sum())


def say_usage(key: str, sequences: Sequences, max_length: int, truncates: bool) -> None:
    """Log how much of a corpus is in sequences, and what is left out or empty.

    Args:
        truncates: whether documents or a stream are cut off that `data.long_documents: split` would use whole.
    """
    usage, questions = sequences.usage, sequences.prompts is not None
    assert usage is not None
    unused = usage.unused
    if sequences.block:  # and the rest that fills none
        unused += max(len(sequences.stream) - len(sequences) * sequences.block, 0)
    share = 1000 * (usage.tokens - unused) // usage.tokens / 10  # 100 only where it is all of them
    log.info(
        "data.%s: %.4g %% of the tokens of %d documents are used, in %d sequences of at most %d tokens%s",
        *(key, share, usage.documents, len(sequences), max_length),
        "; data.long_documents: split uses the others" if truncates and unused else "",
    )
    if usage.dropped:
        log.warning("%s: %d documents without %s are left out", key, usage.dropped, wanted(questions, max_length))
    if usage.empty and (questions or sequences.block):
        what = "answers are empty: only their ends are predicted" if questions else "documents are empty"
        log.warning("%s: %d %s", key, usage.empty, what)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what the tokenizer does to text, not of where it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # set by the last call
        state.pop("padding", None)
    else:
        state = [sorted(tokenizer.get_vocab().items()), repr(tokenizer)]
    added = tokenizer.eos_token_id  # by packing; a chat version's may differ from its base's
    chat = [tokenizer.chat_template, tokenizer.special_tokens_map]  # templates write these tokens
    return hashlib.sha256(json.dumps([state, added, chat], sort_keys=True, default=str).encode()).hexdigest()
