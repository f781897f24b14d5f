"""A training run, read from its folder, and the point of its trajectory where it is compared: at matched forgetting.

A RUN folder holds `config.yaml` (resolved), `digests.json` (of the files that it names), `metrics.jsonl` (one object
per step), `evaluation.json` (from `python -m eval.run --model RUN`) and, if it was attacked, `robustness.json`. A run
with probes (`train.probe_every`) has a trajectory in `metrics.jsonl`, and needs no evaluation. Runs that differ only in
their seed and in NOT_METHOD are one *method*. Methods forget at different speeds, so each run is read where its forget
score first falls to the level, interpolated linearly between the two evaluations around it (the protocol of the SAGO
paper's Appendix A: match forgetting, then compare).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from eval.files import read_config, read_json, read_log
from eval.results.conditions import Measured, of_evaluation, of_training
from eval.results.general import GeneralAbility, general_ability
from eval.results.method import dotted, method_of, read_digests
from eval.results.metrics import ForgetRetainMetric, flatten, nearest, suite_of
from eval.suites.probes import PROTOCOL
from pipeline.errors import InputError
from pipeline.files import Json

Scores = dict[str, float]  # "step", and "suite.metric" -> value

COSINES = {
    "cos_forget_retain": "forget-retain",
    "cos_combined_forget": "comb-forget",
    "cos_combined_retain": "comb-retain",
}
COMB_RETAIN = "cos_combined_retain"  # cos(g, g_r)


@dataclass(frozen=True)
class Run:
    """One training run: its method (see `method_of`), its steps and its evaluated trajectory."""

    folder: Path
    method: tuple[tuple[str, str], ...]  # dotted key -> value as JSON; for files the digest of their content
    seed: int
    model: str
    steps: list[Json]
    trajectory: list[Scores]  # of the evaluation; of the probes, if there is none
    probes: list[Scores] = field(default_factory=list)  # while it trained
    left_out: list[float] = field(default_factory=list)  # steps of exports whose forget or retain score is not finite
    command: str = ""
    environment: str = ""
    protocols: dict[str, str] = field(default_factory=dict)  # suite -> words
    general: GeneralAbility = field(default_factory=GeneralAbility)
    robustness: Json | None = None
    paths: dict[str, str] = field(default_factory=dict)  # for the keys of `method` that are digests
    measured: tuple[Measured, ...] = ()  # what the scores of the probes, and of the evaluation, measure
    asked: tuple[tuple[str, ...], ...] = ()  # the suites of each evaluated export, whether it has scores of them or not

    @property
    def settings(self) -> Json:
        """The settings by their dotted keys."""
        return {key: json.loads(value) for key, value in self.method}

    @property
    def objective(self) -> str:
        """`forget+retain`, as ga+nll; for a run with one task, the objective of that task."""
        return "+".join(
            name for task in ("forget", "retain") if (name := str(self.settings.get(f"objective.{task}"))) != "none"
        )

    @property
    def rule(self) -> str | None:
        """The rule that combines the two gradients; None for a run with one task."""
        return str(self.settings.get("synthesis.rule")) if "+" in self.objective else None

    @property
    def suites(self) -> list[str]:
        """The suites that every export has, in the order of the first; and `probes` of a run that has probes."""
        of_each = self.asked or [[suite_of(key) for key in scores if key != "step"] for scores in self.trajectory]
        of_all = [suite for suite in dict.fromkeys(of_each[0]) if all(suite in others for others in of_each)]
        return list(dict.fromkeys([*of_all, *(["probes"] if self.probes else [])]))


def read_scores(entry: Json, source: Path, step: int | None = None) -> Scores:
    """The scores of one model on all suites: {"suites": {suite: {"metrics": …}}} -> {"step", "suite.metric"}.

    Raises:
        InputError: the entry does not have the form that eval.run writes; names `source`.
    """
    try:
        scores = flatten({suite: result["metrics"] for suite, result in entry["suites"].items()})
        return {"step": float(entry["step"] if step is None else step), **scores}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{source} holds no scores as eval.run writes them; evaluate again") from error


def read_target(path: Path | None) -> Scores | None:
    """The scores of the model that the runs begin with, as step 0; raises InputError if `path` has not one model's."""
    if path is None:
        return None
    content = read_json(path)
    if isinstance(content, dict) and "trajectory" in content:
        raise InputError(
            f"--target {path} is the evaluation of a run; give that of the model before unlearning, which "
            "`python -m eval.run --model MODEL` writes"
        )
    return read_scores(content, path, step=0)


