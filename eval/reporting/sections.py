"""Sentences and blocks that the report on runs (`eval.report`) and the report on a sweep (`eval.frontier`) share."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from eval.reporting.pages import Block, Code, Heading, Table, Text
from eval.results.metrics import ForgetRetainMetric, GeneralAbility, headlines
from eval.results.trajectories import Run, lowest


def reading(measure: ForgetRetainMetric, has_target: bool) -> str:
    """Where a run is read, which scores are compared there, and what the numbers mean."""
    chance = "" if measure.chance is None else f" A model that knows nothing scores about {measure.chance:g}."
    start = (
        "" if has_target else " Without --target, the part from the original model to the first export is not visible."
    )
    return (
        "Methods forget at different speeds, so each run is read where its forget score first falls to the level, "
        f"interpolated linearly between the two evaluations around it: {measure.forget} (lower: more forgotten) at "
        f"{measure.level:g}, compared by {measure.retain} (higher: more retained). Mean ± sample sd over seeds; scores "
        f"in [0, 1].{chance}{start}"
    )


def never_reached(missed: Iterable[tuple[str, Run]], measure: ForgetRetainMetric) -> str:
    """A sentence that lists the runs without a point at the level, by name, with the lowest forget score of each."""
    names = [f"{name}: {lowest(run, measure):.3f}" for name, run in missed]
    if not names:
        return "Every run reached the level."
    return f"Never reached the level, and are in no mean (the lowest forget score of each): {'; '.join(names)}."


def headline_columns(scores: Iterable[str], measure: ForgetRetainMetric, general: GeneralAbility) -> list[str]:
    """The retain score first, then the other headlines except the forget score, general ability last."""
    found = dict.fromkeys([*headlines(scores), *general.headlines])
    return [measure.retain, *(score for score in found if score not in (measure.forget, measure.retain))]


def how_it_was_made(runs: Sequence[Run], commands: Iterable[str]) -> list[Block]:
    """Protocols, environments, and the commands without repetition."""
    protocols = dict.fromkeys(f"{suite}: {words}" for run in runs for suite, words in run.protocols.items())
    evaluations = Counter(run.environment for run in runs)
    rows = [["of", "environment"]]
    rows += [[f"evaluation of {number} runs", words] for words, number in evaluations.items()]
    rows.append(["this report", f"python {platform.python_version()}, matplotlib {version('matplotlib')}"])
    return [
        Heading("Protocols and environment"),
        *(Text(words) for words in protocols),
        Table(rows),
        Heading("Commands"),
        Code("\n".join(dict.fromkeys(filter(None, commands)))),
    ]
