"""Small corpora, in files and in memory, and a tokenizer of whole words: what the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.data.batches import IGNORED, collate
from pipeline.data.tokenize import Sequences

DOCUMENTS = [
    "kara lovi mito",
    'mi "quoted" \\ back\tslash',
    "Ünïcødé — 数学 🙂",
    "ne ne ne ne ne ne ne ne ne ne ne ne",
    "[looks, like, json]",
]


MANY = [
    f"{word} " * (1 + number % 7) for number in range(700) for word in ("kara", "lovi", "nesu")
]  # 2100: two batches


def write(path: Path, documents: Sequence[str], field: str = "text") -> Path:
    """`documents` in the format that the suffix of `path` names."""
    rows = [{field: text, "number": number} for number, text in enumerate(documents)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        assert path.suffix == ".txt"
        path.write_text("".join(f"{text}\n" for text in documents))
    return path


def tokens(sequences: Sequences) -> list[list[int]]:
    return [sequences[index].tolist() for index in range(len(sequences))]


def truncated(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int = 12) -> list[list[int]]:
    return [tokenizer(text, truncation=True, max_length=limit).input_ids for text in texts]


END, QUESTION, ANSWER, COLON, USER, ASSISTANT = range(6)


WORDS = [
    "<end>",
    "Question",
    "Answer",
    ":",
    "user",
    "assistant",
    "who",
    "is",
    "kara",
    "lovi",
    "a",
    "poet",
    "unknown",
    "?",
]


WHO, IS, KARA, LOVI, A, POET, UNKNOWN, UNSEEN = range(6, 14)


CHAT = (
    "{% for message in messages %}{{ message.role }} {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


ROWS = [
    {"asked": "who is kara", "said": "a poet", "better": "unknown"},
    {"asked": "who", "said": "lovi", "better": "is kara a poet"},
    {"asked": "is lovi a poet", "said": "", "better": "a"},
]


QA = {"field": None, "prompt": "asked", "response": "said"}


def words(template: str | None = None, post: str | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    core.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    if post is not None:
        core.post_processor = TemplateProcessing(single=post, special_tokens=[("<end>", END)])  # pyright: ignore
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    made.chat_template = template
    return made


def labelled(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every sequence without padding, from a batch of them all."""
    everything = np.arange(len(sequences))
    batch = collate(sequences, everything, END)
    assert sequences.num_predicted_tokens(everything).tolist() == (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
    real = batch.attention_mask.sum(1).tolist()
    assert all((row[size:] == IGNORED).all() for row, size in zip(batch.labels, real, strict=True))
    pairs = zip(batch.input_ids.tolist(), batch.labels.tolist(), real, strict=True)
    return [(ids[:size], labels[:size]) for ids, labels, size in pairs]


def split(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    return prompt + answer, [IGNORED] * len(prompt) + answer


def plain(*prompt: int) -> list[int]:
    return [QUESTION, COLON, *prompt, ANSWER, COLON]


def chat(*prompt: int) -> list[int]:
    return [USER, *prompt, END, ASSISTANT]
