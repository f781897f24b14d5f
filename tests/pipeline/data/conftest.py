"""`tokenize` with the arguments that most tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config.schema import Corpus
from pipeline.data.encode import TokenOptions
from pipeline.data.tokenize import Sequences, tokenize
from tests.conftest import World
from tests.pipeline.data.corpora import (
    QA,
    ROWS,
    words,
)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(world.folder / "model")


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Sequences]:
    """`tokenize` with the arguments that most tests share."""

    def read(path: Path, field: str = "text", split: str = "train", **changed: Any) -> Sequences:
        cache, chosen = changed.pop("cache", tmp_path / "cache"), changed.pop("tokenizer", tokenizer)
        options: Any = {"max_length": 12, "packing": "documents", "long_documents": "truncate", **changed}
        where: Any = {"path": str(path), "field": field, "split": split}
        corpus = Corpus(**where)
        return tokenize(corpus, "forget", chosen, TokenOptions(**options), cache=cache, show_progress=False)[0]

    return read


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., tuple[Sequences, Sequences | None]]:
    """`tokenize` of `rows` (a list, or a path) with the columns of `ROWS`, unless `keys` of the corpus differ."""

    def ask(rows: Any = ROWS, pairing: Any = None, **keys: Any) -> tuple[Sequences, Sequences | None]:
        path = rows
        if not isinstance(rows, str | Path):
            path = tmp_path / "questions.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cache, tokenizer = keys.pop("cache", tmp_path / "cache"), keys.pop("tokenizer", None) or words()
        options = TokenOptions(keys.pop("max_length", 50), "documents", pairing=pairing)
        corpus = Corpus(path=str(path), **{**QA, **keys})
        return tokenize(corpus, "forget", tokenizer, options, cache=cache, show_progress=False)

    return ask
