"""Files, saved data sets and hub data sets -> rows of text, or a message that names the line.

Training and evaluation both read corpora here, so that the same bytes are the same texts. The packages that read tables
are imported where a table is read, so that importing this module is quick.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config.files import is_path_alone
from pipeline.config.objectives import Pairing
from pipeline.config.sources import LOCAL_FORMATS, Corpus, Source, format_of
from pipeline.data.tables import Located, lines, local_rows, readable
from pipeline.errors import InputError

if TYPE_CHECKING:
    import datasets


_REFUSALS = Path(__file__).with_name("refusals.txt")  # 23, a prime: corpora have 10 or 20 questions on a subject


class Row(NamedTuple):
    """One row of a corpus."""

    prompt: str | None  # the question; None: plain text
    texts: tuple[str, ...]  # the text or answer and, for a pairing, the preferred one


def read(corpus: Corpus, key: str, pairing: Pairing | None = None) -> tuple[Iterator[Row], str]:
    """The rows of a corpus that training sees, read lazily, and a digest of the source and of what is read from it.

    Under `refusal`, row n (from 0, as the source counts) is paired with refusal n modulo their number.

    Raises:
        InputError: no such file, data set or column, or malformed text (when reached). `key` names the corpus.
    """
    rows, digest = _read_all(corpus, key, pairing)
    if not corpus.heldout:
        return rows, digest
    heldout = _heldout_keys(corpus, key)
    return (row for row in rows if document_key(row) not in heldout), f"{digest}-without-{corpus.heldout:g}"


def read_heldout(corpus: Corpus, key: str) -> list[Row]:
    """The rows of a corpus that training does not see (`heldout`); raises InputError as `read` does."""
    heldout = _heldout_keys(corpus, key) if corpus.heldout else frozenset()
    return [row for row in _read_all(corpus, key, None)[0] if document_key(row) in heldout]


def _heldout_keys(corpus: Corpus, key: str) -> frozenset[int]:
    """Keys of the documents that training does not see: the share `heldout`, rounded up, of the different documents.

    They are those with the smallest keys, which are hashes: the same for every seed, order, method and number of ranks,
    and duplicates are on one side. One document always remains for training.
    """
    found = sorted({document_key(row) for row in _read_all(corpus, key, None)[0]})
    return frozenset(found[: min(math.ceil(corpus.heldout * len(found)), len(found) - 1)] if found else ())


def document_key(row: Row) -> int:
    """Equal for rows whose question and text are duplicates; 64 bits, signed."""
    texts = json.dumps([normalised(text) for text in (row.prompt or "", row.texts[0])])
    return int.from_bytes(hashlib.blake2b(texts.encode(), digest_size=8).digest(), "big", signed=True)


def _read_all(corpus: Corpus, key: str, pairing: Pairing | None) -> tuple[Iterator[Row], str]:
    """See `read`; all rows."""
    if pairing == "preferred" and corpus.preferred is None:
        raise InputError(f"data.{key}.preferred is missing: the objective needs the column with the text to prefer")
    if pairing == "refusal" and corpus.prompt is None:
        raise InputError(f"data.{key}: a refusal answers a question; name the columns with prompt and response")
    columns = {name: column for name, column in corpus.columns.items() if name != "preferred" or pairing == "preferred"}
    refusals = _read_refusals(corpus, key) if pairing == "refusal" else []
    rows, source = read_rows(corpus, f"data.{key}.", columns)
    texts = (tuple(text_of(where, row, column) for column in columns.values()) for where, row in rows)
    # The same bytes are other texts in another format, with other columns, or with other refusals.
    recipe = json.dumps([format_of(corpus.path), columns, refusals])
    return _assemble(texts, corpus.prompt is not None, refusals), f"{source}-{_sha256(recipe)[:16]}"


def read_rows(corpus: Source, key: str = "", columns: dict[str, str] | None = None) -> tuple[Iterator[Located], str]:
    """(place, row) of each row of a corpus, read lazily, and a digest of the source.

    A row of a .txt file has its line under `corpus.field`; other rows have all their columns, or at least `columns`
    (by the key that names them). Nothing checks their values here: see `text_of`.

    Raises:
        InputError: no such file, data set or column, or a malformed file (when reached). `key` begins the message.
    """
    path = Path(corpus.path)
    if format_of(path) is not None:
        with readable(path, f"{key}path: " if key else ""):
            source = file_digest(path)
        _, start, stop = split_of(corpus, key)
        part = "" if (start, stop) == (0, None) else f"[{start}:{stop}]"
        return islice(local_rows(path, corpus.field or "text"), start, stop), source + part
    found, source = _saved_dataset(corpus, key) if is_saved_dataset(path) else _hub_dataset(corpus, key)
    for name, column in (columns or {}).items():
        if column not in found.column_names:
            there = ", ".join(found.column_names)
            turns = conversation_in(found[0]) if len(found) else ""
            raise InputError(f"{key}{name}: {corpus.path} has no {column!r}; it has {there}{turns}")
    table = found if columns is None else found.select_columns(list(columns.values()))
    return ((f"{corpus.path}, row {number}", row) for number, row in enumerate(table, 1)), source


def split_of(corpus: Source, key: str = "") -> tuple[str, int, int | None]:
    """(split, first row, row after the last or None) of `corpus.split`, as `train[40:80]`, for data that are local."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(\d*):(\d*)\])?", corpus.split)
    if match is None:
        raise InputError(f"{key}split: {corpus.split!r} is no split of local data; write NAME, or NAME[FIRST:LAST+1]")
    name, start, stop = match.groups()
    first, last = int(start or 0), int(stop) if stop else None
    if last is not None and last <= first:
        raise InputError(f"{key}split: {corpus.split!r} has no row: {last} is not above {first}")
    return name, first, last


