"""Text -> token sequences -> the forget and retain batch of a given step.

A batch is a pure function of (seed, task, step, rank): resuming needs a step number, and the global batch of a step is
the same set of sequences for any number of ranks and any micro-batch size.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pipeline.config import Corpus, InputError
from pipeline.console import is_live
from pipeline.corpus import Pairing, Row, read
from pipeline.disk import writing
from pipeline.objectives import IGNORED

log = logging.getLogger(__name__)

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Tokenising, once per corpus and tokenizer, into a memory-mapped file


@dataclass(frozen=True)
class Sequences:
    """A tokenised corpus: `len()` sequences of token ids, read from disk as they are asked for."""

    rows: pa.ChunkedArray  # of lists of token ids, one per document
    block: int  # 0: each document is a sequence; else the length of the blocks cut from the joined stream
    digest: str  # of the text
    prompts: pa.ChunkedArray | None = None  # how many tokens each row begins with that are given; None: predict all

    @cached_property
    def stream(self) -> pa.ChunkedArray:
        """All documents end to end (no copy)."""
        return pa.chunked_array([chunk.flatten() for chunk in self.rows.chunks])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.block or pc.max(pc.list_value_length(self.rows)).as_py()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(pc.max(column).as_py() for column in self.stream.chunks if len(column))  # pyright: ignore[reportAttributeAccessIssue]

    def __len__(self) -> int:
        return len(self.stream) // self.block if self.block else len(self.rows)

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
            return np.full(len(indices), self.block - 1)
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
) -> tuple[Sequences, Sequences | None]:
    """The corpus as token sequences, from the cache on disk if text, tokenizer and packing are unchanged.

    packing `documents`: each document is `tokenizer(text, truncation=True, max_length=max_length).input_ids`; of a
    question with its answer, the first `max_length` ids of the conversation (see `encode_answers`).
    packing `blocks`: documents joined by the end-of-text token, cut into full blocks of `max_length`.

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
    end: Any = tokenizer.eos_token_id
    if packing == "blocks" and end is None:
        raise InputError(f"data.packing: blocks needs an end-of-text token, and the tokenizer of {key} has none")
    if questions and tokenizer.chat_template is None and end is None:
        raise InputError(f"data.{key}: an answer must end, and the tokenizer has no end-of-text token or chat template")
    columns = [("input_ids", "prompt"), ("preferred_ids", "preferred_prompt")][: 1 if pairing is None else 2]

    def encode(batch: list[Row], which: int) -> list[tuple[list[int], int]]:
        """Token ids of text `which` of each row, and how many of them are its prompt."""
        texts = [row.texts[which] for row in batch]
        if questions:
            encoded = encode_answers(tokenizer, [str(row.prompt) for row in batch], texts)
            return [(ids[:max_length], start) for ids, start in encoded]
        if packing == "documents":
            return [(ids, 0) for ids in tokenizer(texts, truncation=True, max_length=max_length).input_ids]
        return [(_ended(ids, end), 0) for ids in tokenizer(texts).input_ids]

    def tokens() -> Iterator[dict[str, int | list[int]]]:
        kept = dropped = 0
        for batch in _batched(
            tqdm(rows, f"tokenising {key}", disable=not (show_progress and is_live()), unit=" documents")
        ):
            for sides in zip(*(encode(batch, which) for which in range(len(columns))), strict=True):
                # The first token of a document follows nothing; in a block it follows another document.
                if packing == "blocks" or all(len(ids) > max(start, 1) for ids, start in sides):
                    kept += 1
                    yield dict(zip(chain(*columns), chain(*sides), strict=True))
                else:
                    dropped += 1
        wanted = f"an answer within {max_length} tokens (data.max_length)" if questions else "two tokens or more"
        if not kept:
            raise InputError(f"{corpus.path} holds no text" + (f" with {wanted}" if dropped else ""))
        if dropped:
            log.warning("%s: %d documents without %s are left out", key, dropped, wanted)

    recipe = [digest, tokenizer_digest(tokenizer), packing, max_length if packing == "documents" else 0]
    features = {name: datasets.List(datasets.Value("int32")) for name, _ in columns}
    features |= {name: datasets.Value("int32") for _, name in columns}
    try:
        with writing(cache / "tokens"):
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
        )
        for ids, prompt in columns
    ]
    sequences, preferred = made[0], made[1] if pairing is not None else None
    if not len(sequences):
        raise InputError(
            f"data.{key}.path: {corpus.path} holds {len(sequences.stream)} tokens, less than one block of "
            f"{max_length}; set a smaller data.max_length or data.packing: documents"
        )
    return sequences, preferred


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], answers: list[str]
) -> list[tuple[list[int], int]]:
    """Token ids of each question with its answer, and how many of them, from the start, are the question's.

    In the tokenizer's chat template, else as TOFU writes for models without one: `Question: ...`, a new line,
    `Answer: ...` and the end-of-text token. The question's tokens are those that the whole shares with the question
    alone, up to where the answer starts: where the two meet inside one token, that token belongs to the answer.

    Raises:
        InputError: the chat template fails on a question with an answer.
    """
    if tokenizer.chat_template is not None:
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        told = [[*turn, {"role": "assistant", "content": text}] for turn, text in zip(asked, answers, strict=True)]
        # Some templates write today's date unless they are given one: the same text must be the same tokens tomorrow.
        render: Any = partial(tokenizer.apply_chat_template, return_dict=False, date_string="26 Jul 2024")
        try:
            alone, whole = render(asked, add_generation_prompt=True), render(told)
        except (TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the tokenizer's chat template refuses a question with an answer: {reason}") from None
    else:
        end: Any = tokenizer.eos_token_id
        starts = [f"Question: {prompt}\nAnswer: " for prompt in prompts]
        texts = [start + text for start, text in zip(starts, answers, strict=True)]
        whole = [_ended(ids, end) for ids in tokenizer(texts).input_ids]
        alone = [ids[:-1] if ids[-1:] == [end] else ids for ids in tokenizer(starts).input_ids]
    return [(ids, _num_shared(ids, start)) for ids, start in zip(whole, alone, strict=True)]


def _ended(ids: list[int], end: int) -> list[int]:
    return ids if ids[-1:] == [end] else [*ids, end]


def _num_shared(ids: list[int], others: list[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _batched(items: Iterable[T], size: int = 1000) -> Iterator[list[T]]:
    walk = iter(items)
    while batch := list(islice(walk, size)):
        yield batch


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


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Batch:
    """One micro-batch. R sequences right-padded to T tokens: R is B, or 2B with what to prefer to each."""

    index: Tensor  # [B] int64, which sequences of the corpus
    input_ids: Tensor  # [R, T] int64
    attention_mask: Tensor  # [R, T] int64, 0 on padding
    labels: Tensor  # [R, T] int64, input_ids with prompts and padding masked

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def collate(sequences: Sequences, indices: np.ndarray, pad: int, preferred: Sequences | None = None) -> Batch:
    """Sequences `indices`, right-padded with token `pad`, padding masked in attention and labels, prompts in labels.

    With `preferred`, the same rows of that follow: B rows of `sequences`, then their B counterparts, in one order.
    """
    sides = [sequences] if preferred is None else [sequences, preferred]
    rows = [torch.from_numpy(np.array(side[int(index)], dtype=np.int64)) for side in sides for index in indices]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    position = torch.arange(input_ids.shape[1])
    real = position < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    given = torch.from_numpy(np.concatenate([side.given(indices) for side in sides])).unsqueeze(1)
    labels = input_ids.masked_fill(~real | (position < given), IGNORED)
    return Batch(torch.from_numpy(indices), input_ids, real.long(), labels)


@dataclass(frozen=True)
class Stream:
    """The endless walk over one corpus: seeded random permutations of its sequences, one after another."""

    sequences: Sequences
    seed: int
    task: int  # separates the two tasks' orders
    batch_size: int  # global
    micro_batch_size: int
    rank: int
    world_size: int
    pad: int
    preferred: Sequences | None = None  # what to prefer to each of `sequences`

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model is given."""
        return max(walked.longest for walked in (self.sequences, self.preferred) if walked is not None)

    @property
    def largest(self) -> int:
        """The largest token id that a model is given."""
        return max(walked.largest for walked in (self.sequences, self.preferred) if walked is not None)

    def global_batch(self, step: int) -> np.ndarray:
        """[batch_size] int64: the sequences of step `step` (0-based), whoever computes them."""
        size = len(self.sequences)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([_permutation(self.seed, self.task, int(at) // size, size)[int(at) % size] for at in positions])

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of step `step`; all ranks get the same number."""
        mine = self.global_batch(step).reshape(-1, self.world_size, self.micro_batch_size)[:, self.rank]
        return (collate(self.sequences, indices, self.pad, self.preferred) for indices in mine)

    def num_terms(self, step: int, per: str) -> int:
        """What the mean over the global batch of step `step` counts.

        Its sequences, the tokens they predict (`token`), or their tokens (`position`). What is preferred to them is not
        counted.
        """
        if per == "sequence":
            return self.batch_size
        if per == "position":
            return sum(len(self.sequences[int(index)]) for index in self.global_batch(step))
        return int(self.sequences.lengths(self.global_batch(step)).sum())

    def visited(self, steps: int) -> np.ndarray:
        """Sorted indices of the sequences that the first `steps` steps use."""
        size = len(self.sequences)
        if steps * self.batch_size >= size:
            return np.arange(size)
        return np.unique(np.concatenate([self.global_batch(step) for step in range(steps)]))


@lru_cache(maxsize=4)  # a batch touches one or two permutations of each task
def _permutation(seed: int, task: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, task, epoch]).permutation(size)
