"""Rows of text -> token sequences, cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from pipeline.config.sources import Corpus
from pipeline.data.corpus import read
from pipeline.data.encode import FORMAT_VERSION, TokenOptions, Usage, minimum_content
from pipeline.data.stripes import Recipe, stored_table
from pipeline.distributed.bar import Bar
from pipeline.errors import FatalError, InputError, disk_errors
from pipeline.monitoring.console import is_live

log = logging.getLogger(__name__)

COLUMNS = (
    ("input_ids", "prompt"),
    ("preferred_ids", "preferred_prompt"),
)  # ids and prompt length, of each text of a row


@dataclass(frozen=True)
class Sequences:
    """A tokenised corpus: `len()` sequences of token ids, each read from disk when it is indexed."""

    rows: pa.ChunkedArray  # of lists of token ids, one per document, or several where a document is split
    block: int  # 0: each row is a sequence; else the length of the blocks cut from the joined stream
    digest: str  # of the text
    prompts: pa.ChunkedArray | None = None  # the length of the prompt of each row; None: no row has a prompt
    short_block: bool = False  # whether the rest that fills no block is a sequence too, if it predicts anything
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

    def prompt_lengths(self, indices: np.ndarray) -> np.ndarray:
        """[B] int64: tokens at the start of sequences `indices` that have no label, because they are the prompt."""
        if self.prompts is None:
            return np.zeros(len(indices), dtype=np.int64)
        return np.array([self.prompts[int(index)].as_py() for index in indices])

    def num_predicted_tokens(self, indices: np.ndarray) -> np.ndarray:
        """[B] int64: tokens that sequences `indices` predict: all but their prompt, or all but their first token."""
        if self.block:
            return np.minimum(self.block, len(self.stream) - np.asarray(indices) * self.block) - 1
        sizes = np.array([len(self.rows[int(index)].values) for index in indices])
        return sizes - np.maximum(self.prompt_lengths(indices), 1)


def tokenize(
    corpus: Corpus,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenOptions,
    *,
    cache: Path,
    show_progress: bool,
) -> tuple[Sequences, Sequences | None]:
    """The corpus as token sequences, from the cache on disk if text, tokenizer and options are unchanged.

    packing `documents`: with long_documents `truncate`, each document is its first `max_length` ids (see
    `chat.first_tokens`); with `split`, a longer one is several sequences (see `encode.split_document`). A text that
    writes the beginning-of-text token itself gets no second one (see `chat.begun`). Of a question with its answer, the
    first `max_length` ids of the conversation (see `chat.encode_answers`).
    packing `blocks`: documents joined by the end-of-text token, cut into blocks of `max_length`; the rest at the end
    is a shorter block with `split`, and in no sequence with `truncate`.

    The tokenizer does not change: it is exported with the model.

    Returns:
        The sequences; and with a pairing, which needs `documents`, the preferred one for each of them, in the same
        order. A row of which either predicts nothing is in neither.

    Raises:
        InputError: malformed or missing text (with the line), or too little of it. `key` names the corpus.
        FatalError: the disk refuses the cache, or a process that tokenises was killed.
    """
    rows, digest = read(corpus, key, options.pairing)
    questions = corpus.prompt is not None
    check_tokenizer(tokenizer, key, options, questions)
    columns = COLUMNS[: 1 if options.pairing is None else 2]
    recipe = [FORMAT_VERSION, digest, tokenizer_digest(tokenizer), options.packing]
    recipe += [options.max_length, options.splits] if options.packing == "documents" else []
    progress = Bar(rows, title=f"tokenising {key}, document", is_shown=show_progress and is_live())
    try:
        with progress, disk_errors(cache / "tokens"):
            folder = cache / "tokens" / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]
            stored, counts = stored_table(progress, Recipe(tokenizer, options, columns), folder)
    except InputError as error:
        raise InputError(f"data.{key}: {error}") from None
    except BrokenProcessPool as error:
        raise FatalError(
            f"data.{key}: {corpus.path}: a process that tokenises it was killed, as the kernel does where memory is "
            "short. Give the job more memory, or fewer cores (taskset -c 0-3 ...), each of which has such a process; "
            "the tokens that are whole are not made again"
        ) from error
    usage = Usage(**counts)
    if not len(stored):
        needed = f" with {minimum_content(questions, options.max_length)}" if usage.dropped else ""
        raise InputError(f"data.{key}: {corpus.path} holds no text{needed}; add some")
    made = [
        Sequences(
            rows=stored.column(ids),
            block=options.max_length if options.packing == "blocks" else 0,
            digest=digest if ids == "input_ids" else f"{digest}-{ids}",
            prompts=stored.column(prompt) if questions else None,
            short_block=options.splits,
            keys=stored.column("key"),
            usage=usage,
        )
        for ids, prompt in columns
    ]
    if not len(made[0]):
        raise InputError(
            f"data.{key}.path: {corpus.path} has {counted(len(made[0].stream), 'token')}, less than one block of "
            f"{options.max_length}; set a smaller data.max_length, data.packing: documents, or data.long_documents: "
            "split"
        )
    return made[0], made[1] if options.pairing is not None else None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, key: str, options: TokenOptions, questions: bool) -> None:
    """Raises:
    InputError: the packing, or an answer, needs an end-of-text token, and the tokenizer has none.
    """
    assert options.packing == "documents" or not (questions or options.pairing), "the configuration refuses this"
    if options.packing == "blocks" and tokenizer.eos_token_id is None:
        raise InputError(
            f"data.packing: blocks needs an end-of-text token, and the tokenizer of {key} has none; set documents"
        )
    if questions and tokenizer.chat_template is None and tokenizer.eos_token_id is None:
        raise InputError(
            f"data.{key}: an answer must end, and the tokenizer has no end-of-text token or chat template; set one"
        )


def num_shared(one: Sequences, other: Sequences) -> int:
    """How many documents of `one` are in `other` too, but for case, white space and Unicode's forms of a character."""
    mine, theirs = one.keys, other.keys
    assert mine is not None and theirs is not None
    return int(np.isin(mine.drop_null().to_numpy(), theirs.drop_null().to_numpy()).sum())