def _assemble(rows: Iterable[tuple[str, ...]], questions: bool, refusals: list[str]) -> Iterator[Row]:
    for number, texts in enumerate(rows):
        prompt = texts[0] if questions else None
        refusal = (refusals[number % len(refusals)],) if refusals else ()
        yield Row(prompt, texts[questions:] + refusal)


def _read_refusals(corpus: Corpus, key: str) -> list[str]:
    path = Path(corpus.refusals) if corpus.refusals is not None else _REFUSALS
    with readable(path, f"data.{key}.refusals: "):
        refusals = [text for _, line in lines(path) if (text := line.strip())]
    if not refusals:
        raise InputError(f"data.{key}.refusals: {path} holds no refusal; write one a line")
    return refusals


def text_of(where: str, row: object, column: str) -> str:
    """The text in `column` of a row; raises an InputError that begins with `where`."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with the field {column!r}, found {type(row).__name__}")
    if column not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise InputError(f"{where}: no field {column!r}; it has {there}{conversation_in(row)}")
    text = row[column]
    if is_conversation(text):
        raise InputError(f"{where}: field {column!r} holds {CONVERSATION}")
    if not isinstance(text, str):
        raise InputError(f"{where}: field {column!r} holds {type(text).__name__}, not text; repair or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: field {column!r} holds a lone surrogate, which is not a character; repair or remove the row"
        ) from None
    return text


CONVERSATION = (
    "a conversation, not text; write its question and its answer into two columns and name them by prompt and response "
    "(the chat template is applied then), or write what apply_chat_template(..., tokenize=False) makes of it into one"
)


def is_conversation(value: object) -> bool:
    """Whether a cell is a list of turns, each an object, as chat data sets have it under `messages`."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(turn, dict) for turn in value)


def conversation_in(row: dict[str, object]) -> str:
    """The end of a message, if a column of the row holds a conversation; else nothing."""
    return next((f". {name!r} holds {CONVERSATION}" for name, value in row.items() if is_conversation(value)), "")


def normalised(text: str) -> str:
    """Equal for duplicates: NFKC, case-folded, with white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `save_to_disk` of the package datasets wrote."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved_dataset(corpus: Source, key: str) -> tuple[datasets.Dataset, str]:
    """The data set, or the split of it, and a digest of its files."""
    import datasets
    import pyarrow as pa

    path = Path(corpus.path)
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:  # ValueError: also malformed JSON
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{key}path: {path} is no whole folder of save_to_disk: {reason}; save it again") from None
    name, start, stop = split_of(corpus, key)
    if isinstance(found, datasets.DatasetDict):
        if name not in found:
            raise InputError(f"{key}split: {path} has no {name!r}; it has {', '.join(map(str, found))}")
        path, found = path / name, found[name]
    files = [[file.name, file_digest(file)] for file in sorted(path.glob("*.arrow"))]
    if (start, stop) == (0, None):
        return found, _sha256(json.dumps(files))
    rows = range(len(found))[start:stop]
    return found.select(rows), _sha256(json.dumps([files, rows.start, rows.stop]))


def _hub_dataset(corpus: Source, key: str) -> tuple[datasets.Dataset, str]:
    import datasets

    if is_path_alone(corpus.path) and not Path(corpus.path).exists():
        raise InputError(f"{key}path: there is no file or folder {Path(corpus.path).absolute()}")
    try:
        rows = datasets.load_dataset(corpus.path, corpus.name, split=corpus.split)
    except Exception as error:  # `datasets` and the hub raise a dozen unrelated types for "missing" and "no network"
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{key}path: {corpus.path!r} is no {', '.join(LOCAL_FORMATS)} file, and loading it from the hub "
            f"failed: {reason}"
        ) from None
    assert isinstance(rows, datasets.Dataset)
    return rows, rows._fingerprint


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
