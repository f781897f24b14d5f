"""The runs of a sweep: each is trained and evaluated once, by the commands that a user would give.

The launcher trains one run at a time. The files are the state: a finished run has an `evaluation.json` (or, where the
probes of the training are all that is compared, its final model), a failed one has a `seed-N.failure.json` beside its
folder, and the same command continues from there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

import yaml

from eval.files import read_config, read_json
from eval.results.grouping import differing_keys
from eval.results.metrics import ForgetRetainMetric, nearest
from eval.results.trajectories import Run, Scores, prepare, read_run
from eval.suites.task_options import task_arguments
from eval.sweep.axes import Axis, Setting, name_of, run_folder
from eval.sweep.launch import call, last_error
from pipeline.config.explain import refuse_renamed
from pipeline.config.load import resolve
from pipeline.distributed.launcher import rank_launcher, startable
from pipeline.errors import InputError
from pipeline.files import Json, write_whole

DEFAULT_TRIALS = 20  # the sampler's first ten are random


LAST_LINES = 10  # of a failed command's log


def trust_options(model: Json) -> list[str]:
    """The options of `eval.run` that allow what the section `model` of a configuration allows."""
    flags = {"allow_pickle": "--allow-pickle", "trust_remote_code": "--trust-remote-code"}
    return [flag for key, flag in flags.items() if model.get(key)]


@dataclass(frozen=True)
class Plan:
    """The settings that all runs of a sweep share."""

    config: Path
    overrides: tuple[str, ...]
    suites: tuple[str, ...]
    data: Path | None
    measure: ForgetRetainMetric
    target: Scores | None
    output: Path
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    axes: tuple[Axis, ...]
    ranks: int
    trials: int
    target_file: Path | None = None  # of `target`
    tasks: Json = field(default_factory=dict)  # the options of suite lm_eval, as `task_options` returns them

    @property
    def last_file(self) -> str:
        """What a finished run has in its folder: probes are measured while it trains, other suites after it."""
        return "final" if self.suites == ("probes",) else "evaluation.json"

    def training(self, method: str, setting: Setting, seed: int, launcher: Sequence[str] = ()) -> list[str]:
        """The command of one run, by the `launcher` of this machine (`rank_launcher`), or else for any machine."""
        settings = [part for key, value in setting.items() for part in (f"--{key}", value)]
        return [
            *(launcher or ("deepspeed", "--num_gpus", str(self.ranks))),
            *("--module", "pipeline.train"),
            *("--config", str(self.config), "--method", method, "--seed", str(seed)),
            *("--output", str(run_folder(self.output, method, setting, seed)), *self.overrides, *settings),
        ]

    def evaluation(self, folder: Path) -> list[str]:
        """The command that evaluates one run, which has a config.yaml; it trusts the model as the training did."""
        trust = trust_options(read_config(folder, ("model",))["model"])
        data = ["--data", str(self.data)] if self.data else []
        model = ["--model", str(folder), "--suite", *self.suites, *task_arguments(self.tasks), *trust]
        return ["python", "-m", "eval.run", *model, *data, "--output", str(folder / "evaluation.json")]


@dataclass(frozen=True)
class FailedRun:
    """A run whose training or evaluation ended with an error; it is tried again by the next command."""

    method: str
    setting: Setting
    seed: int
    what: str  # "training" or "evaluating"
    status: int
    reason: str  # the line that explains the failure
    lines: list[str]  # the last lines of its stderr
    log: str


def last_lines(log: Path) -> list[str]:
    """The last lines of a log that are not blank; the carriage return of a progress bar also ends a line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def failure_file(folder: Path) -> Path:
    return folder.with_suffix(".failure.json")


def run_if_missing(plan: Plan, method: str, setting: Setting, seed: int) -> bool:
    """Train and evaluate one run as far as either is missing; False if nothing is.

    A run that was interrupted continues from its last checkpoint; without one it is removed and starts again. A command
    that fails leaves a `FailedRun` beside the run folder and raises nothing, so that the sweep continues.
    """
    folder = run_folder(plan.output, method, setting, seed)
    if (folder / plan.last_file).exists():
        return False
    title = f"{method}, {name_of(setting)}, seed {seed}"
    failure_file(folder).unlink(missing_ok=True)

    def fail(what: str, status: int, log: Path) -> bool:
        failure = FailedRun(method, setting, seed, what, status, last_error(log), last_lines(log), str(log))
        write_whole(failure_file(folder), json.dumps(asdict(failure), indent=1) + "\n")
        print(f"failed     {title}: {failure.reason}; the log is {log}", file=sys.stderr, flush=True)
        return True

    if not (folder / "final").exists():
        resumable = any(folder.glob("checkpoints/step-*/complete.json"))
        if not resumable and folder.exists():
            shutil.rmtree(folder)
        print(f"training   {title}{' (resumed)' if resumable else ''}", flush=True)
        line = plan.training(method, setting, seed, rank_launcher(plan.ranks)) + ["--resume"] * resumable
        status = call(startable(line), folder.with_suffix(".training"))
        if status or not (folder / "final").exists():
            return fail("training", status, folder.with_suffix(".training.err"))
    if (folder / plan.last_file).exists():
        return True
    print(f"evaluating {title}", flush=True)
    if status := call([sys.executable, *plan.evaluation(folder)[1:]], folder.with_suffix(".evaluation")):
        return fail("evaluating", status, folder.with_suffix(".evaluation.err"))
    return True


