"""The entries of a leaderboard: what one run measured, by which protocol, and which entries may stand in one table.

An entry is a JSON object with the keys of `KEYS`. Entries of one benchmark and one target model are a table; they must
have the same protocol and the same numbers of questions. Entries with one configuration digest are seeds of a method.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from eval.files import read_config, read_json, read_jsonl
from eval.results.conditions import anywhere
from eval.results.metrics import MEASURES, ForgetRetainMetric, flatten, headlines, suite_of
from eval.results.trajectories import Run, read_run
from pipeline.errors import InputError
from pipeline.files import Json

KEYS = ("benchmark", "model", "method", "configuration", "seed", "steps", "scores", "protocol", "counts", "environment")
OWN_DATA = ("corpus", "probes")  # suites of a user's own texts, which nobody else has
DIGITS = 12  # of a configuration's digest


def measures_of(suites: Sequence[str]) -> list[ForgetRetainMetric]:
    """The default metric of each benchmark whose forget and retain score the suites have."""
    found: dict[str, ForgetRetainMetric] = {}
    for measure in MEASURES:
        if measure.suite not in OWN_DATA and {measure.suite, suite_of(measure.retain)} <= set(suites):
            found.setdefault(measure.suite, measure)
    return [*found.values()]


def entries_of(folder: Path) -> list[Json]:
    """The entries of a run, one for each benchmark that it was evaluated on.

    Raises:
        InputError: the run is not finished, unlearned nothing, or has no scores that others could have too.
    """
    run = read_run(folder)
    config, path = read_config(folder, ("objective", "train")), folder / "evaluation.json"
    if config["objective"].get("forget") == "none":
        raise InputError(f"{folder} has objective.forget none: it unlearned nothing; add a run that did")
    measures = measures_of(run.suites) if path.is_file() else []
    if not measures:
        needed = [" ".join(dict.fromkeys((m.suite, suite_of(m.retain)))) for m in MEASURES if m.suite not in OWN_DATA]
        raise InputError(
            f"{folder} was evaluated on {', '.join(run.suites)}, which nobody can compare with other runs; evaluate it "
            f"on one of: {', '.join(dict.fromkeys(needed))}"
        )
    last = read_json(path)["trajectory"][-1]
    refuse_unfinished(run, config, last.get("model"))
    return [entry_of(run, config, measure, last["suites"]) for measure in measures]


def refuse_unfinished(run: Run, config: Json, model: str | None) -> None:
    """Raises InputError if the training goes on after the last step, or if the evaluation ends before it.

    Args:
        model: the last that was evaluated: `final`, which a run has once it is finished, whatever ends it.
    """
    trained, evaluated = run.steps[-1]["step"] if run.steps else 0, run.trajectory[-1]["step"]
    wanted = config["train"].get("steps")
    if wanted and trained < wanted and not config["train"].get("stop_at"):
        raise InputError(f"{run.folder} has {trained} of {wanted} steps; let it finish (--resume), then evaluate it")
    if model is not None and Path(model).name != "final":
        raise InputError(
            f"{run.folder / 'evaluation.json'} ends at {model}, which is no final model; let the run finish "
            "(--resume), then evaluate it"
        )
    if evaluated != trained:
        raise InputError(
            f"{run.folder}/evaluation.json ends at step {evaluated:g}, and the run at {trained}; evaluate it again"
        )


def entry_of(run: Run, config: Json, measure: ForgetRetainMetric, last: Json) -> Json:
    """The entry of a run on one benchmark; `last`: what eval.run wrote about its last model, by suite."""
    suites = list(dict.fromkeys((measure.suite, suite_of(measure.retain))))
    measured = flatten({suite: last[suite]["metrics"] for suite in suites})
    for score in (measure.forget, measure.retain):
        if score not in measured:
            raise InputError(
                f"{run.folder}/evaluation.json has no finite {score} at its end; evaluate all of its suite"
            )
    shown = dict.fromkeys([measure.forget, measure.retain, *headlines(measured)])
    return {
        "benchmark": measure.suite,
        "model": model_of(run),
        "method": name_of(run, config),
        "configuration": hashlib.sha256(json.dumps(run.method).encode()).hexdigest()[:DIGITS],
        "seed": run.seed,
        "steps": run.steps[-1]["step"],
        "scores": {score: measured[score] for score in shown},
        "protocol": {suite: anywhere(run.protocols[suite]) for suite in suites},
        "counts": {suite: overall(last[suite].get("counts", {})) for suite in suites},
        "environment": run.environment,
    }


def name_of(run: Run, config: Json) -> str:
    """What the run computed, behind the name of its recipe's method, of which a sweep replaces rule and weights."""
    own = run.settings
    shown = [f"scope {own['synthesis.scope']}"] if "synthesis.scope" in own else []
    shown += [f"{key} {value:g}" for key in ("alpha", "gamma") if (value := own.get(f"synthesis.{key}", 1)) != 1]
    computed = ", ".join([f"{run.objective} {run.rule or 'alone'}", *(shown if run.rule else ())])
    return f"{config['method']}: {computed}" if config.get("method") else computed


def overall(counts: Json) -> dict[str, float]:
    """{set: number of its questions}; of kinds or subjects of a set their sum "all", if there is one."""
    flat = flatten(counts)
    whole = {name.rpartition(".")[0] for name in flat if name.endswith(".all")}
    return {name: number for name, number in flat.items() if name.rpartition(".")[0] not in whole or ".all" in name}


def model_of(run: Run) -> str:
    """The target model: its name on the hub; of a folder its own name and the digest of its content."""
    digest = run.settings.get("model.path")
    return f"{Path(run.model).name} {digest[:DIGITS]}" if "model.path" in run.paths and digest else run.model


def read_board(path: Path) -> list[Json]:
    """The entries in a file of JSON lines, none if there is no such file; raises InputError for a malformed line."""
    return read_jsonl(path, required=KEYS) if path.is_file() else []


def added(entries: Sequence[Json], new: Json, where: str) -> list[Json]:
    """The entries with `new`, in their order; the same list if it is there already. `where`: the run, for an error.

    Raises:
        InputError: an entry of its table has another protocol or other questions, or `new` is there with other scores.
    """
    table = [one for one in entries if (one["benchmark"], one["model"]) == (new["benchmark"], new["model"])]
    for key, what in (("protocol", "protocol"), ("counts", "number of questions")):
        if table and table[0][key] != new[key]:
            suite = next(name for name in new[key] if table[0][key].get(name) != new[key][name])
            raise InputError(
                f"{where}: another {what} of {suite} than the table of {new['benchmark']} on {new['model']} has "
                f"({new[key][suite]} instead of {table[0][key].get(suite)}), so they are not comparable; evaluate it "
                "as the others, or name another --file"
            )
    for one in table:
        if (one["configuration"], one["seed"]) == (new["configuration"], new["seed"]):
            if one["scores"] == new["scores"]:
                return [*entries]
            changed = next(name for name in new["scores"] if one["scores"].get(name) != new["scores"][name])
            raise InputError(
                f"{where}: its configuration {new['configuration']} and seed {new['seed']} are there with other scores "
                f"({changed} {one['scores'].get(changed)}, here {new['scores'][changed]}), and a repeated run is no "
                "second seed; remove the earlier line first"
            )
    order = ("benchmark", "model", "method", "configuration", "seed")
    return sorted([*entries, new], key=lambda one: [one[key] for key in order])
