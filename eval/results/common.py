"""What runs have in common: the suites on which they were evaluated, and the model that they began with."""

from __future__ import annotations

from collections.abc import Sequence

from eval.results.conditions import Measured, refuse_different
from eval.results.metrics import suite_of
from eval.results.trajectories import Run, Scores
from pipeline.errors import InputError


def known_before(runs: Sequence[Run]) -> set[str]:
    """`probes`, if all runs were probed before their first step: these scores are of the target model."""
    return {"probes"} if all(run.probes and run.probes[0]["step"] == 0 for run in runs) else set()


def common_suites(runs: Sequence[Run], target: Scores | None, of_target: Measured | None = None) -> list[str]:
    """The suites on which all runs and the target model were evaluated; `of_target`: what its scores measure.

    Probes before the first step are of the target model.

    Raises:
        InputError: there is none, or scores of one suite do not measure the same (`refuse_different`).
    """
    known = known_before(runs)
    refuse_different([one for run in runs for one in run.measured], of_target, unused=known)
    suites = [suite for suite in runs[0].suites if all(suite in run.suites for run in runs)]
    if target is not None:
        there = known | {suite_of(key) for key in target if key != "step"}
        suites = [suite for suite in suites if suite in there]
    if not suites:
        of = {", ".join(run.suites) or "none": str(run.folder) for run in reversed(runs)}  # a run for each list
        found = [f"{folder}: {suites}" for suites, folder in reversed(of.items())]
        if target is not None:
            found.append(f"--target: {', '.join(dict.fromkeys(suite_of(key) for key in target if key != 'step'))}")
        whose = "these runs and --target" if target is not None else "these runs"
        raise InputError(f"{whose} have no suite in common ({'; '.join(found)}); evaluate all on the same suites")
    return suites


def common_start(runs: Sequence[Run], target: Scores | None) -> Scores | None:
    """The scores before the first step of runs that `prepare` has returned; None where they are not known.

    Without a target these are what a probe measured, if all runs began with one model.
    """
    starts = [run.trajectory[0] for run in runs]
    begins = target is not None or len({run.model for run in runs}) == 1
    return starts[0] if starts and begins and not any(start["step"] for start in starts) else None
