"""The settings of a sweep, from the grid or from Optuna, and the loop over its runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from eval.results.metrics import ForgetRetainMetric
from eval.results.trajectories import Run, at_level, lowest
from eval.sweep.axes import Setting, grid, run_folder
from eval.sweep.runs import Plan, failure_file, read_seeds, run_if_missing


def run_sweep(plan: Plan, after_run: Callable[[], object]) -> list[Path]:
    """Train and evaluate every run of the plan that is missing; calls `after_run` after each.

    Returns the failure file of each run, which exists if the run failed (see `failure_file`).
    """
    files = []
    for method in plan.methods:
        for setting in propose(plan, method):
            for seed in plan.seeds:
                files.append(failure_file(run_folder(plan.output, method, setting, seed)))
                if run_if_missing(plan, method, setting, seed):
                    after_run()
    return files


def propose(plan: Plan, method: str) -> Iterator[Setting]:
    """The settings of a method: the grid, or proposals of Optuna that learn from the finished runs.

    FOLDER/studies.db holds the study under everything that its objective depends on. The number of ended trials seeds
    the sampler, so a study that was interrupted proposes the same setting again. A setting with a failed run counts as
    tried and as worse than any other (a pruned trial without a value).
    """
    if all(axis.values for axis in plan.axes):
        yield from grid(plan.axes)
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan.output.mkdir(parents=True, exist_ok=True)
    measure = [plan.measure.forget, plan.measure.retain, plan.measure.level]
    identity = [method, [repr(axis) for axis in plan.axes], plan.seeds, measure, bool(plan.target)]
    study = optuna.create_study(
        storage=f"sqlite:///{(plan.output / 'studies.db').resolve()}",
        study_name=json.dumps(identity),
        direction="maximize",
        load_if_exists=True,
    )
    states = optuna.trial.TrialState
    for left_over in study.get_trials(states=(states.RUNNING,)):
        study.tell(left_over.number, state=states.FAIL)
    while (ended := len(study.get_trials(states=(states.COMPLETE, states.PRUNED)))) < plan.trials:
        study.sampler = optuna.samplers.TPESampler(seed=ended)
        trial = study.ask()
        setting = {}
        for axis in plan.axes:
            if axis.values:
                setting[axis.key] = trial.suggest_categorical(axis.key, axis.values)
            else:  # four digits, so that a user can type the setting
                setting[axis.key] = f"{trial.suggest_float(axis.key, axis.low, axis.high, log=True):.4g}"
        yield setting
        folders = [run_folder(plan.output, method, setting, seed) for seed in plan.seeds]
        if any(failure_file(folder).is_file() for folder in folders):
            study.tell(trial, state=states.PRUNED)
        else:
            runs = read_seeds(plan, method, setting, plan.seeds)
            study.tell(trial, fmean(trial_score(run, plan.measure) for run in runs))


def trial_score(run: Run, measure: ForgetRetainMetric) -> float:
    """Retain score at the level, in [0, 1]; for a run that never reaches it, minus the distance to it."""
    point = at_level(run.trajectory, measure)
    return point[measure.retain] if point else measure.level - lowest(run, measure)
