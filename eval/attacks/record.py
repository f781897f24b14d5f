"""The file of `eval.robustness`: how it begins, which attacks it lacks, and its table for the terminal."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from eval.attacks.spec import Attack, Plan
from eval.files import read_json
from eval.reporting.pages import as_text
from eval.results.numbers import printed
from pipeline.data.corpus import file_digest
from pipeline.errors import InputError
from pipeline.files import Json


def digest(model: Path) -> str:
    """SHA-256 of the weight files: a run that was repeated is another model."""
    whole = hashlib.sha256()
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        whole.update(bytes.fromhex(file_digest(file)))
    return whole.hexdigest()


def begin(plan: Plan, data: Path | None, output: Path) -> Json:
    """The record with the attacks that `output` has already.

    Raises:
        InputError: `output` belongs to another model, suite, data folder or seed.
    """
    described = read_json(plan.final / "config.json")
    record = {
        "run": str(plan.run),
        "model": digest(plan.final),
        "suite": plan.suite,
        "data": data and str(data),
        "seed": plan.seed,
        "dtype": described.get("dtype") or described.get("torch_dtype"),
        "command": shlex.join(["python", "-m", "eval.robustness", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "deepspeed", "rouge-score")},
        },
        "attacks": [],
    }
    if output.exists():
        before = read_json(output)
        if not isinstance(before, dict) or not isinstance(before.get("attacks"), list):
            raise InputError(f"{output} was not written by eval.robustness; name another --output")
        for key in ("model", "suite", "data", "seed"):
            if before.get(key) != record[key]:
                other = "weights" if key == "model" else f"{key} {before.get(key)!r} instead of {record[key]!r}"
                raise InputError(f"{output} is of other {other}; name another --output, or remove it")
        record["attacks"] = before["attacks"]
    return record


def missing(attacks: Sequence[Attack], record: Json, output: Path) -> list[Attack]:
    """The attacks that the record lacks; raises InputError for an attack that it has with other settings."""
    done = {entry["name"]: entry["settings"] for entry in record["attacks"]}
    for attack in attacks:
        before, now = done.get(attack.name, attack.settings), attack.settings
        changed = [f"{key} {before.get(key)!r}" for key in now if before.get(key) != now[key]]
        if changed:
            raise InputError(f"{output} has {attack.name} with {', '.join(changed)}; name another --output")
    return [attack for attack in attacks if attack.name not in done]


def table(entries: Iterable[Json]) -> str:
    """The metrics before and after each attack; only overall scores if there are some, except for probes."""
    rows = [["attack", "metric", "original", "before", "after"]]
    for entry in entries:
        columns = [entry.get(key, {}) for key in ("original", "before", "after")]
        names = list(dict.fromkeys(name for column in columns for name in column))
        overall = {name.rpartition(".")[0] for name in names if name.lower().endswith("all")}
        overall = overall if entry["name"] != "probes" else set()  # the kinds of probes differ in strength
        for name in names:
            if name.rpartition(".")[0] not in overall or name.lower().endswith("all"):
                values = (printed(column[name]) if name in column else "–" for column in columns)
                rows.append([entry["name"], name, *values])
    return as_text(rows)
