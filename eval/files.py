"""Reading and writing for the commands of this package: complete files or none, and errors a reader can act on."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.data.corpus import json_rows
from pipeline.errors import InputError


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command: what it returns or 0, 2 unusable input (one line on stderr). Any other error keeps its traceback.

    Of several ranks, which all meet the same unusable input, the first one prints the line.
    """
    try:
        return command() or 0
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises UnusableInput when it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; give a complete JSON file") from error


def read_jsonl(path: Path, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file (see `pipeline.corpus`); raises UnusableInput with the line's number."""
    rows = []
    for where, row in json_rows(path):
        missing = [key for key in required if not isinstance(row, dict) or key not in row]
        if missing or not isinstance(row, dict):
            raise InputError(f"{where}: needs an object with {', '.join(required) or 'keys'}; repair or remove it")
        rows.append(row)
    return rows


def read_hub(path: str, name: str) -> list[dict[str, Any]]:
    """The rows of a configuration of a hub dataset; raises UnusableInput when it cannot be had."""
    import datasets  # takes seconds

    try:
        splits: Any = datasets.load_dataset(path, name)
    except Exception as error:  # `datasets` and the hub raise a dozen unrelated types for "not there" and "no network"
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load {path} ({name}) from the hub: {reason}; name local copies by --data") from None
    return [dict(row) for split in splits.values() for row in split]


def check_texts(rows: Any, keys: Iterable[str], where: str) -> list[dict[str, Any]]:
    """The rows, each an object whose `keys` hold text; raises UnusableInput with the row's number (from 1)."""
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{where} holds no list of rows; get it again")
    keys = tuple(keys)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in keys):
            raise InputError(f"{where}, row {number}: needs text under {', '.join(keys)}; repair or remove it")
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One compact JSON object a line, in UTF-8 with "\\n" ends on every platform."""
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it, so that a reader or a kill never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a report from colleagues
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