def read_run(folder: Path) -> Run:
    """Read a run folder, with the scores of all its suites; raises InputError for a missing or malformed file."""
    config = read_config(folder, ("synthesis", "objective", "optimizer"))
    if "seed" not in config:
        raise InputError(f"{folder / 'config.yaml'} has no seed; name the folder of a run")
    seed, model = config["seed"], (config.get("model") or {}).get("path", "unknown")
    steps, probes = read_steps(folder)
    path = folder / "evaluation.json"
    if not path.is_file() and not probes:
        raise InputError(
            f"{path} is missing; write it with: python -m eval.run --model {folder} --suite NAME --output {path} (or "
            "train with train.probe_every)"
        )
    digests = read_digests(folder / "digests.json")
    run = Run(
        folder=folder,
        method=method_of(config, digests),
        seed=seed,
        model=model,
        steps=steps,
        trajectory=probes,
        probes=probes,
        environment="probes, by the training itself",
        protocols={"probes": PROTOCOL},
        robustness=read_robustness(folder / "robustness.json"),
        paths={key: str(path) for key, path in dotted(config).items() if key in digests},
        measured=(of_training(folder / "metrics.jsonl", config, digests),) if probes else (),
    )
    return with_evaluation(run, path) if path.is_file() else run


def with_evaluation(run: Run, path: Path) -> Run:
    """The run with the trajectory of its evaluation; raises InputError if eval.run has not written the file."""
    evaluation = read_json(path)
    if not isinstance(evaluation, dict) or not evaluation.get("trajectory"):
        raise InputError(f"{path} holds no trajectory; give eval.run the run folder, not one of its models")
    versions = ", ".join(f"{name} {number}" for name, number in evaluation.get("versions", {}).items())
    ranks = evaluation.get("ranks", 1)
    own = {"probes": PROTOCOL} if run.probes else {}
    trajectory = [read_scores(entry, path) for entry in evaluation["trajectory"]]
    for before, after in pairwise(trajectory):
        if after["step"] <= before["step"]:
            raise InputError(f"{path} has step {after['step']:g} after step {before['step']:g}; evaluate again")
    return replace(
        run,
        trajectory=trajectory,
        command=evaluation.get("command", f"# {path} does not record its command"),
        environment=f"{versions}; {evaluation.get('dtype', 'dtype unknown')}; {ranks} rank{'s' * (ranks != 1)}",
        protocols=own | {suite: protocol(one) for suite, one in evaluation["trajectory"][-1]["suites"].items()},
        general=general_ability(evaluation["trajectory"][-1]["suites"]),
        measured=(*run.measured, of_evaluation(path, evaluation["trajectory"])),
        asked=tuple(tuple(entry["suites"]) for entry in evaluation["trajectory"]),
    )


def read_steps(folder: Path) -> tuple[list[Json], list[Scores]]:
    """The rows of a run's steps in `metrics.jsonl`, and the scores of its probes, which may begin before its first.

    Raises:
        InputError: no such file, or a row that training does not write.
    """
    log, needed = read_log(folder), ("forget_loss", "retain_loss", *COSINES)
    for row in log.steps:
        if any(key not in row for key in needed):
            raise InputError(
                f"{folder / 'metrics.jsonl'}, step {row['step']}: needs an object with {', '.join(needed)}; repair or "
                "remove it"
            )
    return log.steps, [probes_of(row) for row in log.probed]


def probes_of(row: Json) -> Scores:
    """The scores of the probes in a row of `metrics.jsonl`, as those of suite `probes`."""
    numbers = {key.removeprefix("probe/"): value for key, value in row.items() if key.startswith("probe/")}
    return {
        "step": float(row["step"]),
        **flatten({key.replace("/", "."): value for key, value in numbers.items()}, "probes"),
    }


def protocol(suite: Json) -> str:
    """The protocol of a suite in words; several protocols with their names."""
    found = suite.get("protocol", "unknown")
    return found if isinstance(found, str) else "; ".join(f"{name}: {words}" for name, words in found.items())


def read_robustness(path: Path) -> Json | None:
    """The results of the attacks on a run; None if there is no such file. Raises InputError if it is malformed."""
    if not path.is_file():
        return None
    content = read_json(path)
    attacks = content.get("attacks") if isinstance(content, dict) and isinstance(content.get("suite"), str) else None
    needed = {"name": str, "before": dict, "after": dict}
    if not isinstance(attacks, list) or not all(
        isinstance(attack, dict) and all(isinstance(attack.get(key), kind) for key, kind in needed.items())
        for attack in attacks
    ):
        raise InputError(f"{path} was not written by eval.robustness; write it again, or remove it")
    return content


