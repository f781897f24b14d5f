"""The answers that evaluations stored as text, paired by their prompts: the model before beside those after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.files import read_json
from eval.results.metrics import MEASURES, SUITE_WORDS, ForgetRetainMetric, suite_of
from eval.results.trajectories import Run
from pipeline.errors import InputError
from pipeline.files import Json

Texts = dict[str, list[dict[str, str]]]  # "suite.set" -> rows with prompt, expected, and answer or teacher_forced


# Suites that are to be forgotten as a whole: what must stay is measured by another suite.
FORGOTTEN = frozenset(measure.suite for measure in MEASURES if suite_of(measure.retain) != measure.suite)


@dataclass(frozen=True)
class Sides:
    """The answers of several models to one prompt; `answers` runs parallel to the names of the models.

    If `teacher_forced`, an answer is the greedy token at each place of the right one, and no model wrote it.
    """

    prompt: str
    expected: str
    answers: tuple[str, ...]
    teacher_forced: bool = False


@dataclass(frozen=True)
class Comparison:
    """Prompts by "suite.set", each with the answers of the models `names`; if `before`, the first is the target."""

    names: tuple[str, ...]
    before: bool
    sets: dict[str, list[Sides]]


ROWS = ({"prompt", "expected", "answer"}, {"prompt", "expected", "teacher_forced"})  # see eval/suites/texts.py


def texts_of(entry: Mapping[str, Any], source: Path) -> Texts:
    """The texts of one model on all suites; raises InputError if they are malformed. An old file has none."""
    found: Texts = {}
    for suite, result in (entry.get("suites") or {}).items():
        for name, rows in (result.get("texts") or {}).items():
            if not all(isinstance(row, dict) and any(keys <= row.keys() for keys in ROWS) for row in rows):
                raise InputError(f"{source}: suite {suite} has texts that eval.run did not write; evaluate again")
            found[f"{suite}.{name}"] = rows
    return found


def read_target_texts(path: Path | None) -> Texts:
    """The texts of the model that the runs begin with."""
    return {} if path is None else texts_of(read_json(path), path)


def evaluated(run: Run) -> list[Json]:
    """The models of the run that eval.run evaluated; none of a run with probes alone."""
    path = run.folder / "evaluation.json"
    return read_json(path)["trajectory"] if path.is_file() else []


def retain_seen(run: Run) -> dict[str, int] | None:
    """{"documents", "seen"} of the `retain` of suite `corpus`, if the evaluation looked into the training's corpus."""
    entries = evaluated(run)
    return (entries[-1]["suites"].get("corpus") or {}).get("retain_seen") if entries else None


def shown_step(run: Run, measure: ForgetRetainMetric) -> float:
    """The first export at or below the level, or the last export of a run that does not reach it."""
    exports = [scores for scores in run.trajectory if scores["step"]] or run.trajectory
    reached = (scores["step"] for scores in exports if scores[measure.forget] <= measure.level)
    return next(reached, exports[-1]["step"])


def compare_texts(groups: Mapping[str, Sequence[Run]], measure: ForgetRetainMetric, target: Texts) -> Comparison:
    """The target model and the first seed of each method at `shown_step`, on the prompts that all of them answered.

    The forget set of the compared suite comes first, then its other sets, then those of other suites. `sets` is empty
    if some evaluation stored no text.
    """
    columns: list[tuple[str, Texts]] = [("before", target)] if target else []
    for name, runs in groups.items():
        step = shown_step(runs[0], measure)
        entry = next((one for one in evaluated(runs[0]) if one.get("step") == step), {})
        columns.append((f"{name}, step {step:g}", texts_of(entry, runs[0].folder / "evaluation.json")))
    names = [name for name in columns[0][1] if all(name in texts for _, texts in columns)]
    names.sort(key=lambda name: (not name.startswith(f"{measure.suite}."), not is_forget(name)))
    sets = {name: pair_up([texts[name] for _, texts in columns]) for name in names}
    return Comparison(
        tuple(name for name, _ in columns), bool(target), {name: sides for name, sides in sets.items() if sides}
    )


def is_forget(name: str) -> bool:
    """Whether a set, SUITE.SET, is one to forget: `forget`, RWKU's F-FB, F-QA and F-AA, or all of WMDP's."""
    suite, _, kind = name.rpartition(".")
    return suite in FORGOTTEN or kind.startswith(("forget", "F-"))


def title_of_set(name: str, sides: Sequence[Sides]) -> str:
    """What a set is, for a reader: `bios.forget` -> What must go: forget (bios)."""
    suite, _, kind = name.partition(".")
    of = SUITE_WORDS.get(suite, suite)
    words = of if kind == "all" else f"{kind.replace('_', ' ')} ({of})"
    how = "; not written but the likeliest token at each place, after the right ones" if sides[0].teacher_forced else ""
    return f"{'What must go' if is_forget(name) else 'What should stay'}: {words}{how}"


def pair_up(columns: Sequence[list[dict[str, str]]]) -> list[Sides]:
    """The prompts of the first column that the others have too, with the answers of all."""
    forced = any("teacher_forced" in row for row in columns[0])
    field = "teacher_forced" if forced else "answer"
    answers = [{(row["prompt"], row["expected"]): row[field] for row in rows if field in row} for rows in columns]
    shared = [key for key in answers[0] if all(key in other for other in answers)]
    return [Sides(*key, tuple(column[key] for column in answers), forced) for key in shared]