def failures(plan: Plan) -> list[FailedRun]:
    """The failed runs of the plan's methods and seeds in its folder, including those of earlier sweeps."""
    found = []
    for method in plan.methods:
        for file in sorted((plan.output / "runs" / quote(method, safe="")).glob("*/seed-*.failure.json")):
            failure = FailedRun(**read_json(file))
            if failure.seed in plan.seeds:
                found.append(failure)
    return found


def finished_runs(plan: Plan, method: str) -> dict[str, list[int]]:
    """{folder of a setting: its finished seeds} among the plan's seeds, including those of earlier sweeps."""
    found: dict[str, list[int]] = {}
    for file in (plan.output / "runs" / quote(method, safe="")).glob(f"*/seed-*/{plan.last_file}"):
        seed = int(file.parent.name.removeprefix("seed-"))
        if seed in plan.seeds:
            found.setdefault(file.parent.parent.name, []).append(seed)
    return {folder: sorted(seeds) for folder, seeds in found.items()}


def read_finished(plan: Plan, method: str, setting: Setting, seed: int) -> Run:
    """A finished run, with the target model as its step 0."""
    return prepare(read_run(run_folder(plan.output, method, setting, seed)), plan.measure, plan.target)


def read_seeds(plan: Plan, method: str, setting: Setting, seeds: Sequence[int]) -> list[Run]:
    """The finished runs of one method in one setting.

    Raises:
        InputError: they differ in more than their seed, for instance because the data or the model changed.
    """
    runs = [read_finished(plan, method, setting, seed) for seed in seeds]
    for run in runs:
        if keys := differing_keys(runs[0], run):
            raise InputError(
                f"{runs[0].folder} and {run.folder} are not seeds of one method: they differ in {', '.join(keys)} (of "
                "a path, the content); remove those that are out of date, or name another --output"
            )
    return runs


def read_presets(config: Path, methods: Sequence[str]) -> Json:
    """The keys of the recipe that decide these methods' runs: {"base": shared keys, "methods": {name: preset}}."""
    try:
        recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
        presets = recipe.pop("methods")
        recipe.pop("suites", None)  # the plan has them
        known = list(presets)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read --config {config}: {' '.join(str(error).split())}; name a recipe") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--config {config} has no table methods:; name a recipe that has") from error
    refuse_renamed(recipe, str(config))
    for method in methods:
        refuse_renamed(presets.get(method), f"{config}: methods.{method}")
        if method not in known:
            raise InputError(
                f"{config} has no method {method!r}; the nearest is {nearest(method, known)!r} ({', '.join(known)})"
            )
    return {"base": recipe, "methods": {method: presets[method] for method in methods}}


def recipe_suites(config: Path) -> list[str]:
    """The suites that a recipe names under `suites:`; if it names none, `corpus` for one with `data:`, else `bios`.

    Raises:
        InputError: `suites:` is no list of names.
    """
    recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
    named = recipe.get("suites") or (["corpus"] if "data" in recipe else ["bios"])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{config}: suites: write a list of names, as [bios], not {named!r}")
    return named


def refuse_without_probes(plan: Plan) -> None:
    """Raises InputError if probes are compared and a method makes none, before it is trained."""
    for method in plan.methods if "probes" in plan.suites else ():
        config = resolve(plan.config, method, ["--output", str(plan.output), *plan.overrides])
        if not config.train.probe_every:
            raise InputError(f"--suite probes: {method} has train.probe_every 0; give -- --train.probe_every N")


def refuse_another_sweep(plan: Plan, presets: Json) -> None:
    """Write `sweep.json`; raises InputError if the folder holds runs of other settings, which are not repeated."""
    file = plan.output / "sweep.json"
    shared = {"suites": plan.suites, "data": plan.data and str(plan.data), "overrides": plan.overrides}
    tasks = {"tasks": task_arguments(plan.tasks)} if plan.tasks else {}
    now = json.loads(json.dumps({**shared, **tasks, **presets}, default=str))
    if file.is_file() and any(plan.output.glob("runs/*/*/seed-*/")):  # else a mistake that training refused
        before = read_json(file)
        changed = [key for key in now if key != "methods" and before.get(key) != now[key]]
        changed += [m for m, preset in now["methods"].items() if before["methods"].get(m, preset) != preset]
        if changed:
            what = ", ".join(f"the keys of {plan.config}" if key == "base" else key for key in changed)
            raise InputError(f"{plan.output} holds runs with another choice of {what}; name another --output")
        now["methods"] = {**before["methods"], **now["methods"]}
    write_whole(file, json.dumps(now, indent=1) + "\n")