def prepare(run: Run, measure: ForgetRetainMetric, target: Scores | None) -> Run:
    """The run with the target model as its step 0, without exports that lack a score of the metric.

    Raises:
        InputError: a score is lower for a better model, no export has both, or the target lacks one; names the most
            similar score.
    """
    wanted = (measure.forget, measure.retain)
    source = run.folder / "evaluation.json"
    for option, score in zip(("--forget", "--retain"), wanted, strict=True):
        if score in run.general.lower_is_better:
            raise InputError(
                f"{option} {score}: a better model has a lower one ({source}), and runs are compared by scores that "
                "are higher for it; name such a score, as lm_eval.TASK.acc"
            )
    if measure.suite == "probes" and run.probes:
        evaluated = {} if run.trajectory is run.probes else {scores["step"]: scores for scores in run.trajectory}
        source = run.folder / "metrics.jsonl"
        steps = [{**scores, **evaluated.get(scores["step"], {})} for scores in run.probes]
        if target and steps[0]["step"] == 0:  # the probe before training has measured it, on its own suite
            steps[0], target = {**target, **steps[0]}, None
        run = replace(run, trajectory=steps)
    for score in wanted:
        for scores, where in ((run.trajectory, source), ([target] if target else [], "--target")):
            names = {key for entry in scores for key in entry} - {"step"}
            if names and score not in names:
                suite, like = suite_of(score), nearest(score, names)
                raise InputError(f"{where} has no score {score} (nearest: {like}); evaluate all of suite {suite}")
    complete = [scores for scores in run.trajectory if all(score in scores for score in wanted)]
    if not complete:
        raise InputError(f"{source}: no export has both {' and '.join(wanted)}; name other scores")
    left_out = [scores["step"] for scores in run.trajectory if scores not in complete]
    return replace(run, trajectory=([target] if target else []) + complete, left_out=left_out)


def at_level(trajectory: Sequence[Scores], measure: ForgetRetainMetric) -> Scores | None:
    """All scores, and the step, where the forget score first falls to the level; None if it never does.

    The values are linear between the last evaluation above the level and the first at or below it. A score that the
    former lacks is that of the latter, as of a run that ends at the level and whose final model alone was evaluated on
    a suite. A trajectory that starts at or below the level is read at its first point (see `starts_below`).
    """
    forget, level = measure.forget, measure.level
    for before, after in zip([None, *trajectory], trajectory, strict=False):
        if after[forget] <= level:
            if before is None:
                return after
            share = (before[forget] - level) / (before[forget] - after[forget])
            between = {key: before[key] + share * (after[key] - before[key]) for key in after if key in before}
            return {**after, **between}
    return None


def starts_below(trajectory: Sequence[Scores], measure: ForgetRetainMetric) -> bool:
    """Whether the first evaluation, after steps of training, is below the level: when the run was at it, nobody knows.

    Such runs have forgotten more than the level, each by another amount, so their scores are no comparison at it.
    """
    return trajectory[0]["step"] > 0 and trajectory[0][measure.forget] < measure.level


def matched(trajectory: Sequence[Scores], measure: ForgetRetainMetric) -> Scores | None:
    """`at_level` of a run that falls to the level; None for one that `starts_below` it, which is no match."""
    return None if starts_below(trajectory, measure) else at_level(trajectory, measure)


def best_below(trajectory: Sequence[Scores], measure: ForgetRetainMetric) -> Scores | None:
    """The export at or below the level with the highest retain score, which early stopping would select, or None."""
    low = [scores for scores in trajectory if scores[measure.forget] <= measure.level]
    return max(low, key=lambda scores: scores[measure.retain], default=None)


def lowest(run: Run, measure: ForgetRetainMetric) -> float:
    """The lowest forget score of the run's exports."""
    return min(scores[measure.forget] for scores in run.trajectory)


def mean_of(run: Run, key: str, until: float = math.inf) -> float | None:
    """Mean of a logged number over the steps, up to `until`, that have it; None if no step has."""
    steps = [step for step in run.steps if step["step"] <= until]
    values = [step[key] for step in steps if step.get(key) is not None and math.isfinite(step[key])]
    return fmean(values) if values else None


def step_means(runs: Iterable[Run], key: str) -> tuple[list[int], list[float]]:
    """(steps, mean over the runs that logged `key` at that step)."""
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step in run.steps:
            if step.get(key) is not None and math.isfinite(step[key]):
                values[step["step"]].append(step[key])
    return sorted(values), [fmean(values[step]) for step in sorted(values)]
