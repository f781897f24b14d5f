"""What a score measures: the suite's protocol and its rows. Scores that measure different things are not compared.

`eval.run` writes both beside the scores; of the probes of a training they are in its config.yaml and its digests.json.
Two evaluations are compared by what both of them record, so that one of an earlier version can still be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from eval.files import read_json
from pipeline.config.sources import Probe
from pipeline.errors import InputError
from pipeline.files import Json

Conditions = dict[str, object]  # dotted key, as "shots" or "counts.forget" -> value

RECORDED = ("protocol", "shots", "limit", "forget_set", "task_versions", "sources")
PLACE = re.compile(r"; (questions|rows) of [^;]*$")  # in a protocol; the same rows may lie anywhere
FOLLOWS = ("cut", "rouge")  # counts that follow from a model's positions or its tokenizer, on the same rows
# F-All and N-All pool the sets that are there; any other set has scores of its own, which are not there without it.
POOLED = {"rwku": ("F-FB", "F-QA", "F-AA", "N-FB", "N-QA")}

# A set that both know by a better key is not compared by this one: not by its number of rows or its path if by content.
BETTER = {"counts": ("sources",), "contents": ("sources",), "places": ("sources", "contents")}
WORDS = {
    "sources": "the rows of",
    "contents": "the rows of",
    "counts": "the number of rows of",
    "places": "the source of",
}
LONGEST = 60  # characters of a value that a message quotes


class Measured(NamedTuple):
    """The conditions of the scores in a file, by suite."""

    file: Path
    suites: Mapping[str, Conditions]


def of_evaluation(file: Path, entries: Iterable[Json]) -> Measured:
    """Of what `eval.run` wrote: of each suite, on whichever exports it is.

    A broken export may have rows without a score, so the number of rows is the largest of all exports.
    """
    suites: dict[str, Conditions] = {}
    for entry in entries:
        for suite, result in entry["suites"].items():
            own = suites.setdefault(suite, {})
            own |= _leaves({key: result[key] for key in RECORDED if key in result})
            for key, number in _leaves(result.get("counts") or {}).items():
                set_name = key.removeprefix("questions.").removeprefix("documents.")
                wanted = number or set_name in POOLED.get(suite, ())
                if isinstance(number, int) and wanted and not {*key.split(".")} & {*FOLLOWS}:
                    before = own.get(f"counts.{set_name}", 0)
                    own[f"counts.{set_name}"] = max(number, before) if isinstance(before, int) else number
    for own in suites.values():
        own |= {key: anywhere(value) for key, value in own.items() if isinstance(value, str) and _is_protocol(key)}
    return Measured(file, suites)


def anywhere(protocol: str) -> str:
    """A protocol without the place of its rows, which differs between machines."""
    return PLACE.sub("", protocol)


def _is_protocol(key: str) -> bool:
    return key.partition(".")[0] == "protocol"


def _leaves(nested: Mapping[str, object], prefix: str = "") -> Conditions:
    leaves: Conditions = {}
    for key, value in nested.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def of_training(file: Path, config: Json, digests: Mapping[str, str]) -> Measured:
    """Of the probes in a run's `metrics.jsonl`: the sets of its resolved configuration.

    The digests of a run of an earlier version are of its corpora at most; its other sets are known by path and limit.
    """
    data: Json = config.get("data") or {}
    own: Json = data.get("probes") or {}
    corpora = {task: data[task] for task in ("forget", "retain") if data.get(task)}
    found: Conditions = {}
    for name, source in {**corpora, **own}.items():
        if digest := digests.get(f"data.probes.{name}.path"):
            found[f"sources.{name}"] = digest
        limit, without = source.get("limit", Probe.model_fields["limit"].default), source.get("heldout") or 0
        if name not in own and (digest := digests.get(f"data.{name}.path")):
            # What follows the first dash also depends on the objective, which no probe reads.
            found[f"contents.{name}"] = [digest.partition("-")[0], limit, without]
        place = {key: source[key] for key in Probe.model_fields if source.get(key) is not None}
        found |= _leaves({**place, "limit": limit, "heldout": without}, f"places.{name}.")
    return Measured(file, {"probes": found})


def of_target(path: Path | None) -> Measured | None:
    """Of what `eval.run` wrote for the model that the runs begin with, if it is given."""
    return None if path is None else of_evaluation(path, [read_json(path)])


def refuse_different(measured: Sequence[Measured], target: Measured | None, unused: Collection[str] = ()) -> None:
    """Raises InputError if two files have scores of one suite that do not measure the same.

    unused: suites of the target whose scores nobody reads.
    """
    distinct = list[Measured]()
    for one in measured:  # of a sweep's hundreds of runs most are alike
        if not any(one.suites == other.suites for other in distinct):
            distinct.append(one)
    with_target = [(target, one) for one in distinct] if target else []
    for one, other in (*combinations(distinct, 2), *with_target):
        for suite in sorted(one.suites.keys() & other.suites.keys()):
            found = differences(one.suites[suite], other.suites[suite])
            if found and not (one is target and suite in unused):
                raise InputError(
                    f"suite {suite} does not measure the same in {one.file} and in {other.file}, which differ in "
                    f"{', '.join(found)}; evaluate one of them again as the other was, or leave one out"
                )


def differences(one: Conditions, other: Conditions) -> list[str]:
    """What differs of that which both record, in words; nothing if their scores measure the same."""
    both = one.keys() & other.keys()

    def settled(key: str) -> bool:
        kind, _, rest = key.partition(".")
        return any(f"{better}.{rest.partition('.')[0]}" in both for better in BETTER.get(kind, ()))

    found = sorted(key for key in both if one[key] != other[key] and not settled(key))
    short = [key for key in found if not _is_protocol(key)]  # a protocol names what the others name alone
    return [_words(key, one[key], other[key]) for key in short or found]


def _words(key: str, one: object, other: object) -> str:
    kind, _, name = key.partition(".")
    values = [json.dumps(value, ensure_ascii=False, default=str) for value in (one, other)]
    what = f"{WORDS[kind]} {name}" if kind in WORDS else key
    return (
        what
        if kind in ("sources", "contents") or max(map(len, values)) > LONGEST
        else f"{what} ({' and '.join(values)})"
    )
