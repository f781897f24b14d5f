"""Reading and writing for the commands of this package, with errors that a reader can act on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from pipeline.config.explain import refuse_renamed
from pipeline.data.tables import json_rows
from pipeline.distributed.signals import INTERRUPTED
from pipeline.errors import InputError, denied_files
from pipeline.files import Json, unwritable
from pipeline.monitoring.rows import Rows, read_rows


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command. Returns its value or 0; 2 for unusable input or 130 after Ctrl-C, with one line on stderr.

    Any other error keeps its traceback. Of several ranks, which all get the same InputError, the first prints the line.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        with denied_files():
            return command() or 0
    except InputError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("\ninterrupted", file=sys.stderr)  # below a bar
        return INTERRUPTED


def check_output(path: Path, kind: Literal["file", "folder"] = "file") -> None:
    """Raises InputError if `--output path` cannot become a file, or a folder: before hours of work, leaving nothing."""
    if path.exists() and not (path.is_file() if kind == "file" else path.is_dir()):
        found = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"
        raise InputError(f"--output {path} is {found}; name a {kind}")
    if found := unwritable(path):
        place, error = found
        raise InputError(
            f"--output {path} cannot be written, because of {place} ({error.strerror}); name a {kind} elsewhere"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises InputError if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; give a complete JSON file") from error


def read_jsonl(path: Path, required: Iterable[str] = ()) -> list[Json]:
    """The objects of a JSON Lines file (see `json_rows`); raises InputError with the line's number."""
    rows = []
    for where, row in json_rows(path):
        missing = [key for key in required if not isinstance(row, dict) or key not in row]
        if missing or not isinstance(row, dict):
            raise InputError(f"{where}: needs an object with {', '.join(required) or 'keys'}; repair or remove it")
        rows.append(row)
    return rows


def read_log(run: Path) -> Rows:
    """The rows of a run's `metrics.jsonl`, by what they are; raises InputError if it is missing or malformed."""
    return read_rows(json_rows(run / "metrics.jsonl"))


def read_hub(path: str, name: str, split: str | None = None) -> list[Json]:
    """The rows of configuration `name` of a hub dataset, of one split or else of all; raises InputError if it cannot be
    loaded."""
    import datasets  # takes seconds

    try:
        splits = datasets.load_dataset(path, name)
    except Exception as error:  # `datasets` and the hub raise a dozen unrelated types for "not there" and "no network"
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load {path} ({name}) from the hub: {reason}; name local copies by --data") from None
    found = cast(datasets.DatasetDict, splits)
    if split is not None and split not in found:
        raise InputError(f"{path} ({name}) on the hub has no split {split}; it has {', '.join(map(str, found))}")
    return [dict(row) for key, rows in found.items() if split in (None, key) for row in rows]


def read_config(folder: Path, sections: Iterable[str]) -> Json:
    """The resolved configuration of a run, with at least `sections`.

    Raises:
        InputError: FOLDER/config.yaml is missing, malformed, lacks a section, or has the old name of a key.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read {path}: {reason}; name the folder of a run") from error
    for section in sections:
        if not isinstance(config, dict) or not isinstance(config.get(section), dict):
            raise InputError(f"{path} has no section {section}; name the folder of a run")
    refuse_renamed(config, str(path))
    return config


def check_texts(rows: object, keys: Iterable[str], where: str) -> list[Json]:
    """The rows, each an object whose `keys` hold text; raises InputError with the row's number (from 1)."""
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{where} holds no list of rows; get it again")
    keys = tuple(keys)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in keys):
            raise InputError(f"{where}, row {number}: needs text under {', '.join(keys)}; repair or remove it")
    return rows


def digest_of(rows: object) -> str:
    """SHA-256 of rows as JSON, by which two evaluations know whether they read the same."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def without_nan(value: Any) -> Any:
    """Nested lists and objects with null for each number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: Path, rows: Iterable[Json]) -> None:
    """Write one compact JSON object per line, in UTF-8 with "\\n" ends on every platform."""
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
