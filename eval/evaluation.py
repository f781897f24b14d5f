"""Every suite on every model of a folder: what `python -m eval.run` does once its arguments are checked."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeGuard

from eval.batch_size import BatchSize
from eval.files import digest_of, read_config, read_log
from eval.loading import is_model
from eval.suites import SUITES, WITHOUT_DATA, NoData, Probes, Suite, load_suite, sharing
from eval.suites.corpus import seen_in_training
from eval.suites.progress import announce
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from eval.placement import Loader

BY_HARNESS = tuple(f"eval.suites.{name}" for name in ("harness", "harness_tasks", "wmdp_split", "rwku_utility"))
OF_OTHER_MODELS = ("reference", "target_utility", "retrained")  # keys of a probe, of suites tofu and muse
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class LoadedSuite:
    """A suite with its probes, which were read before any model."""

    name: str
    module: Suite
    probes: Probes


def load_suites(names: list[str], folder: Path | None, options: dict[str, Json]) -> list[LoadedSuite]:
    """The suites with their probes; `options` are further arguments of `load_probes`, by the suite's name.

    Raises:
        InputError: see `suites_in` and `Suite.load_probes`.
    """
    there = suites_in(folder, names, options) if folder is not None else {}
    return [there.get(name) or load_one(name, None, options) for name in names]


def load_one(name: str, folder: Path | None, options: dict[str, Json]) -> LoadedSuite:
    """One suite with its probes; raises InputError as its `load_probes` does."""
    module = load_suite(name)
    return LoadedSuite(name, module, module.load_probes(folder, name, **options.get(name, {})))


def suites_in(folder: Path, names: list[str], options: dict[str, Json]) -> dict[str, LoadedSuite]:
    """The suites with their probes, of `folder`. One that has nothing there is absent if it has data of its own.

    Raises:
        InputError: a suite needs data and has none there, or no suite has any; names each and what to put there. See
            also `Suite.load_probes`.
    """
    there: dict[str, LoadedSuite] = {}
    missing: dict[str, NoData] = {}
    for name in names:
        try:
            there[name] = load_one(name, folder, options)
        except NoData as error:
            missing[name] = error
    takers = [name for name in there if name not in WITHOUT_DATA]
    refused = {name: error for name, error in missing.items() if not (error.has_own and takers)}
    if refused:
        reasons = [f"suite {name}: {error}" for name, error in refused.items()]
        if takers:
            reasons.append(f"or leave {' '.join(refused)} out of --suite; of {' '.join(takers)} the data are there")
        raise InputError("; ".join(reasons))
    for name in missing if sharing.rank_and_size()[0] == 0 else ():
        announce(f"suite {name} takes data of its own, because --data {folder} has none of it", always=True)
    return there


def find_models(folder: Path, option: str = "--model") -> list[tuple[int | None, Path]]:
    """(step, model folder) of each model to evaluate: those of a run by step, or one model with step None.

    A path that is not a folder and could be a name on the hub counts as one.

    Args:
        option: which gave the folder, for messages.

    Raises:
        InputError: `folder` is neither a run with a model, nor a model, nor a name on the hub.
    """
    exports, final = folder / "exports", folder / "final"
    if not (folder / "metrics.jsonl").is_file() or not (exports.is_dir() or final.is_dir()):
        if not folder.exists() and not HUB_NAME.fullmatch(str(folder)):
            raise InputError(
                f"{option}: there is no folder {folder.absolute()}, and that is no name of the hub; name the folder of "
                "a model or of a run, or a model of the hub as owner/name"
            )
        if folder.exists() and not is_model(folder):
            raise InputError(
                f"{option} {folder} is no Hugging Face model folder (no config.json, no adapter_config.json), "
                "and no run folder (metrics.jsonl, and exports/ or final/); name one of these"
            )
        return [(None, folder)]
    models = {
        int(match[1]): path
        for path in (exports.iterdir() if exports.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and is_model(path)
    }
    steps = read_log(folder).steps
    if steps and is_model(final):
        models[steps[-1]["step"]] = final  # the same weights as an export of that step
    if not models:
        raise InputError(f"{folder} holds no exported model yet; set train.export_every or let the run finish")
    return sorted(models.items())


def evaluate_all(
    models: list[tuple[int | None, Path]],
    suites: list[LoadedSuite],
    batch_size: int | Literal["auto"],
    load: Loader,
    save: Callable[[list[Json], str], None] = lambda entries, dtype: None,
) -> tuple[list[Json], str]:
    """One {"step", "model", "suites"} for each model, and the dtype of the last model.

    A suite whose batches `auto` found has their size under "batch_size". The first rank calls `save` with what there is
    after each suite of each model.

    Raises:
        InputError: a model cannot be loaded, or memory does not hold a batch.
    """
    sizes = {suite.name: BatchSize(batch_size) for suite in suites}
    entries: list[Json] = []
    is_first = sharing.rank_and_size()[0] == 0
    rehearsed = next((retain_seen(models, suite) for suite in suites if suite.name == "corpus"), None)

    def evaluate(folder: Path, results: Json) -> str:  # a scope of its own: no model outlives it
        with sharing.raise_on_all_ranks():
            model, tokenizer = load(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        for suite in suites:
            size, title = sizes[suite.name], f"{suite.name} {folder.name}"
            work = partial(suite.module.evaluate, model, tokenizer, suite.probes, title=title)
            found = results[suite.name] = size.fit(work, title)
            if size.is_auto:
                found["batch_size"] = size.rows
            if "sources" not in found and is_table(suite.probes):
                found["sources"] = digests_of_sets(suite.probes)
            if suite.name == "corpus" and rehearsed is not None:
                found["retain_seen"] = rehearsed
            if is_first:
                save(entries, dtype)
        return dtype

    dtype = ""
    for number, (step, folder) in enumerate(models, 1):
        if is_first:
            names = ", ".join(suite.name for suite in suites)
            announce(f"evaluating {folder} on {names} (model {number} of {len(models)})", always=number == 1)
        entries.append({"step": step, "model": str(folder), "suites": {}})
        dtype = evaluate(folder, entries[-1]["suites"])
    return entries, dtype


def is_table(probes: Probes) -> TypeGuard[list[Json]]:
    return isinstance(probes, list) and all(isinstance(probe, dict) for probe in probes)


def digests_of_sets(probes: list[Json]) -> dict[str, str]:
    """{set: digest of its rows}, by which a report knows whether two evaluations were of the same rows.

    What other models answered does not count: a target is evaluated before its answers are there for the runs.
    """
    sets: dict[str, list[Json]] = defaultdict(list)
    for probe in probes:
        row = {key: value for key, value in probe.items() if key not in OF_OTHER_MODELS}
        sets[str(probe.get("set") or probe.get("split") or "all")].append(row)
    return {name: digest_of(rows) for name, rows in sets.items()}


def retain_seen(models: list[tuple[int | None, Path]], suite: LoadedSuite) -> dict[str, int] | None:
    """How much of the suite's own `retain` a run has trained on (`corpus.seen_in_training`); None for one model."""
    step, folder = models[0]
    run = folder.parent.parent if folder.parent.name == "exports" else folder.parent
    if step is None or not (run / "config.yaml").is_file():
        return None
    return seen_in_training(suite.probes, read_config(run, ()))


def provenance(names: list[str], runs_model: list[str], dtype: str) -> Json:
    """{"command", "versions", "dtype", "ranks"} of the evaluation that this process runs.

    runs_model: packages beside transformers that ran the model.
    """
    packages = ["torch", "transformers", "rouge_score", *runs_model]
    if any(SUITES[name] in BY_HARNESS for name in names):
        packages.append("lm_eval")
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    return {
        "command": shlex.join(["python", "-m", "eval.run", *arguments]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name.replace("_", "-")) for name in packages},
        },
        "dtype": dtype,
        "ranks": sharing.rank_and_size()[1],
    }
