"""Text -> token sequences -> batches: against the tokenizer itself, and by what a walk without replacement promises."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config.load import resolve
from pipeline.config.schema import Corpus
from pipeline.data.batches import IGNORED, BatchSampler, collate
from pipeline.data.chat import encode_answers, openings
from pipeline.data.encode import TokenOptions
from pipeline.data.tokenize import Sequences, log_usage, num_shared, tokenize, tokenizer_digest
from pipeline.errors import InputError
from pipeline.losses.task import open_sampler, warn_of_overlap
from tests.conftest import World

DOCUMENTS = [
    "kara lovi mito",
    'mi "quoted" \\ back\tslash',
    "Ünïcødé — 数学 🙂",
    "ne ne ne ne ne ne ne ne ne ne ne ne",
    "[looks, like, json]",
]


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(world.folder / "model")


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Sequences]:
    """`tokenize` with the arguments that most tests share."""

    def read(path: Path, field: str = "text", split: str = "train", **changed: Any) -> Sequences:
        cache, chosen = changed.pop("cache", tmp_path / "cache"), changed.pop("tokenizer", tokenizer)
        options: Any = {"max_length": 12, "packing": "documents", "long_documents": "truncate", **changed}
        corpus = Corpus(**{"path": str(path), "field": field, "split": split})
        return tokenize(corpus, "forget", chosen, TokenOptions(**options), cache=cache, show_progress=False)[0]

    return read


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


# ---------------------------------------------------------------------------------------------------------------------
# Readers


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
def test_every_format_gives_the_same_documents(
    suffix: str, read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert tokens(read(write(tmp_path / f"corpus{suffix}", DOCUMENTS))) == truncated(tokenizer, DOCUMENTS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_field_is_the_one_that_was_asked_for(
    suffix: str, read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / f"corpus{suffix}", DOCUMENTS, field="body")
    assert tokens(read(path, "body")) == truncated(tokenizer, DOCUMENTS)


def test_blank_lines_are_not_documents(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n\n" + "\n  \n".join(lines) + "\n\t\n\n")
    (tmp_path / "b.jsonl").write_bytes("\r\n".join(lines).encode())  # and no end of line after the last
    (tmp_path / "c.txt").write_text("\n\n" + "\n \n".join(DOCUMENTS) + "\n\n")
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        assert tokens(read(tmp_path / name)) == truncated(tokenizer, DOCUMENTS), name


def test_a_json_file_may_hold_json_lines(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS).rename(tmp_path / "corpus.json")
    assert tokens(read(path)) == truncated(tokenizer, DOCUMENTS)


def test_an_array_may_start_after_white_space(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text("\n\n   " + json.dumps([{"text": text} for text in DOCUMENTS]))
    assert tokens(read(path)) == truncated(tokenizer, DOCUMENTS)


def test_bytes_that_every_editor_writes_are_read(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A byte-order mark, the three line ends, endings in capitals, and what gzip made of them."""
    plain, mark = ["kara lovi", "mito vi", "ne ne"], "\ufeff"
    rows = [json.dumps({"text": text}) for text in plain]
    files: dict[str, str] = {}
    for number, end in enumerate(("\n", "\r", "\r\n")):
        files |= {f"{number}.txt": mark + end.join(plain), f"{number}.jsonl": mark + end.join(rows) + end}
        files |= {f"{number}.csv": end.join([mark + "id,text", *(f"{text[:1]},{text}" for text in plain)])}
        files |= {f"{number}.tsv": end.join(["text\tid", *(f"{text}\t7" for text in plain)]) + end}
    files |= {"array.json": mark + f"[{','.join(rows)}]", "up.JSONL": files["0.jsonl"], "up.TXT": files["2.txt"]}
    files |= {"up.Csv": files["1.csv"], "up.JSON": "[" + ",".join(rows) + "]"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert tokens(read(path)) == truncated(tokenizer, plain), path.name


def test_a_cell_is_text_as_it_stands(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Commas, quotes and ends of lines between quotes; digits and NA are no numbers; a cell may be of any length."""
    texts = ["kara, lovi", 'mi "quoted" to', "two\nlines", "lone\rreturn", "007", "NA", "ka " * 60_000]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_MINIMAL).writerows([["n", "text"], *([k, t] for k, t in enumerate(texts))])
    assert tokens(read(tmp_path / "a.csv")) == truncated(tokenizer, texts)


@pytest.mark.parametrize("divided", [False, True])
def test_a_folder_of_save_to_disk_is_a_corpus(
    divided: bool, read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def save(name: str, texts: list[str]) -> Path:
        rows = datasets.Dataset.from_list([{"text": text, "n": n} for n, text in enumerate(texts)])
        saved: Any = datasets.DatasetDict({"test": rows.select([0]), "train": rows}) if divided else rows
        saved.save_to_disk(tmp_path / name, **({} if divided else {"num_shards": 2}))
        return tmp_path / name

    first, again, other = save("one", DOCUMENTS), save("two", DOCUMENTS), save("three", DOCUMENTS[::-1])
    assert tokens(read(first)) == truncated(tokenizer, DOCUMENTS)
    assert tokens(read(other)) == truncated(tokenizer, DOCUMENTS[::-1])
    assert read(again).digest == read(first).digest != read(other).digest
    with pytest.raises(InputError, match=r"data\.forget\.field: .*one has no 'body'; it has text, n"):
        read(first, "body")
    if divided:
        with pytest.raises(InputError, match=r"data\.forget\.split: .*one has no 'dev'; it has test, train"):
            read(first, split="dev")
        assert tokens(read(first, split="test")) == truncated(tokenizer, DOCUMENTS[:1])
    for file in first.rglob("*.arrow"):
        file.write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"data\.forget\.path: .*one is no whole folder of save_to_disk"):
        read(first)


GOOD = '{"text": "kara lovi"}\n'
BAD_FILES: dict[str, tuple[str, str | bytes, list[str]]] = {  # suffix, content, what the message must hold
    "malformed": (".jsonl", GOOD + "\n" + GOOD + '{"text": "ka\n' + GOOD, ["line 4", "not valid JSON"]),
    "two objects": (".jsonl", GOOD + GOOD.strip() * 2 + "\n", ["line 2", "not valid JSON"]),
    "cut short": (".jsonl", GOOD * 2 + GOOD[:9], ["line 3", "not valid JSON"]),
    "no object": (".jsonl", GOOD + '["kara"]\n', ["line 2", "'text'", "list"]),
    "a bare string": (".jsonl", GOOD * 5 + '"kara"\n', ["line 6", "'text'", "str"]),
    "field missing": (".jsonl", GOOD + '{"txt": "a", "id": 1}\n', ["line 2", "'text'", "'txt'", "'id'"]),
    "empty object": (".jsonl", GOOD * 2 + "{}\n", ["line 3", "'text'"]),
    "number": (".jsonl", GOOD + '{"text": 7}\n', ["line 2", "'text'", "int"]),
    "null": (".jsonl", GOOD + '{"text": null}\n', ["line 2", "'text'", "NoneType"]),
    "list": (".jsonl", GOOD + '{"text": ["a"]}\n', ["line 2", "'text'", "list"]),
    "lines in .json": (".json", GOOD + GOOD + "{oops\n", ["line 3", "not valid JSON"]),
    "array malformed": (".json", '[\n {"text": "a"},\n {"text" "b"}\n]', ["line 3", "not valid JSON"]),
    "array not closed": (".json", '[\n {"text": "a b"}\n', ["line ", "not valid JSON"]),
    "array element": (".json", json.dumps([{"text": "ka"}, {"text": "b"}, 3]), ["element 3", "'text'", "int"]),
    "array field": (".json", json.dumps([{"text": "ka"}, {"t": "b"}]), ["element 2", "'text'", "'t'"]),
    "no parquet": (".parquet", b"PAR1 but not really", ["not a readable Parquet file"]),
    "not utf-8": (".jsonl", b'{"text": "caf\xe9"}\n', ["UTF-8", "line 1", "byte 14"]),
    "not utf-8 text": (".txt", b"kara\ncaf\xe9\n", ["UTF-8", "line 2", "byte 4"]),
    "not utf-8, far in": (".txt", b"a" * 20_000 + b"\ncaf\xe9\n", ["UTF-8", "line 2", "byte 4"]),
    "half a character": (".jsonl", GOOD + '{"text": "\\ud800 kara"}\n', ["line 2", "'text'"]),  # JSON allows it
    "no gzip": (".jsonl.gz", GOOD, ["cannot read", "gzip"]),
    "gzip cut short": (".txt.gz", gzip.compress(b"kara lovi " * 99)[:-12], ["cannot read", "ended"]),
    "csv too wide": (".csv", "text,id\nka ra,1\nka, ra,2\n", ["line 3", "3 cells", "2 columns", "quotes"]),
    "csv not closed": (".csv", 'text\n"ka ra\n', ["line 2", "not valid CSV"]),
    "csv without": (".tsv", "txt\tid\nka ra\t1\n", ["line 2", "no field 'text'", "'txt', 'id'"]),
    "csv twice": (".csv", "text,text\nka,ra\n", ["line 1", "one name"]),
    "only names": (".csv", "text,id\n", ["no text"]),
    "empty": (".jsonl", "", ["no text"]),
    "blank": (".jsonl", "\n \n\n", ["no text"]),
    "empty array": (".json", "[]", ["no text"]),
    "empty json": (".json", "", ["no text"]),
    "empty text": (".txt", "", ["no text"]),
    "only empty strings": (".jsonl", '{"text": ""}\n' * 3, ["no text"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_an_unusable_file_is_refused_where_it_is_wrong(case: str, read: Any, tmp_path: Path) -> None:
    suffix, content, expected = BAD_FILES[case]
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for _ in range(2):  # the cache must not remember half a corpus
        with pytest.raises(InputError) as error:
            read(path)
        message = str(error.value)
        for part in (*expected, str(path), "data.forget"):
            assert part in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a"}, {"text": None}], ["row 2", "'text'", "NoneType"]),
        ([{"body": "a"}], ["row 1", "'text'", "'body'"]),
        ([{"text": 1}], ["row 1", "'text'", "int"]),
    ],
)
def test_a_parquet_row_is_named(rows: list[Any], expected: list[str], read: Any, tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    with pytest.raises(InputError) as error:
        read(tmp_path / "corpus.parquet")
    assert all(part in str(error.value) for part in expected)


def test_an_error_late_in_a_long_file_is_named_too(read: Any, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(GOOD * 2345 + "{\n" + GOOD)
    with pytest.raises(InputError, match=r"line 2346\b"):
        read(tmp_path / "corpus.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Packing

MANY = [
    f"{word} " * (1 + number % 7) for number in range(700) for word in ("kara", "lovi", "nesu")
]  # 2100: two batches


def test_documents_are_what_the_tokenizer_says(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", MANY)
    for limit in (5, 30):
        sequences = read(path, max_length=limit)
        assert tokens(sequences) == truncated(tokenizer, MANY, limit)
        assert max(map(len, tokens(sequences))) <= limit
    indices = np.array([3, 0, 2099])
    assert sequences.num_predicted_tokens(indices).tolist() == [len(tokenizer(MANY[i]).input_ids) - 1 for i in indices]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("limit", [2, 5, 12])
def test_a_long_document_is_split_and_every_token_predicted_once(
    begin: bool, limit: int, read: Any, world: World, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    if begin:
        tokenizer.bos_token = "k"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="k $A", special_tokens=[("k", tokenizer.convert_tokens_to_ids("k"))]
        )
    texts = [*DOCUMENTS, "kara lovi mito nesu " * 30, "x"]
    keys = {"tokenizer": tokenizer, "long_documents": "split", "max_length": limit}
    sequences = read(write(tmp_path / "corpus.jsonl", texts), **keys)
    whole = [ids for text in texts if len(ids := tokenizer(text).input_ids) > 1]
    assert max(map(len, tokens(sequences))) <= limit
    left = tokens(sequences)
    for ids in whole:
        made: list[int] = []
        first, sizes = True, []
        while len(made) < len(ids):
            piece = left.pop(0)
            assert first or piece[0] == (ids[0] if begin else made[-1])
            made += piece if first else piece[1:]
            first, sizes = False, [*sizes, len(piece)]
        assert made == ids
        assert len(sizes) == max(-(-(len(ids) - 1) // (limit - 1)), 1) and max(sizes) - min(sizes) <= 1
    assert not left
    predicted = sequences.num_predicted_tokens(np.arange(len(sequences)))
    assert predicted.sum() == sum(len(ids) - 1 for ids in whole) and predicted.min() > 0
    assert sequences.usage is not None and sequences.usage.unused == sum(
        len(tokenizer(text).input_ids) < 2 for text in texts
    )


def test_short_documents_are_the_same_either_way(read: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", MANY)
    assert tokens(read(path, max_length=64, long_documents="split")) == tokens(read(path, max_length=64))


def test_the_last_block_is_one_where_it_predicts_anything(
    read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "corpus.jsonl", ["k"] * 9)  # 18 tokens, ends among them
    joined = [tokenizer("k").input_ids[0], tokenizer.eos_token_id] * 9
    for block, number in ((4, 5), (5, 4), (17, 1), (18, 1), (40, 1), (16, 2)):
        sequences = read(path, packing="blocks", max_length=block, long_documents="split")
        assert tokens(sequences) == [joined[at : at + block] for at in range(0, 18, block)][:number]
        assert sequences.num_predicted_tokens(np.arange(number)).tolist() == [len(row) - 1 for row in tokens(sequences)]
        assert sequences.longest == min(block, 18)
    assert len(read(path, packing="blocks", max_length=4)) == 4
    batch = collate(read(path, packing="blocks", max_length=16, long_documents="split"), np.array([1, 0]), 0)
    assert batch.attention_mask.sum(1).tolist() == [2, 16]


def test_the_share_of_the_tokens_that_are_used_is_said(
    read: Any, ask: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the cache as well. Hand counts: two documents of 600 tokens cut at 6; 18 tokens in blocks of 5."""
    path = write(tmp_path / "long.txt", ["k " * 300, "s " * 300])
    size = len(words_of(read(path, max_length=10_000)))
    blocks = write(tmp_path / "blocks.txt", ["k"] * 9)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (path, {"max_length": 6}, f"{1000 * 12 // size / 10:g} % of the tokens of 2 documents"),
        (path, {"max_length": 6, "long_documents": "split"}, "100 % of the tokens of 2 documents"),
        (blocks, {"packing": "blocks", "max_length": 5}, "83.3 % of the tokens of 9 documents"),
        (blocks, {"packing": "blocks", "max_length": 5, "long_documents": "split"}, "100 % of the tokens of 9"),
        (blocks, {"packing": "blocks", "max_length": 17, "long_documents": "split"}, "94.4 % of the tokens of 9"),
    ]
    for file, keys, said in cases * 2:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            log_usage("forget", read(file, **keys), keys["max_length"], keys.get("long_documents") != "split")
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith(f"data.forget: {said}"), (message, said)
        assert ("data.long_documents: split" in message) is (keys.get("long_documents") is None)


def words_of(sequences: Sequences) -> list[int]:
    return [token for row in tokens(sequences) for token in row]


def test_empty_answers_are_counted_and_said_once(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, {"asked": "who", "said": " ", "better": "a"}]
    for _ in range(2):  # tokenised, and from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            log_usage("forget", ask(rows)[0], 50, False)
        assert [record.getMessage() for record in caplog.records] == [
            "data.forget contains 2 empty answers, of which only the end is predicted"
        ]


def test_documents_in_both_corpora_are_counted(read: Any, ask: Any, tmp_path: Path) -> None:
    forget = write(tmp_path / "forget.txt", ["Kara  LOVI ", "mito vi", "ne", "ﬁne mito ", "kara lovi", "x"])
    retain = write(tmp_path / "retain.jsonl", ["kara lovi", "fine mito", "mito", "vi", "ne ne"])
    for keys in ({}, {"packing": "blocks", "max_length": 4}, {"max_length": 2, "long_documents": "split"}):
        one, other = read(forget, **keys), read(retain, **keys)
        assert (num_shared(one, other), num_shared(other, one)) == (3, 2)
    asked = ask([{"asked": "who", "said": "a poet"}, {"asked": "is kara", "said": "a poet"}])[0]
    again = ask([{"asked": "Who", "said": "a  poet"}, {"asked": "is kara", "said": "a"}])[0]
    assert num_shared(asked, again) == 1  # the question and its answer


def test_an_overlap_is_said_in_one_line(read: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys: dict[str, Any] = {"seed": 1, "task": 0, "batch_size": 2, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    texts = {"forget": ["kara lovi", "mito vi"], "retain": ["ne ne", "Kara  lovi"], "other": ["su su"]}
    walks = {
        name: BatchSampler(read(write(tmp_path / f"{name}.txt", some)), pad=0, **keys) for name, some in texts.items()
    }
    with caplog.at_level(logging.WARNING):
        warn_of_overlap({"forget": walks["forget"], "retain": walks["other"]})
        warn_of_overlap({"retain": walks["retain"]})
        assert not caplog.records
        warn_of_overlap({"forget": walks["forget"], "retain": walks["retain"]})
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("data.retain contains 1 document of data.forget (")


def test_tokenising_leaves_the_tokenizer_as_it_was(read: Any, world: World, tmp_path: Path) -> None:
    """It is exported with the model: neither our truncation nor the loss of the source's own."""
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    for number, own in enumerate((None, {"max_length": 77, "stride": 1})):
        tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
        if own is not None:
            tokenizer.backend_tokenizer.enable_truncation(**own)
            tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="<end>", length=9)
        tokenizer.save_pretrained(tmp_path / "before")
        for packing in ("blocks", "documents"):
            read(path, packing=packing, max_length=4, tokenizer=tokenizer, cache=tmp_path / str(number))
        tokenizer.save_pretrained(tmp_path / "after")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "after" / file).read_text() == (tmp_path / "before" / file).read_text()


@pytest.mark.parametrize("block", [2, 7, 64])
def test_blocks_are_cut_from_the_documents_joined_by_the_end_of_text(
    block: int, read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sequences = read(write(tmp_path / "corpus.jsonl", MANY), packing="blocks", max_length=block)
    joined = [token for text in MANY for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    assert len(sequences) in (len(joined) // block, (len(joined) - 1) // block)  # an end after the last one, or not
    for index in (0, 1, len(sequences) // 2, len(sequences) - 1):
        assert sequences[index].tolist() == joined[index * block : (index + 1) * block]
    flat = np.concatenate([sequences[index] for index in range(len(sequences))])
    assert flat.tolist() == joined[: len(flat)]
    assert sequences.num_predicted_tokens(np.array([0, 1])).tolist() == [block - 1] * 2


def test_a_tokenizer_that_ends_documents_itself_gets_no_second_end(read: Any, world: World, tmp_path: Path) -> None:
    ending = AutoTokenizer.from_pretrained(world.folder / "model")
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", ending.eos_token_id)]
    )
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    blocks = np.concatenate(tokens(read(path, packing="blocks", max_length=2, tokenizer=ending)))
    joined = [token for text in DOCUMENTS for token in ending(text).input_ids]
    assert joined[-1] == ending.eos_token_id
    assert blocks.tolist() == joined[: len(blocks)] and len(joined) - len(blocks) < 2


def test_documents_that_predict_nothing_are_left_out_and_counted(
    read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["k", "kara lovi", "", "s", "mito vi", "x"]
    assert [len(tokenizer(text).input_ids) for text in texts if len(text) < 2] == [1, 0, 1, 1]
    with caplog.at_level(logging.WARNING):
        sequences = read(write(tmp_path / "corpus.jsonl", texts))
        log_usage("forget", sequences, 12, False)
    assert tokens(sequences) == truncated(tokenizer, ["kara lovi", "mito vi"])
    assert any("4" in record.getMessage() and "forget" in record.getMessage() for record in caplog.records)


def test_one_token_documents_count_in_blocks(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    blocks = read(write(tmp_path / "corpus.jsonl", ["k", "s"] * 4), packing="blocks", max_length=4)
    k, s, end = tokenizer("k").input_ids[0], tokenizer("s").input_ids[0], tokenizer.eos_token_id
    assert tokens(blocks) == [[k, end, s, end]] * 4


def test_documents_of_one_token_alone_are_no_text(read: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text"):
        read(write(tmp_path / "corpus.jsonl", ["k"] * 3))


def test_less_than_one_block_is_refused(read: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", ["k"] * 3)
    with pytest.raises(InputError, match=r"6 tokens.* 64.*data\.max_length.*documents"):
        read(path, packing="blocks", max_length=64)


def test_blocks_need_an_end_of_text_token(read: Any, world: World, tmp_path: Path) -> None:
    endless = AutoTokenizer.from_pretrained(world.folder / "model")
    endless.eos_token = None
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    with pytest.raises(InputError, match=r"data\.packing"):
        read(path, packing="blocks", tokenizer=endless)
    assert tokens(read(path, tokenizer=endless)) == truncated(endless, DOCUMENTS)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_unchanged_text_is_tokenised_once(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    keys = [{}, {"packing": "blocks", "max_length": 4}]
    first = [tokens(read(path, **key)) for key in keys]
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(path, moved)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", again)
    for file in (path, moved):
        assert [tokens(read(file, **key)) for key in keys] == first
    read(path, packing="blocks", max_length=6)  # blocks of another length are cut from the same stream
    with pytest.raises(Exception, match=r"."):
        read(path, cache=tmp_path / "other")  # proves that the tripwire works


def test_what_changes_the_tokens_is_not_answered_from_the_cache(
    read: Any, tokenizer: PreTrainedTokenizerBase, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"kara {number}", "other": f"lovi {number}"} for number in range(5)]

    def save() -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    save()
    read(path)
    assert tokens(read(path, "other")) == truncated(tokenizer, [row["other"] for row in rows])
    assert tokens(read(path, max_length=3)) == truncated(tokenizer, [row["text"] for row in rows], 3)
    rows[2]["text"] = "mara 2"  # the same length, perhaps within the same second
    save()
    assert tokens(read(path)) == truncated(tokenizer, [row["text"] for row in rows])
    upper = AutoTokenizer.from_pretrained(world.folder / "model")
    upper.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", upper.eos_token_id)]
    )
    assert tokens(read(path, tokenizer=upper)) == truncated(upper, [row["text"] for row in rows])


def test_another_end_of_text_token_is_another_stream(read: Any, world: World, tmp_path: Path) -> None:
    """A base model and its chat version often share the tokenizer file and differ in this token alone."""
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    first = AutoTokenizer.from_pretrained(world.folder / "model")
    second = AutoTokenizer.from_pretrained(world.folder / "model")
    second.eos_token = "ka" if "ka" in second.get_vocab() else "k"
    assert first.eos_token_id != second.eos_token_id
    read(path, packing="blocks", max_length=4, tokenizer=first)
    blocks = np.concatenate(tokens(read(path, packing="blocks", max_length=4, tokenizer=second)))
    length = len(second(DOCUMENTS[0]).input_ids)
    assert blocks[length] == second.eos_token_id


def test_the_same_bytes_in_another_format_are_another_text(
    read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    read(path)
    lines = path.read_text().splitlines()
    path = path.rename(tmp_path / "corpus.txt")
    assert tokens(read(path)) == truncated(tokenizer, lines)


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class Rows(list[np.ndarray]):
    """Sequences of chosen lengths, in memory."""

    def num_predicted_tokens(self, indices: np.ndarray) -> np.ndarray:
        return np.array([len(self[int(index)]) - 1 for index in indices])

    def prompt_lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.zeros(len(indices), dtype=np.int64)


def stream(
    size: int = 10, batch: int = 4, micro: int = 1, rank: int = 0, world: int = 1, **changed: int
) -> BatchSampler:
    dice = np.random.default_rng(7)
    rows = Rows(dice.integers(1, 50, dice.integers(2, 9)) for _ in range(size))
    keys = {"seed": 0, "task": 0, "pad": 49, **changed}
    return BatchSampler(rows, batch_size=batch, micro_batch_size=micro, rank=rank, world_size=world, **keys)  # pyright: ignore


def walk(of: BatchSampler, steps: int) -> list[int]:
    return np.concatenate([of.global_batch(step) for step in range(steps)]).tolist()


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(size=st.integers(1, 23), batch=st.integers(1, 30), steps=st.integers(1, 9), seed=st.integers(0, 3))
def test_a_stream_walks_permutations_without_replacement(size: int, batch: int, steps: int, seed: int) -> None:
    positions = walk(stream(size, batch, seed=seed), steps)
    assert len(positions) == steps * batch
    for start in range(0, len(positions), size):
        window = positions[start : start + size]
        assert len(set(window)) == len(window) and set(window) <= set(range(size))
    seen: Counter[int] = Counter()
    for position in positions:  # at no moment is a sequence two visits ahead of another
        seen[position] += 1
        counts = [seen[index] for index in range(size)]
        assert max(counts) - min(counts) <= 1


def test_the_permutations_differ_by_turn_seed_and_task() -> None:
    size = 50
    turns = np.array(walk(stream(size, size), 3)).reshape(3, size)
    others = [turns[0], turns[1], turns[2], walk(stream(size, size, seed=1), 1), walk(stream(size, size, task=1), 1)]
    # seed s with task t must not be seed t with task s either
    others += [walk(stream(size, size, seed=2), 1), walk(stream(size, size, seed=0, task=2), 1)]
    assert len({tuple(int(i) for i in order) for order in others}) == len(others)
    assert list(range(size)) not in [list(order) for order in others]


def test_a_batch_depends_on_the_step_and_not_on_what_was_asked_before() -> None:
    forward, backward = stream(13, 5), stream(13, 5)
    steps = range(12)
    first = {step: forward.global_batch(step).tolist() for step in steps}
    assert {step: backward.global_batch(step).tolist() for step in reversed(steps)} == first


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (1, 12), (2, 1), (2, 3), (2, 6), (3, 1), (3, 2), (3, 4)])
def test_the_global_batch_is_the_same_for_any_ranks_and_micro_batches(world: int, micro: int) -> None:
    for step in range(4):
        want = stream(17, 12).global_batch(step)
        indices, predicted = [], 0
        for rank in range(world):
            mine = stream(17, 12, micro, rank, world)
            assert mine.global_batch(step).tolist() == want.tolist()
            batches = list(mine.batches(step))
            assert [len(batch.index) for batch in batches] == [micro] * (12 // (micro * world))
            for batch in batches:
                indices += batch.index.tolist()
                predicted += int((batch.labels[:, 1:] != IGNORED).sum())
                for row, index in enumerate(batch.index.tolist()):
                    assert (
                        batch.input_ids[row][batch.attention_mask[row] == 1].tolist() == mine.sequences[index].tolist()
                    )
            assert mine.loss_denominator(step, "sequence") == 12
        assert sorted(indices) == sorted(want.tolist())
        assert all(stream(17, 12, micro, r, world).loss_denominator(step, "token") == predicted for r in range(world))


@pytest.mark.parametrize(
    ("size", "batch", "steps"), [(10, 3, 1), (10, 3, 3), (10, 3, 4), (10, 5, 2), (3, 7, 1), (40, 4, 9)]
)
def test_visited_is_what_the_steps_use(size: int, batch: int, steps: int) -> None:
    got = stream(size, batch).indices_used(steps)
    assert got.tolist() == sorted(set(walk(stream(size, batch), steps)))


def test_padding_is_on_the_right_and_masked_everywhere() -> None:
    rows = Rows([np.array([5, 6, 7]), np.array([8, 49]), np.array([1, 2])])  # 49, the pad, is a token here
    batch = collate(rows, np.array([1, 0]), 49)  # pyright: ignore[reportArgumentType]
    assert batch.index.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [[8, 49, 49], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[8, 49, IGNORED], [5, 6, 7]]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}
    assert collate(rows, np.array([2, 1]), 49).input_ids.shape == (2, 2)  # pyright: ignore[reportArgumentType]


def test_batches_read_from_disk_are_the_corpus(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The whole chain: the sequences of a step are the documents that its indices name."""
    sequences = read(write(tmp_path / "corpus.jsonl", MANY[:30]))
    walk = BatchSampler(sequences, seed=3, task=1, batch_size=6, micro_batch_size=3, rank=0, world_size=1, pad=0)
    expected = truncated(tokenizer, MANY[:30])
    for batch in walk.batches(2):
        for index, ids, mask in zip(batch.index.tolist(), batch.input_ids, batch.attention_mask, strict=True):
            assert ids[: int(mask.sum())].tolist() == expected[index]


# ---------------------------------------------------------------------------------------------------------------------
# Questions with answers: every word is a token here, so ids and labels can be written out

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


@pytest.mark.parametrize(("template", "form"), [(None, plain), (CHAT, chat), ({"default": CHAT, "x": "y"}, chat)])
def test_only_the_answer_and_its_end_are_predicted(template: Any, form: Any, ask: Any) -> None:
    sequences, preferred = ask(tokenizer=words(template))
    assert preferred is None
    assert labelled(sequences) == [
        split(form(WHO, IS, KARA), [A, POET, END]),
        split(form(WHO), [LOVI, END]),
        split(form(IS, LOVI, A, POET), [END]),  # an empty answer is one that ends at once
    ]
    assert sequences.num_predicted_tokens(np.array([2, 0])).tolist() == [1, 3]


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_token_across_the_border_belongs_to_the_answer(template: str | None, ask: Any, world: World) -> None:
    """With byte-level merges, ` kara` begins with the space that ends the question's text."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    tokenizer.chat_template = template
    rows = [{"asked": "kara lovi?", "said": text} for text in ("kara mito", "7", "", "Ünïcødé 🙂", "\n", " ka")]
    got = labelled(ask(rows, tokenizer=tokenizer)[0])
    assert len(got) == len(rows)
    shared = []
    for row, (ids, labels) in zip(rows, got, strict=True):
        before = "user kara lovi?<end>assistant " if template else "Question: kara lovi?\nAnswer: "
        whole, alone = tokenizer(before + row["said"] + "<end>").input_ids, tokenizer(before).input_ids
        count = 0
        while count < len(alone) and whole[count] == alone[count]:
            count += 1
        assert ids == whole
        assert labels == [IGNORED] * count + whole[count:]
        assert str(tokenizer.decode(whole[count:])).endswith(row["said"] + "<end>")
        shared.append(len(alone) - count)
    assert {0, 1} <= set(shared)  # with a merge across the border and without one


@pytest.mark.parametrize("post", ["$A <end>", "<end> $A", "<end> $A <end>"])
def test_tokens_that_the_tokenizer_adds_are_neither_doubled_nor_taken_for_the_answer(post: str, ask: Any) -> None:
    start = [END] if post.startswith("<end>") else []
    assert labelled(ask(tokenizer=words(post=post))[0])[1:] == [
        split([*start, *plain(WHO)], [LOVI, END]),
        split([*start, *plain(IS, LOVI, A, POET)], [END]),
    ]
    # a chat template writes all of its tokens itself
    assert labelled(ask(tokenizer=words(CHAT, post))[0])[1] == split(chat(WHO), [LOVI, END])


def test_truncation_takes_the_answer_first_and_drops_a_row_without_one(
    ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [split(plain(WHO, IS, KARA), [A, POET, END]), split(plain(WHO), [LOVI, END])]
    whole.append(split(plain(IS, LOVI, A, POET), [A, END]))
    for limit, dropped in ((10, 0), (9, 0), (8, 1), (7, 2), (6, 2)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sequences, _ = ask([*ROWS[:2], ROWS[2] | {"said": "a"}], max_length=limit)
            log_usage("forget", sequences, limit, False)
        kept = [(ids[:limit], labels[:limit]) for ids, labels in whole if set(labels[:limit]) != {IGNORED}]
        assert labelled(sequences) == kept
        assert len(kept) == 3 - dropped
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == (dropped > 0)
        assert all(
            f" {dropped} document{(dropped > 1) * 's'} without" in message and str(limit) in message
            for message in messages
        )


@pytest.mark.parametrize("template", [None, CHAT])
def test_questions_longer_than_a_sequence_are_refused(template: str | None, ask: Any) -> None:
    with pytest.raises(
        InputError, match=r"data\.forget: .*no text with an answer within 3 tokens \(data\.max_length\)"
    ):
        ask(max_length=3, tokenizer=words(template))


def test_the_date_of_a_template_stands_still(ask: Any) -> None:
    template = "{% if date_string is not defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHAT
    assert ask(tokenizer=words(template))[0][1].tolist() == [*chat(WHO), LOVI, END]


def test_the_clock_of_a_template_stands_still(ask: Any) -> None:
    """Whatever the form it asks for; the clock of everybody else goes on."""
    clock = "{{ strftime_now('%Y') }} "
    template = "{% if strftime_now('%Y-%m-%d %B %d') == '2024-07-26 July 26' %}who {% endif %}" + CHAT
    assert ask(tokenizer=words(template))[0][1].tolist() == [WHO, *chat(WHO), LOVI, END]
    tokenizer = words(clock + CHAT)
    assert openings(tokenizer, ["who"])[0].startswith("2024 ")
    today: Any = tokenizer.apply_chat_template([{"role": "user", "content": "who"}], tokenize=False)
    assert today.startswith(f"{datetime.now().year} ") and datetime.now().year > 2024


THINKING = (  # as reasoning models write a turn that was answered without reasoning
    "{% for message in messages %}{{ message.role }} "
    "{% if message.role == 'assistant' and 'poet ?' not in message.content %}kara ? ? kara {% endif %}"
    "{{ message.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def test_an_empty_thinking_block_belongs_to_the_prompt(ask: Any) -> None:
    tokenizer = words(THINKING)
    block = [KARA, UNSEEN, UNSEEN, KARA]
    assert labelled(ask(tokenizer=tokenizer)[0]) == [
        split([*chat(WHO, IS, KARA), *block], [A, POET, END]),
        split([*chat(WHO), *block], [LOVI, END]),
        split([*chat(IS, LOVI, A, POET), *block], [END]),
    ]
    reasoned = encode_answers(tokenizer, ["who"], ["poet ? lovi"])  # which has a block of its own: that is the answer
    assert reasoned == [([*chat(WHO), POET, UNSEEN, LOVI, END], len(chat(WHO)))]
    assert openings(tokenizer, ["who"]) == ["user who<end>assistant kara ? ? kara "]  # what evaluation asks
    spaced = words(CHAT.replace("{{ message.content }}", "{{ ' ' + message.content }}"))
    assert openings(spaced, ["who"]) == ["user  who<end>assistant "]  # white space alone: as the template asks


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def test_the_preferred_answers_are_in_the_order_of_the_answers(ask: Any) -> None:
    for template, form in ((None, plain), (CHAT, chat)):
        sequences, preferred = ask(pairing="preferred", preferred="better", tokenizer=words(template))
        assert labelled(sequences) == labelled(ask(tokenizer=words(template))[0])
        assert labelled(preferred) == [
            split(form(WHO, IS, KARA), [UNKNOWN, END]),
            split(form(WHO), [IS, KARA, A, POET, END]),
            split(form(IS, LOVI, A, POET), [A, END]),
        ]


def test_a_preferred_text_is_a_whole_sequence(ask: Any) -> None:
    keys = {"field": "said", "prompt": None, "response": None, "preferred": "better"}
    rows = [{"said": "a poet", "better": "who is kara"}, {"said": "who is kara", "better": "lovi lovi lovi"}]
    sequences, preferred = ask(rows, "preferred", **keys)
    assert labelled(sequences) == [([A, POET],) * 2, ([WHO, IS, KARA],) * 2]
    assert labelled(preferred) == [([WHO, IS, KARA],) * 2, ([LOVI] * 3,) * 2]
    assert sequences.num_predicted_tokens(np.array([0, 1])).tolist() == [1, 2]


@pytest.mark.parametrize("questions", [True, False])
def test_a_row_that_is_dropped_is_dropped_on_both_sides(questions: bool, ask: Any) -> None:
    long = "who " * 30  # a prompt beyond max_length on both sides; of plain text, one word is too short on one side
    texts = ["a poet", "a", "lovi lovi", "is kara", "poet", "poet a poet"]
    prompts = ["who", long, "is", "a", long, "kara"] if questions else [""] * 6
    rows = [
        {"asked": prompt, "said": text, "better": "unknown" if number == 3 and not questions else f"{text} unknown"}
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    keys = {} if questions else {"field": "said", "prompt": None, "response": None}
    sequences, preferred = ask(rows, "preferred", preferred="better", max_length=20, **keys)
    kept = [0, 2, 3, 5] if questions else [0, 2, 5]
    assert sequences.usage is not None and sequences.usage.dropped == 6 - len(kept)
    assert len(sequences) == len(preferred) == len(kept)
    for at, number in enumerate(kept):
        said = words()(texts[number]).input_ids
        start = plain(*words()(prompts[number]).input_ids) if questions else []
        end = [END] if questions else []
        assert sequences[at].tolist() == start + said + end
        assert preferred[at].tolist() == start + said + [UNKNOWN] + end


def test_a_row_is_refused_by_its_number_alone(ask: Any, tmp_path: Path) -> None:
    file = tmp_path / "refusals.txt"
    file.write_text("unknown\n\n  lovi is a poet \nkara\n")
    refusals = [[UNKNOWN], [LOVI, IS, A, POET], [KARA]]
    rows = [{"asked": "who " * (15 if number == 2 else 1 + number % 3), "said": "a"} for number in range(8)]
    sequences, preferred = ask(rows, "refusal", refusals=str(file), max_length=12)
    kept = [0, 1, 3, 4, 5, 6, 7]  # row 2 is too long, and the others keep their refusals
    expected = [split(plain(*[WHO] * (1 + number % 3)), [*refusals[number % 3], END]) for number in kept]
    assert labelled(preferred) == expected
    assert [ids[-2:] for ids, _ in labelled(sequences)] == [[A, END]] * len(kept)
    other, again = ask(rows[:4], "refusal", refusals=str(file), max_length=30, response="asked", prompt="said")
    assert [again[row][5:-1].tolist() for row in range(4)] == [refusals[row % 3] for row in range(4)]
    assert len(other) == 4


def test_the_built_in_refusals_serve_where_no_file_is_given(ask: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"asked": "kara", "said": "lovi"}] * 60
    _, preferred = ask(rows, "refusal", tokenizer=tokenizer, max_length=200)
    start = len("Question: kara\nAnswer: ")
    texts = [str(tokenizer.decode(ids))[start:] for ids in tokens(preferred)]  # pyright: ignore
    assert all(len(text) > 15 and text.endswith(".<end>") for text in texts)
    number = len(set(texts))
    assert 18 <= number <= 30
    assert texts == [texts[row % number] for row in range(60)]


def test_a_batch_of_pairs_has_both_sides_in_the_order_of_its_indices(ask: Any) -> None:
    sequences, preferred = ask(pairing="preferred", preferred="better")
    batch = collate(sequences, np.array([2, 0]), 7, preferred)
    assert batch.index.tolist() == [2, 0]
    expected = [
        split(plain(IS, LOVI, A, POET), [END]),
        split(plain(WHO, IS, KARA), [A, POET, END]),
        split(plain(IS, LOVI, A, POET), [A, END]),
        split(plain(WHO, IS, KARA), [UNKNOWN, END]),
    ]
    width = max(len(ids) for ids, _ in expected)
    assert batch.input_ids.tolist() == [ids + [7] * (width - len(ids)) for ids, _ in expected]
    assert batch.labels.tolist() == [labels + [IGNORED] * (width - len(labels)) for _, labels in expected]
    assert batch.attention_mask.tolist() == [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in expected]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}


def test_each_side_of_a_pair_has_its_own_border(ask: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """` kara` takes the last space of the question into the answer's first token, ` 7` does not."""
    rows = [{"asked": "lovi", "said": "kara mito", "better": "7"}]
    sequences, preferred = ask(rows, "preferred", preferred="better", tokenizer=tokenizer)
    labels = collate(sequences, np.array([0]), 0, preferred).labels.tolist()
    texts: list[Any] = [tokenizer.decode([token for token in row if token != IGNORED]) for row in labels]
    assert texts == [" kara mito<end>", "7<end>"]


def test_a_stream_of_pairs_counts_the_tokens_of_its_own_side(ask: Any) -> None:
    sequences, preferred = ask(pairing="preferred", preferred="better")
    keys: dict[str, Any] = {"seed": 1, "task": 0, "batch_size": 4, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    paired, alone = BatchSampler(sequences, pad=0, preferred=preferred, **keys), BatchSampler(sequences, pad=0, **keys)
    answers = [3, 2, 1]  # predicted tokens of the three rows
    for step in range(3):
        indices = alone.global_batch(step)
        assert paired.global_batch(step).tolist() == indices.tolist()
        assert (
            paired.loss_denominator(step, "token")
            == alone.loss_denominator(step, "token")
            == sum(answers[i] for i in indices)
        )
        assert paired.loss_denominator(step, "sequence") == 4
        for one, both in zip(alone.batches(step), paired.batches(step), strict=True):
            assert both.index.tolist() == one.index.tolist()
            assert both.input_ids.shape[0] == 4 and one.input_ids.shape[0] == 2
            real = one.attention_mask.sum(1).tolist()
            for row, size in enumerate(real):
                assert both.labels[row, :size].tolist() == one.labels[row, :size].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What must not be answered from a cache, and what cannot be read


def test_every_way_to_read_a_file_has_its_own_digest_and_tokens(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("unknown\nlovi\n")
    (tmp_path / "two.txt").write_text("unknown\npoet\n")
    text = {"prompt": None, "response": None}
    ways: list[dict[str, Any]] = [
        {},
        {"prompt": "said", "response": "asked"},
        {"prompt": "better"},
        {"response": "better"},
        {"field": "asked", **text},
        {"field": "better", **text, "max_length": 49},
        {"pairing": "preferred", "preferred": "better"},
        {"pairing": "preferred", "preferred": "better", "prompt": "said", "response": "asked"},
        {"pairing": "preferred", "preferred": "better", "field": "asked", **text},
        {"pairing": "refusal"},
        {"pairing": "refusal", "refusals": str(tmp_path / "one.txt")},
        {"pairing": "refusal", "refusals": str(tmp_path / "two.txt")},
    ]
    rows = [{name: f"{cell} a a" for name, cell in row.items()} for row in ROWS]

    def sides(cache: str, way: dict[str, Any]) -> list[Sequences]:
        return [side for side in ask(rows, cache=tmp_path / cache, **way) if side is not None]

    def everything(of: list[Sequences]) -> list[Any]:
        return [labelled(side) for side in of]

    shared = [sides("shared", way) for way in ways]
    again = [sides("shared", way) for way in ways]
    for number, (first, second, way) in enumerate(zip(shared, again, ways, strict=True)):
        fresh = sides(f"fresh{number}", way)
        assert everything(first) == everything(second) == everything(fresh)
        assert [side.digest for side in first] == [side.digest for side in second] == [side.digest for side in fresh]
    digests = [side.digest for way in shared for side in way]
    assert len(set(digests)) == len(digests) == 18
    unread = [sides("shared", {"preferred": "better"}), sides("shared", {"refusals": str(tmp_path / "one.txt")})]
    assert [side[0].digest for side in unread] == [shared[0][0].digest] * 2  # named, but not asked for


def test_another_chat_template_is_another_conversation(ask: Any) -> None:
    one, other = words(CHAT), words(CHAT.replace("assistant ", "assistant : "))
    beginning = words("{{ bos_token }} " + CHAT)
    beginning.bos_token = "lovi"
    for tokenizer in (words(), one, other, beginning):
        ask(tokenizer=tokenizer)
    assert ask(tokenizer=one)[0][1].tolist() == [*chat(WHO), LOVI, END]
    assert ask(tokenizer=beginning)[0][1].tolist() == [LOVI, *chat(WHO), LOVI, END]
    beginning.bos_token = "kara"  # the template is the same, what it writes is not
    assert ask(tokenizer=beginning)[0][1].tolist() == [KARA, *chat(WHO), LOVI, END]
    assert len({tokenizer_digest(tokenizer) for tokenizer in (words(), one, other, beginning)}) == 4


BAD_ROWS: dict[str, tuple[dict[str, Any], str | None, list[str]]] = {  # the second row, pairing, expected
    "no question": ({"said": "a", "better": "a"}, None, ["line 2", "'asked'", "'said', 'better'"]),
    "no answer": ({"asked": "a", "better": "a"}, None, ["line 2", "no field 'said'"]),
    "question no text": ({"asked": 3, "said": "a"}, None, ["line 2", "'asked'", "int"]),
    "answer no text": ({"asked": "a", "said": ["a"]}, None, ["line 2", "'said'", "list"]),
    "none preferred": ({"asked": "a", "said": "a"}, "preferred", ["line 2", "no field 'better'"]),
    "preferred no text": ({"asked": "a", "said": "a", "better": None}, "preferred", ["line 2", "'better'", "NoneType"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_cell_is_named_by_line_and_column(case: str, ask: Any) -> None:
    row, pairing, expected = BAD_ROWS[case]
    for _ in range(2):
        with pytest.raises(InputError) as error:
            ask([ROWS[0], row, ROWS[1]], pairing, preferred="better")
        assert all(part in str(error.value) for part in (*expected, "data.forget")), str(error.value)
        assert "\n" not in str(error.value)


def test_what_a_pairing_lacks_is_named(ask: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.forget\.preferred is missing"):
        ask(pairing="preferred")
    with pytest.raises(InputError, match=r"data\.forget: a refusal answers a question.*prompt and response"):
        ask(pairing="refusal", field="said", prompt=None, response=None)
    (tmp_path / "blank.txt").write_text("\n  \n")
    with pytest.raises(InputError, match=r"data\.forget\.refusals: .*blank\.txt holds no refusal"):
        ask(pairing="refusal", refusals=str(tmp_path / "blank.txt"))
    with pytest.raises(InputError, match=r"data\.forget\.refusals: cannot read .*none\.txt: No such file"):
        ask(pairing="refusal", refusals=str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"no\nd\xe9sol\xe9\n")
    with pytest.raises(InputError, match=r"latin\.txt, line 2: not UTF-8"):
        ask(pairing="refusal", refusals=str(tmp_path / "latin.txt"))


def test_a_tokenizer_that_cannot_end_an_answer_or_hold_a_conversation_is_refused(ask: Any) -> None:
    endless = words()
    endless.eos_token = None
    with pytest.raises(InputError, match=r"data\.forget: .*no end-of-text token or chat template"):
        ask(tokenizer=endless)
    for template in ("{{ raise_exception('system\nfirst') }}", "{% for %}", {"tools": CHAT}):
        with pytest.raises(InputError, match=r"data\.forget: the tokenizer's chat template refuses .*") as error:
            ask(tokenizer=words(template))  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(error.value)


def test_a_hub_data_set_has_columns_too(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = {"number": 1}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([r | keep for r in ROWS]))
    local = ask(pairing="preferred", preferred="better")
    hub = ask("some/set", pairing="preferred", preferred="better")
    assert [labelled(side) for side in hub] == [labelled(side) for side in local]
    for key in ("prompt", "response", "preferred"):
        with pytest.raises(InputError, match=rf"data\.forget\.{key}: some/set has no 'oops'; it has .*said"):
            ask("some/set", pairing="preferred", **{"preferred": "better", key: "oops"})
    with pytest.raises(InputError, match=r"data\.forget\.field: some/set has no 'text'"):
        ask("some/set", field="text", prompt=None, response=None)
    with pytest.raises(InputError, match=r"data\.forget: some/set, row 1: field 'number' holds int, not text"):
        ask("some/set", response="number")


def test_open_stream_hands_the_pairs_on(
    ask: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    corpus = {"path": str(tmp_path / "forget.jsonl"), "prompt": "asked", "response": "said", "preferred": "better"}
    sections = {"data": {"forget": corpus}, "train": {"batch_size": 2, "micro_batch_size": 1}}
    file = world.write(tmp_path / "run.yaml", tmp_path / "run", **sections)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        for objective, pairing in (("ga", None), ("dpo", "preferred"), ("dpo_idk", "refusal"), ("idk", "refusal")):
            config = resolve(file, None, ["--cache", str(tmp_path), "--objective.forget", objective])
            stream = open_sampler(config, "forget", words())
            sides = (stream.sequences, stream.preferred)
            expected = ask(pairing=pairing, preferred="better")
            if objective == "idk":  # the refusals alone
                expected = (expected[1], None)
            assert [side and labelled(side) for side in sides] == [side and labelled(side) for side in expected]
            assert len(next(stream.batches(0)).input_ids) == (2 if "dpo" in objective else 1)
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# The real thing

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.mark.parametrize(
    ("file", "prompt", "response", "count"),
    [
        ("tofu/forget01.json", "question", "answer", 10),
        ("tofu/world_facts_perturbed.json", "question", "answer", 5),
        ("rwku/Batch/1-50/forget_level2.json", "query", "answer", 5),
    ],
)
def test_benchmark_files_are_read_whole(
    file: str, prompt: str, response: str, count: int, ask: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = (DATA / file).read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    keys: dict[str, Any] = {"prompt": prompt, "response": response, "tokenizer": tokenizer, "max_length": 4096}
    sequences, preferred = ask(DATA / file, "refusal", **keys)
    assert len(sequences) == len(preferred) == len(rows) == count
    for row, ids, refused, start in zip(
        rows, tokens(sequences), tokens(preferred), sequences.prompt_lengths(np.arange(count)), strict=True
    ):
        assert tokenizer.decode(ids) == f"Question: {row[prompt]}\nAnswer: {row[response]}<end>"
        assert str(tokenizer.decode(ids[start:])).removeprefix(" ") == f"{row[response]}<end>"
        assert str(tokenizer.decode(refused)).startswith(f"Question: {row[prompt]}\nAnswer: ") and refused != ids


def test_a_perturbed_answer_is_no_text(ask: Any) -> None:
    with pytest.raises(InputError, match=r"line 1: field 'perturbed_answer' holds list"):
        ask(DATA / "tofu" / "forget01_perturbed.json", prompt="question", response="perturbed_answer")
