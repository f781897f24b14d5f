"""Local files -> (place, row): lines of text, JSON, CSV and Parquet, also compressed; or a message with the line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config.sources import format_of
from pipeline.errors import InputError

Located = tuple[str, object]  # the place of a row, for messages, and the row


@contextmanager
def readable(path: Path, prefix: str = "") -> Iterator[None]:
    """Turn errors of the file system, or of a damaged .gz, on reading `path` into an InputError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{prefix}cannot read {path}: {reason}; put a whole file there or name another") from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a UTF-8 text file, also of a compressed one; a byte-order mark is not text.

    A line ends with a line feed, a carriage return or both, and nowhere else: U+2028 and its like are text.
    """
    number = 0
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for part in file:  # up to a line feed
            for line in part.splitlines(keepends=True):
                number += 1
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path}, line {number}: not UTF-8 text (byte {error.start + 1} of the line); save it as UTF-8"
                    ) from None


def json_rows(path: Path) -> Iterator[Located]:
    """(place, row) of JSON lines or, in a `.json` file, where both are common, of one JSON array."""
    with readable(path):
        if format_of(path) == ".json" and next((s for _, line in lines(path) if (s := line.strip())), "")[:1] == "[":
            try:
                rows = json.loads("".join(line for _, line in lines(path)))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}; repair it") from None
            yield from ((f"{path}, element {number}", row) for number, row in enumerate(rows, 1))
            return
        for number, line in lines(path):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: not valid JSON: {error.msg}; repair or remove the line"
                ) from None


def _csv_rows(path: Path) -> Iterator[Located]:
    """(place, row by the names of the first line); RFC 4180, with tabs in a `.tsv` file."""
    csv.field_size_limit(2**31 - 1)  # documents can exceed the module's default of 128 KiB
    delimiter = "\t" if format_of(path) == ".tsv" else ","
    reader = csv.reader((line for _, line in lines(path)), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = cells
                if len({*names}) < len(names):
                    raise InputError(f"{where}: two columns have one name; rename one of {', '.join(names)}")
            elif len(cells) != len(names):
                raise InputError(
                    f"{where}: {len(cells)} cells, and the first line names {len(names)} columns; put a text that "
                    "contains the delimiter between quotes"
                )
            else:
                yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV: {error}; repair it") from None


def _parquet_rows(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}; write it again") from None


def local_rows(path: Path, field: str) -> Iterator[Located]:
    form = format_of(path)
    with readable(path):
        if form == ".txt":
            for number, line in lines(path):
                if line.strip():
                    yield f"{path}, line {number}", {field: line.rstrip("\r\n")}
        elif form == ".parquet":
            yield from _parquet_rows(path)
        else:
            yield from _csv_rows(path) if form in (".csv", ".tsv") else json_rows(path)