def counted(number: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def log_usage(key: str, sequences: Sequences, max_length: int, truncates: bool) -> None:
    """Log how much of a corpus is in sequences, and how much is unused or empty.

    Args:
        truncates: whether tokens are unused that `data.long_documents: split` would use.
    """
    usage, questions = sequences.usage, sequences.prompts is not None
    assert usage is not None
    unused = usage.unused
    if sequences.block:  # and the rest that fills no block
        unused += max(len(sequences.stream) - len(sequences) * sequences.block, 0)
    share = 1000 * (usage.tokens - unused) // usage.tokens / 10  # rounded down: 100 only if all are used
    log.info(
        "data.%s: %.4g %% of the tokens of %s are used, in %s of at most %d tokens%s",
        *(key, share, counted(usage.documents, "document"), counted(len(sequences), "sequence"), max_length),
        "; data.long_documents: split uses the others" if truncates and unused else "",
    )
    if usage.dropped:
        needed = minimum_content(questions, max_length)
        log.warning("data.%s: the run cannot use %s without %s", key, counted(usage.dropped, "document"), needed)
    if usage.empty and questions:
        empty = counted(usage.empty, "empty answer")
        log.warning("data.%s contains %s, of which only the end is predicted", key, empty)
    elif usage.empty and sequences.block:
        log.warning("data.%s contains %s", key, counted(usage.empty, "empty document"))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what the tokenizer does to text, wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # the last call set it
        state.pop("padding", None)
    else:
        state = [sorted(tokenizer.get_vocab().items()), repr(tokenizer)]
    added = tokenizer.eos_token_id  # by packing; a chat version's may differ from its base's
    chat = [tokenizer.chat_template, tokenizer.special_tokens_map]  # templates write these tokens
    return hashlib.sha256(json.dumps([state, added, chat], sort_keys=True, default=str).encode()).hexdigest()
