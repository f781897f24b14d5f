"""Any task of lm-evaluation-harness: a model's general ability, beside what it was to forget and to retain.

Prompts, examples, filters and means are those of the harness: a task decides its number of examples, and no chat
template is applied, as without options on its command line. A user's own YAML files (`--tasks-dir`) come before the
harness's tasks of the same name, as its `--include_path` has it.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.files import digest_of
from eval.suites.harness_texts import texts_of_tasks
from eval.suites.shared_lm import SEEDS, LoadedTasks, evaluate_tasks, language_model, seed_generators
from pipeline.errors import InputError

# What the YAML file of a task, its functions, its templates and the reading of its rows may raise.
UNLOADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError),
    *(DatasetsError, TemplateError, yaml.YAMLError),
)
NEAREST = 3  # names in the message about an unknown task


@dataclass(frozen=True)
class Tasks:
    """The tasks and groups that the user named (a tag stands for its tasks), as the harness loads them."""

    named: tuple[str, ...]
    loaded: LoadedTasks
    limit: int | None


def load_probes(
    folder: Path | None,
    suite: str = "lm_eval",
    tasks: Sequence[str] = (),
    tasks_dir: Path | None = None,
    limit: int | None = None,
) -> Tasks:
    """The tasks with their rows, which the YAML files name: `folder` (--data) does not matter.

    Args:
        tasks: names of tasks, groups or tags.
        tasks_dir: a folder with YAML files of one's own, which may run Python functions that lie beside them.
        limit: evaluate the first documents of each task alone.

    Raises:
        InputError: no task is named, one is unknown, or one cannot be loaded.
    """
    if not tasks:
        raise InputError(f"suite {suite} evaluates the tasks that --tasks names; give at least one, as arc_easy")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is intended here: a model object
    datasets.disable_progress_bars()
    manager = index_tasks(tasks, tasks_dir)
    seed_generators()
    items: list[Any] = []
    for name in dict.fromkeys(tasks):
        items += load_task(manager, name, tasks_dir)
    try:
        loaded = manager.load(items)
    except ValueError as error:
        raise InputError(f"--tasks {' '.join(tasks)}: {error}; name one of the two") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Tasks(tuple(dict.fromkeys(map(name_of, items))), LoadedTasks.now(loaded), limit)


def name_of(item: Any) -> str:
    """The name of a task or a group."""
    return item.name if isinstance(item, Group) else item.task_name


def index_tasks(names: Sequence[str], folder: Path | None) -> TaskManager:
    """The harness's index of all tasks, or of those in `folder` alone if these have all names: that saves 15 s.

    Raises:
        InputError: `folder` holds no YAML file, or one that cannot be read; or a name is in neither index.
    """
    if folder is not None:
        files = sorted(folder.rglob("*.yaml"))
        if not files:
            raise InputError(f"--tasks-dir {folder} holds no file *.yaml; name a folder with tasks")
        for file in files:
            try:
                load_yaml(file, resolve_func=False)  # the harness passes over a file that it cannot read
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise InputError(f"{file}: {one_line(error)}; repair or remove it") from error
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(is_complete(name, own.task_index) for name in names):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            similar = difflib.get_close_matches(name, manager.all_tasks, n=NEAREST, cutoff=0.0)
            where = "lm-evaluation-harness has" if folder is None else f"neither lm-evaluation-harness nor {folder} has"
            raise InputError(f"--tasks {name}: {where} such a task, group or tag; the nearest are {', '.join(similar)}")
    return manager


def is_complete(name: str, index: Mapping[str, Entry]) -> bool:
    """Whether `index` alone has all of a task or group. A tag never is: tasks of the harness may bear it too."""
    entry = index.get(name)
    if entry is None or entry.kind is Kind.TAG:
        return False
    members = (entry.cfg or {}).get("task") if entry.kind is Kind.GROUP else ()
    return isinstance(members, list | tuple) and all(isinstance(m, str) and is_complete(m, index) for m in members)


def load_task(manager: TaskManager, name: str, folder: Path | None) -> list[Any]:
    """The group, the task, or the tasks of a tag; raises InputError if the harness cannot load or not run one."""
    entry = manager.task_index[name]
    own = folder is not None and entry.yaml_path is not None and entry.yaml_path.is_relative_to(folder)
    try:
        loaded = manager.load([name])
    except UNLOADABLE as error:
        remedy = (
            f"repair {entry.yaml_path}, or let it name rows on this machine"
            if own
            else "without the hub, give --tasks-dir a folder with a YAML file of this task on rows of this machine"
        )
        raise InputError(f"--tasks {name}: cannot load it ({one_line(error)}); {remedy}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"--tasks {name}: {task.task_name} runs code that the model writes; leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"--tasks {name}: {task.task_name} has images or sounds; leave it out")
    groups: dict[str, Any] = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Tasks,
    *,
    batch_size: int = 64,
    title: str = "lm_eval",
) -> dict[str, Any]:
    """The harness's scores of each named task: {"metrics": {task: {metric: x}}, …}; a group also holds its members.

    A metric of a filter other than "none" is named "metric,filter". Beside "metrics": "standard_errors" of means and
    "higher_is_better" in the same shape, "sources" {task: digest of its rows}, "counts" {"documents": {task: n}, "cut":
    {"all": n}} ("cut": sequences that are longer than the model's context and lose their beginning), "protocol" {task:
    text}, "shots" and "task_versions" {task: n}, "limit", "seeds", and "texts" {task: [{"prompt", "expected",
    "answer"}, …]} (see `harness_texts`) of each task that has answers.
    """
    lm = language_model(model, tokenizer, batch_size, title)
    answer = evaluate_tasks(lm, probes.loaded, probes.limit)
    results, better = answer["results"], answer["higher_is_better"]
    scores, errors = ({name: numbers(found, part) for name, found in results.items()} for part in (False, True))
    directions = {
        name: {metric: better.get(name, {}).get(metric.partition(",")[0]) for metric in found}
        for name, found in scores.items()
    }
    documents = {name: number["effective"] for name, number in answer["n-samples"].items()}
    groups: dict[str, Group] = probes.loaded.tasks.get("groups", {})
    texts = {name: texts_of_tasks({name: task}) for name, task in probes.loaded.tasks["tasks"].items()}

    def shape(values: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        return {
            name: {**values[name], **(shape(values, groups[name].child_names) if name in groups else {})}
            for name in names
        }

    return {
        "metrics": shape(scores, probes.named),
        "standard_errors": shape(errors, probes.named),
        "higher_is_better": shape(directions, probes.named),
        "counts": {"documents": documents, "cut": {"all": lm.too_long}},
        "protocol": {name: protocol(name, probes, answer) for name in probes.named},
        "shots": answer["n-shot"],
        "task_versions": answer["versions"],
        "sources": sources_of(probes.loaded),
        "limit": probes.limit,
        "seeds": SEEDS,
        "texts": {name: rows for name, rows in texts.items() if rows},
    }


def sources_of(loaded: LoadedTasks) -> dict[str, str]:
    """{task: digest of its rows}, by which a report knows whether two evaluations were of the same rows."""
    return {name: digest_of(list(task.eval_docs)) for name, task in loaded.tasks["tasks"].items()}


def numbers(found: Mapping[str, Any], errors: bool) -> dict[str, float | None]:
    """{"metric" or "metric,filter": value}, the scores or their standard errors; None for what is not finite."""
    named = {}
    for key, value in found.items():
        metric, comma, rest = key.rpartition(",")
        if comma and metric.endswith("_stderr") == errors and isinstance(value, Real):
            name = metric.removesuffix("_stderr") + ("" if rest == "none" else f",{rest}")
            named[name] = float(value) if math.isfinite(value) else None
    return named


def protocol(name: str, probes: Tasks, answer: Mapping[str, Any]) -> str:
    """How a named task or group was evaluated, in words."""
    groups: dict[str, Group] = probes.loaded.tasks.get("groups", {})
    tasks = groups[name].get_all_tasks() if name in groups else [probes.loaded.tasks["tasks"][name]]
    first = tasks[0]
    source = first.config.dataset_kwargs and first.config.dataset_kwargs.get("data_files")
    parts = [
        f"lm-evaluation-harness {'group' if name in groups else 'task'} {name}, version {answer['versions'][name]}",
        f"{len(tasks)} tasks, the first {first.task_name}" if name in groups else "",
        f"{first.OUTPUT_TYPE}, {answer['n-shot'][first.task_name]}-shot, no chat template",
        f"the first {probes.limit} documents of each task" if probes.limit else "all documents",
        f"rows of {source or first.DATASET_PATH or 'its own code'}",
    ]
    return "; ".join(filter(None, parts))
