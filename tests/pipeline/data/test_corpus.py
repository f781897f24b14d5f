"""Files, saved data sets and their faults -> documents, against the tokenizer itself."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from pipeline.errors import InputError
from tests.pipeline.data.corpora import (
    DOCUMENTS,
    tokens,
    truncated,
    write,
)


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


@pytest.mark.parametrize("path", ["./typo", "texts/deep/typo", "typo/"])
def test_a_folder_that_is_missing_is_no_name_of_the_hub(
    path: str, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tried = tmp_path / path.removeprefix("./").removesuffix("/")
    with pytest.raises(InputError, match=rf"^data\.forget\.path: there is no file or folder {tried}$"):
        read(path)


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


@pytest.mark.parametrize("saved", [False, True])
def test_a_split_may_be_some_of_the_rows(
    saved: bool, read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "saved" if saved else write(tmp_path / "corpus.jsonl", DOCUMENTS)
    if saved:
        datasets.Dataset.from_list([{"text": text} for text in DOCUMENTS]).save_to_disk(path)
    whole, digests = read(path), set()
    for rows in (slice(1, 3), slice(None, 2), slice(2, None), slice(1, 1000)):
        text = "[{}:{}]".format(*("" if end is None else end for end in (rows.start, rows.stop)))
        part = read(path, split=f"train{text}")
        assert tokens(part) == truncated(tokenizer, DOCUMENTS[rows]), text
        digests.add(part.digest)
    assert len(digests | {whole.digest}) == 5, "other rows must be another corpus"
    with pytest.raises(InputError, match=r"data\.forget\.split: 'train\[:10%\]' is no split of local data; write NAME"):
        read(path, split="train[:10%]")
    with pytest.raises(InputError, match=r"data\.forget\.split: 'train\[3:3\]' has no row: 3 is not above 3"):
        read(path, split="train[3:3]")


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


def test_a_column_of_conversations_is_refused_with_what_to_do_instead(read: Any, tmp_path: Path) -> None:
    """Chat data sets have `messages`; neither repairing a row nor removing it would help."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    path, saved = tmp_path / "chat.jsonl", tmp_path / "saved"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    datasets.Dataset.from_list([{"messages": turns}]).save_to_disk(str(saved))
    for source, column in ((path, "messages"), (path, "text"), (saved, "messages"), (saved, "text")):
        with pytest.raises(InputError, match="two columns and name them by prompt and response") as caught:
            read(source, column)
        assert "'messages' holds a conversation" in str(caught.value) and "remove" not in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps({"text": []}) + "\n")
    with pytest.raises(InputError, match="holds list, not text; repair or remove the row"):
        read(path)
