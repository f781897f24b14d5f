"""Sentences and blocks that the report on runs (`eval.report`) and the report on a sweep (`eval.frontier`) share."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from eval.reporting.advice import advise
from eval.reporting.pages import Block, Code, Heading, Table, Text, Warn
from eval.reporting.tables import standing_table
from eval.results.general import GeneralAbility
from eval.results.metrics import ForgetRetainMetric, headlines, readable
from eval.results.numbers import printed
from eval.results.trajectories import Run, lowest, starts_below


def reading(measure: ForgetRetainMetric, has_target: bool) -> str:
    """Where a run is read, which scores are compared there, and what the numbers mean."""
    chance = "" if measure.chance is None else f" A model that knows nothing scores about {measure.chance:g}."
    reason = f" {measure.reason}" if measure.reason else ""
    start = (
        "" if has_target else " Without --target, the part from the original model to the first export is not visible."
    )
    return (
        "Methods forget at different speeds, so each run is read where its forget score first falls to the level, "
        "interpolated linearly between the two evaluations around it (a score that only the second has is not "
        f"interpolated): {readable(measure.forget)} (`{measure.forget}`; lower: more forgotten) at {measure.level:g}, "
        f"compared by {readable(measure.retain)} (`{measure.retain}`; higher: more retained). Mean ± sample sd over "
        "seeds, with their number where some lack the score, the best of a column in bold; scores in [0, 1]."
        f"{reason}{chance}{start}"
    )


def early_runs(runs: Iterable[Run], measure: ForgetRetainMetric) -> list[Block]:
    """Which runs never were above the level, as far as they were evaluated: what they have there, nobody knows."""
    blocks: list[Block] = []
    if early := [str(run.folder) for run in runs if starts_below(run.trajectory, measure)]:
        blocks.append(
            Warn("Below the level from their first evaluation, so that nobody knows what they had at it, and in no "
                 f"mean at the level: {', '.join(early)}. Give --target, a lower --level, or evaluate earlier exports.")
        )  # fmt: skip
    starts = [run.trajectory[0] for run in runs if run.trajectory[0]["step"] == 0]
    if any(start[measure.forget] <= measure.level for start in starts):
        blocks.append(Warn("The model that the runs begin with is at or below the level. Give a lower --level."))
    return blocks


def never_reached(missed: Iterable[tuple[str, Run]], measure: ForgetRetainMetric) -> str:
    """A sentence that lists the runs without a point at the level, by name, with the lowest forget score of each."""
    lows = [(name, lowest(run, measure)) for name, run in missed]
    names = [f"{name}: {printed(low)}" for name, low in lows]
    if not names:
        return "No run stayed above the level."
    return f"Never reached the level, and are in no mean (the lowest forget score of each): {'; '.join(names)}."


def headline_columns(scores: Iterable[str], measure: ForgetRetainMetric, general: GeneralAbility) -> list[str]:
    """The retain score first, then the other headlines except the forget score, general ability last."""
    found = dict.fromkeys([*headlines(scores), *general.headlines])
    return [measure.retain, *(score for score in found if score not in (measure.forget, measure.retain))]


def not_reached(missed: Mapping[str, Sequence[tuple[str, Run]]], measure: ForgetRetainMetric) -> list[Block]:
    """Where the runs stand that do not reach the level, and what to try; nothing if there are none.

    Args:
        missed: by method, its runs without a point at the level, by name.
    """
    runs = [one for members in missed.values() for one in members]
    if not runs:
        return []
    furthest = {
        method: max(members, key=lambda one: one[1].trajectory[-1][measure.forget])
        for method, members in missed.items()
        if members
    }
    return [
        Heading("Runs that did not reach the level, and what to try"),
        Table(standing_table(runs, measure)),
        *(Text(f"`{name}`: {advise(run, measure)}") for name, run in furthest.values()),
    ]


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
