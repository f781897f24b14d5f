"""A training run as its folder tells it, and where along its exports it is read: at matched forgetting.

A RUN folder holds `config.yaml` (resolved), `digests.json` (of the files that it names), `metrics.jsonl` (one object a
step), `evaluation.json` (what `python -m eval.run --model RUN` writes) and, if it was attacked, `robustness.json`. Runs
that differ in their seed, and in NOT_METHOD, only are one *method*. Methods forget at different speeds, so each run is
read where its forget score first falls to the level, interpolated linearly between the two evaluations around it (the
protocol of the SAGO paper's Appendix A: match forgetting, then compare).
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.files import UnusableInput, read_json, read_jsonl
from eval.measures import Measure, nearest, suite_of

Scores = dict[str, float]  # "step", and "suite.metric" -> value

COSINES = {
    "cos_forget_retain": "forget-retain",
    "cos_combined_forget": "comb-forget",
    "cos_combined_retain": "comb-retain",
}
COMB_RETAIN = "cos_combined_retain"  # cos(g, g_r)

# Keys of config.yaml that do not tell methods apart: names, places, how often is saved and measured, and what changes
# only where the same numbers are computed. Every other key does, also one that is added tomorrow.
NOT_METHOD = (
    *("output", "cache", "seed", "method"),
    *("train.micro_batch_size", "train.checkpoint_every", "train.keep_checkpoints", "train.export_every"),
    *("train.timeout", "synthesis.geometry", "synthesis.layer_geometry_every", "synthesis.spare"),
)
COVERED_BY_DIGEST = ("name", "split", "refusals")  # of a corpus, beside its path


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


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
        raise UnusableInput(f"{source} holds no scores as eval.run writes them; evaluate again") from error


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
        raise UnusableInput(f"cannot read {folder / 'config.yaml'}: {reason}; name a run folder") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableInput(f"{folder / 'config.yaml'} lacks {error}; name the folder of a run") from error
    path = folder / "evaluation.json"
    if not path.is_file():
        raise UnusableInput(
            f"{path} is missing; write it with: python -m eval.run --model {folder} --suite NAME --output {path}"
        )
    evaluation = read_json(path)
    if not isinstance(evaluation, dict) or not evaluation.get("trajectory"):
        raise UnusableInput(f"{path} holds no trajectory; give eval.run the run folder, not one of its models")
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


def dotted(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} -> {"train.steps": 5}; what is left open (null) is left out."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return {key: value for key, value in leaves.items() if value is not None}


def method_of(config: dict[str, Any], digests: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """What makes two runs seeds of one method: the whole resolved configuration without NOT_METHOD, as JSON, sorted.

    `digests` stand in for the paths that they are of: the same files in another place are the same method, other files
    in the same place are another. A run without (of an older program) is known by its paths.
    """
    corpora = [key.removesuffix("path") for key in digests if key.startswith("data.")]
    passed = {*NOT_METHOD, *(corpus + key for corpus in corpora for key in COVERED_BY_DIGEST)}
    settings = {key: value for key, value in dotted(config).items() if key not in passed}
    return tuple(sorted((key, json.dumps(value)) for key, value in {**settings, **digests}.items()))


def read_digests(path: Path) -> dict[str, str]:
    """{key of config.yaml, or `tokenizer`: digest of what it names}; {} where there is no such file."""
    digests = read_json(path) if path.is_file() else {}
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise UnusableInput(f"{path} is not as training writes it; train again, or remove it to compare by paths")
    return digests


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
        raise UnusableInput(f"{path} is no answer of eval.robustness; write it again, or remove it")
    return told


def common_suites(runs: Sequence[Run], target: Scores | None) -> list[str]:
    """The suites on which all runs, and the target model, were evaluated. Raises UnusableInput if there is none."""
    suites = [suite for suite in runs[0].suites if all(suite in run.suites for run in runs)]
    if target is not None:
        suites = [suite for suite in suites if any(suite_of(key) == suite for key in target)]
    if not suites:
        whose = "these runs and --target" if target is not None else "these runs"
        raise UnusableInput(f"{whose} have no suite in common ({runs[0].folder}: {', '.join(runs[0].suites)})")
    return suites


def prepare(run: Run, measure: Measure, target: Scores | None) -> Run:
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
                raise UnusableInput(f"{where} has no score {score} (nearest: {like}); evaluate all of suite {suite}")
    told = [scores for scores in run.trajectory if all(score in scores for score in wanted)]
    if not told:
        raise UnusableInput(f"{source}: no export has both {' and '.join(wanted)}; name other scores")
    left_out = [scores["step"] for scores in run.trajectory if scores not in told]
    return replace(run, trajectory=([target] if target else []) + told, left_out=left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Where a run is read


def at_level(trajectory: Sequence[Scores], measure: Measure) -> Scores | None:
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


def best_below(trajectory: Sequence[Scores], measure: Measure) -> Scores | None:
    """The export that keeps most of those at or below the level, which whoever stops early would take; None without."""
    low = [scores for scores in trajectory if scores[measure.forget] <= measure.level]
    return max(low, key=lambda scores: scores[measure.retain], default=None)


def lowest(run: Run, measure: Measure) -> float:
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


# ---------------------------------------------------------------------------------------------------------------------
# Seeds of one method


def differing_keys(one: Run, other: Run) -> list[str]:
    """The keys in which two methods differ."""
    return sorted({key for key, _ in {*one.method} ^ {*other.method}})


def plain_of(name: str, groups: Mapping[str, list[Run]]) -> str | None:
    """The method with rule `sum` that differs from `name` in rule and scope alone."""

    def rest(runs: list[Run]) -> dict[str, Any]:
        return {key: x for key, x in runs[0].told.items() if key not in ("synthesis.rule", "synthesis.scope")}

    found = [other for other, runs in groups.items() if runs[0].rule == "sum"]
    return next((other for other in found if other != name and rest(groups[other]) == rest(groups[name])), None)


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by method, named "forget+retain rule" and, where that is ambiguous, by the settings that differ.

    Raises:
        UnusableInput: two runs of one method and seed, which would count as two seeds.
    """
    by_method: dict[tuple[tuple[str, str], ...], list[Run]] = defaultdict(list)
    for run in runs:
        twin = next((other for other in by_method[run.method] if other.seed == run.seed), None)
        if twin is not None:
            raise UnusableInput(
                f"{twin.folder} and {run.folder} are one method and one seed ({run.seed}): the same run twice is no "
                "second seed; name one of them"
            )
        by_method[run.method].append(run)

    def short(members: list[Run]) -> str:
        return f"{members[0].objective} {members[0].rule or 'alone'}"

    groups = {}
    for method, members in by_method.items():
        rivals = [others[0] for others in by_method.values() if short(others) == short(members)]
        told = [(key, x) for key, x in method if any((key, x) not in other.method for other in rivals)]
        differing = [f"{key}={value_of(key, members[0], rivals)}" for key, _ in told]
        groups[" ".join([short(members), *differing])] = sorted(members, key=lambda run: run.seed)
    return groups


def value_of(key: str, run: Run, rivals: Iterable[Run]) -> str:
    """A setting in words: of what is known by its digest the path, or where that tells no two apart, the digest."""
    value, path = str(run.told[key]), run.paths.get(key)
    if path is None and key != "tokenizer":
        return value
    if path is not None and all(rival.told.get(key) == value or rival.paths.get(key) != path for rival in rivals):
        return path
    return re.sub("[0-9a-f]{9,}", lambda found: found[0][:8], value)
