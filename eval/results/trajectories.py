"""A training run as its folder tells it, and where along its exports it is read: at matched forgetting.

A RUN folder holds `config.yaml` (resolved), `digests.json` (of the files that it names), `metrics.jsonl` (one object a
step), `evaluation.json` (what `python -m eval.run --model RUN` writes) and, if it was attacked, `robustness.json`. Runs
that differ in their seed, and in NOT_METHOD, only are one *method*. Methods forget at different speeds, so each run is
read where its forget score first falls to the level, interpolated linearly between the two evaluations around it (the
protocol of the SAGO paper's Appendix A: match forgetting, then compare).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.files import read_json, read_jsonl
from eval.results.method import dotted, method_of, read_digests
from eval.results.metrics import ForgetRetainMetric, nearest, suite_of
from pipeline.errors import InputError

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
    method: tuple[tuple[str, str], ...]  # dotted key -> value as JSON; of what is known by content, the digest
    seed: int
    model: str
    steps: list[dict[str, Any]]
    trajectory: list[Scores]
    left_out: list[float] = field(default_factory=list)  # steps of exports whose forget or retain score is no number
    command: str = ""
    environment: str = ""
    protocols: dict[str, str] = field(default_factory=dict)  # suite -> words
    robustness: dict[str, Any] | None = None
    paths: dict[str, str] = field(default_factory=dict)  # of the keys of `method` that are digests

    @property
    def told(self) -> dict[str, Any]:
        """The settings by their dotted keys."""
        return {key: json.loads(value) for key, value in self.method}

    @property
    def objective(self) -> str:
        """`forget+retain`, as ga+nll; the one objective of a run without the other task."""
        return "+".join(
            name for task in ("forget", "retain") if (name := str(self.told.get(f"objective.{task}"))) != "none"
        )

    @property
    def rule(self) -> str | None:
        """What combines the two gradients; None where there is one."""
        return str(self.told.get("synthesis.rule")) if "+" in self.objective else None

    @property
    def suites(self) -> list[str]:
        """Those that every export has, in the order of the first."""
        of_each = [[suite_of(key) for key in scores if key != "step"] for scores in self.trajectory]
        return [suite for suite in dict.fromkeys(of_each[0]) if all(suite in others for others in of_each)]


def flatten(value: Any, name: str) -> Scores:
    """{"forget": {"all": 0.5}, "utility": None}, "s" -> {"s.forget.all": 0.5}; what is not finite is left out."""
    if isinstance(value, dict):
        return {key: x for part, inner in value.items() for key, x in flatten(inner, f"{name}.{part}").items()}
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return {name: float(value)} if number else {}


def read_scores(entry: Any, source: Path, step: int | None = None) -> Scores:
    """The scores of one model, of all suites: {"suites": {suite: {"metrics": …}}} -> {"step", "suite.metric"}.

    Raises UnusableInput, naming `source`, if that is not what eval.run writes.
    """
    try:
        at = entry["step"] if step is None else step
        scores = {key: x for suite, of in entry["suites"].items() for key, x in flatten(of["metrics"], suite).items()}
        return {"step": float(at), **scores}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source} holds no scores as eval.run writes them; evaluate again") from error


def read_target(path: Path | None) -> Scores | None:
    """The scores of the model that the runs begin with, as step 0."""
    return None if path is None else read_scores(read_json(path), path, step=0)


def read_run(folder: Path) -> Run:
    """Read a run folder, with the scores of all its suites; raises UnusableInput for what is missing or malformed."""
    import yaml

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        for section in ("synthesis", "objective", "optimizer"):
            config[section].keys()
        seed, model = config["seed"], (config.get("model") or {}).get("path", "unknown")
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read {folder / 'config.yaml'}: {reason}; name a run folder") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.yaml'} lacks {error}; name the folder of a run") from error
    path = folder / "evaluation.json"
    if not path.is_file():
        raise InputError(
            f"{path} is missing; write it with: python -m eval.run --model {folder} --suite NAME --output {path}"
        )
    evaluation = read_json(path)
    if not isinstance(evaluation, dict) or not evaluation.get("trajectory"):
        raise InputError(f"{path} holds no trajectory; give eval.run the run folder, not one of its models")
    digests = read_digests(folder / "digests.json")
    versions = ", ".join(f"{name} {number}" for name, number in evaluation.get("versions", {}).items())
    ranks = evaluation.get("ranks", 1)
    return Run(
        folder=folder,
        method=method_of(config, digests),
        seed=seed,
        model=model,
        steps=read_jsonl(folder / "metrics.jsonl", required=("step", "forget_loss", "retain_loss", *COSINES)),
        trajectory=[read_scores(entry, path) for entry in evaluation["trajectory"]],
        command=evaluation.get("command", f"# {path} does not say how it was made"),
        environment=f"{versions}; {evaluation.get('dtype', 'dtype unknown')}; {ranks} rank{'s' * (ranks != 1)}",
        protocols={suite: protocol(of) for suite, of in evaluation["trajectory"][-1]["suites"].items()},
        robustness=read_robustness(folder / "robustness.json"),
        paths={key: str(path) for key, path in dotted(config).items() if key in digests},
    )


def protocol(suite: dict[str, Any]) -> str:
    """How a suite was asked, in words; of several protocols by their names."""
    told = suite.get("protocol", "not told")
    return told if isinstance(told, str) else "; ".join(f"{name}: {words}" for name, words in told.items())


def read_robustness(path: Path) -> dict[str, Any] | None:
    """What the attacks on a run came to, as they were written; None if there were none. Raises UnusableInput."""
    if not path.is_file():
        return None
    told = read_json(path)
    attacks = told.get("attacks") if isinstance(told, dict) and isinstance(told.get("suite"), str) else None
    needed = {"name": str, "before": dict, "after": dict}
    if not isinstance(attacks, list) or not all(
        isinstance(attack, dict) and all(isinstance(attack.get(key), kind) for key, kind in needed.items())
        for attack in attacks
    ):
        raise InputError(f"{path} is no answer of eval.robustness; write it again, or remove it")
    return told


def common_suites(runs: Sequence[Run], target: Scores | None) -> list[str]:
    """The suites on which all runs, and the target model, were evaluated. Raises UnusableInput if there is none."""
    suites = [suite for suite in runs[0].suites if all(suite in run.suites for run in runs)]
    if target is not None:
        suites = [suite for suite in suites if any(suite_of(key) == suite for key in target)]
    if not suites:
        whose = "these runs and --target" if target is not None else "these runs"
        raise InputError(f"{whose} have no suite in common ({runs[0].folder}: {', '.join(runs[0].suites)})")
    return suites


def prepare(run: Run, measure: ForgetRetainMetric, target: Scores | None) -> Run:
    """The run with the target model as its step 0, without exports of which a score of the measure is no number.

    Raises:
        UnusableInput: no export has both scores, or the target lacks one; names the score most like it.
    """
    wanted = (measure.forget, measure.retain)
    source = run.folder / "evaluation.json"
    for score in wanted:
        for scores, where in ((run.trajectory, source), ([target] if target else [], "--target")):
            names = {key for entry in scores for key in entry} - {"step"}
            if names and score not in names:
                suite, like = suite_of(score), nearest(score, names)
                raise InputError(f"{where} has no score {score} (nearest: {like}); evaluate all of suite {suite}")
    told = [scores for scores in run.trajectory if all(score in scores for score in wanted)]
    if not told:
        raise InputError(f"{source}: no export has both {' and '.join(wanted)}; name other scores")
    left_out = [scores["step"] for scores in run.trajectory if scores not in told]
    return replace(run, trajectory=([target] if target else []) + told, left_out=left_out)


def at_level(trajectory: Sequence[Scores], measure: ForgetRetainMetric) -> Scores | None:
    """All scores, and the step, where the forget score first falls to the level; None if it never does.

    Linear between the last evaluation above the level and the first at or below it; a score that one of the two lacks
    is left out. A trajectory that starts at or below the level is read at its first point.
    """
    forget, level = measure.forget, measure.level
    for before, after in zip([None, *trajectory], trajectory, strict=False):
        if after[forget] <= level:
            if before is None:
                return after
            share = (before[forget] - level) / (before[forget] - after[forget])
            return {key: before[key] + share * (after[key] - before[key]) for key in after if key in before}
    return None


def best_below(trajectory: Sequence[Scores], measure: ForgetRetainMetric) -> Scores | None:
    """The export that keeps most of those at or below the level, which whoever stops early would take; None without."""
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
