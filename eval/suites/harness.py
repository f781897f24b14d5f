"""WMDP and MMLU by lm-evaluation-harness: its prompts, its scoring, its means (`eval/suites/shared_lm.py`).

A prompt reads "…\\nA. …\\nB. …\\nC. …\\nD. …\\nAnswer:"; the answer is the most likely of " A" to " D". WMDP has no
examples before a question (as in Li et al. 2024), MMLU the first five of each subject's `dev` split.

Local data are `wmdp/wmdp_{bio,chem,cyber}.jsonl` and `mmlu/{dev,test}/SUBJECT.jsonl`, one object a line:
{"question": text, "choices": [four texts], "answer": 0 to 3}. Each file becomes a task that includes the harness's own
and differs in the source of its questions. Without a folder, the harness loads them from the hub.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import datasets
import lm_eval
import yaml
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.files import digest_of, write_jsonl
from eval.suites import MMLU_SHOTS, NoData
from eval.suites.harness_texts import Requests, chosen_option, texts_of_tasks
from eval.suites.shared_lm import SEEDS, LoadedTasks, evaluate_tasks, language_model, seed_generators
from eval.suites.texts import Answered
from pipeline.data.tables import json_rows
from pipeline.errors import InputError
from pipeline.files import Json

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context ids, continuation ids


class Row(TypedDict):
    """A question with four choices; `answer` is the index of the right one."""

    question: str
    choices: list[str]
    answer: int


BUILT_IN = Path(lm_eval.__file__).parent / "tasks"


MMLU = BUILT_IN / "mmlu" / "default"


@dataclass(frozen=True)
class Questions:
    """The tasks of a suite as the harness loads them, the number of examples before each question, and the source."""

    suite: str
    loaded: LoadedTasks
    shots: int
    source: str


def read_questions(path: Path) -> list[Row]:
    """The questions of a file.

    Raises:
        InputError: no such file, no question in it, or a line that is not a question; names the line.
    """
    if not path.is_file():
        raise NoData(f"there is no {path}; --data needs it (keys question, choices, answer), or leave --data out")
    rows = [question_of(where, row) for where, row in json_rows(path)]
    if not rows:
        raise InputError(f"{path} holds no question; fill or remove it")
    return rows


def question_of(where: str, row: object) -> Row:
    """The question in a row; raises InputError, which names the place `where`, if the row is not a question."""
    cells: list[Any] = [row.get(key) if isinstance(row, dict) else None for key in Row.__annotations__]
    question, choices, answer = cells
    four = isinstance(choices, list) and len(choices) == 4 and all(isinstance(choice, str) for choice in choices)
    if not isinstance(question, str) or not four or type(answer) is not int or answer not in range(4):
        raise InputError(
            f"{where}: question must be a text, choices four texts, answer a number from 0 to 3; "
            "repair or remove the line"
        )
    return {"question": question, "choices": choices, "answer": answer}


def read_mmlu(folder: Path, shots: int) -> dict[str, tuple[list[Row], list[Row]]]:
    """{subject: (test, dev)} of the subjects in FOLDER/mmlu/test, in the order of names; dev is [] without shots.

    Raises:
        InputError: no subject, one that MMLU does not have, or a file that cannot be read.
    """
    files = sorted((folder / "mmlu" / "test").glob("*.jsonl"))
    if not files:
        raise NoData(f"there is no mmlu/test/SUBJECT.jsonl in {folder}; --data needs one, or leave --data out")
    subjects = {}
    for path in files:
        if not (MMLU / f"mmlu_{path.stem}.yaml").is_file():
            raise InputError(
                f"{path}: MMLU has no subject {path.stem!r}; rename the file (as anatomy.jsonl) or remove it"
            )
        examples = read_questions(folder / "mmlu" / "dev" / path.name) if shots else []
        subjects[path.stem] = (read_questions(path), examples)
    return subjects


def write_task(folder: Path, built_in: Path, test: list[Row], dev: list[Row]) -> None:
    """Write a task into `folder`: the built-in one of the same name, on these questions and examples."""
    name = built_in.stem
    files = {}
    for split, rows in (("test", test), ("dev", dev)):
        if rows:
            files[split] = str(folder / f"{name}.{split}.jsonl")
            write_jsonl(Path(files[split]), map(dict, rows))
    changes: Json = {
        "include": str(built_in),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        # Read into memory: the folder may go after the reading, and nothing stays in the user's cache.
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache"), "keep_in_memory": True},
    }
    if not dev:
        changes |= {"fewshot_split": None, "fewshot_config": None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(changes), encoding="utf-8")


def write_tasks(folder: Path, data: Path, suite: str, shots: int) -> None:
    """Write the tasks of a suite into `folder`, on the questions below `data`; for MMLU also their group."""
    if suite != "mmlu":
        rows = read_questions(data / "wmdp" / f"{suite}.jsonl")
        write_task(folder, BUILT_IN / "wmdp" / f"{suite}.yaml", rows, [])
        return
    subjects = read_mmlu(data, shots)
    for subject, (test, dev) in subjects.items():
        write_task(folder, MMLU / f"mmlu_{subject}.yaml", test, dev)
    group = {
        "group": "mmlu",
        "task": [f"mmlu_{subject}" for subject in subjects],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],  # as the harness's own group
        "metadata": {"version": 2},
    }
    (folder / "mmlu.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")


def load_probes(folder: Path | None, suite: str, shots: int | None = None) -> Questions:
    """The questions of `suite` below `folder`, or from the hub without a folder.

    Args:
        shots: examples before each question; None: MMLU_SHOTS for mmlu, 0 for the others.

    Raises:
        InputError: a file is missing or malformed, there are fewer than `shots` examples, or the hub cannot be reached.
    """
    if shots is None:
        shots = MMLU_SHOTS if suite == "mmlu" else 0
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is intended here: a model object, shots
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        path = MMLU if suite == "mmlu" else BUILT_IN / "wmdp"
        if folder is not None:
            path = Path(temporary)
            write_tasks(path, folder, suite, shots)
        return load_questions(path, suite, shots, "hub" if folder is None else str(folder))


def load_questions(path: Path, suite: str, shots: int, source: str) -> Questions:
    """The task or group `suite` whose YAML files are in `path`; `source`: the place of its questions, in words.

    Raises:
        InputError: there are fewer than `shots` examples, or the hub, if it is the source, cannot be reached.
    """
    seed_generators()
    try:
        loaded = TaskManager(include_path=str(path), include_defaults=False).load([suite])
    except (OSError, ValueError) as error:
        if source != "hub":
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"suite {suite}: cannot load its questions from the hub ({reason}); give --data") from error
    for name, task in loaded["tasks"].items():
        examples = len(list(task.fewshot_docs())) if shots else 0
        if examples < shots:
            raise InputError(f"--shots {shots}: {name} has only {examples} examples in its dev split; give fewer")
        task.set_config(key="num_fewshot", value=shots)
    return Questions(suite, LoadedTasks.now(loaded), shots, source)


def question_texts(probes: Questions) -> list[str]:
    """The questions as they are written; the attack `relearn` must not train on any of them."""
    documents: list[Any] = [doc for task in probes.loaded.tasks["tasks"].values() for doc in task.eval_docs]
    return [doc["question"] for doc in documents]


def answered(task: Any, requests: Requests) -> Answered:
    """A question with the right choice and the most likely one, each behind its letter."""
    question: Any = requests[0].doc
    choices = [f"{letter}. {text}" for letter, text in zip("ABCD", question["choices"], strict=True)]
    chosen = chosen_option(requests, len(choices))
    return Answered(prompt=question["question"].strip(), expected=choices[question["answer"]], answer=choices[chosen])


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Questions,
    *,
    batch_size: int = 64,
    title: str = "harness",
) -> Json:
    """Accuracy in [0, 1] as the harness reports it; for MMLU per subject, and over all questions ("all").

    Returns {"metrics": {"acc": {"all": x, subject: x, …}}, "standard_errors": likewise, "counts": {"questions":
    {"all": n, …}, "cut": {"all": n}}, "protocol": text, "shots": n, "seeds": {"fewshot": n}, "task_versions":
    {name: n}, "sources": {subject, or "all" of a single task: digest of its rows}, "texts": {"all": [{"prompt",
    "expected", "answer"}, …]} of all subjects together (see `chosen_rows`)}. "cut" counts the questions whose prompt is
    longer than the model's context and loses its beginning.
    """
    lm = language_model(model, tokenizer, batch_size, title)
    answer = evaluate_tasks(lm, probes.loaded)
    # {"all" or subject: the harness's name}; the group, or the one task, comes first
    names = {"all": probes.suite} | {
        name.removeprefix("mmlu_"): name for name in probes.loaded.tasks["tasks"] if name != probes.suite
    }
    results = answer["results"]
    counts = {key: answer["n-samples"][name]["effective"] for key, name in names.items() if name in answer["n-samples"]}
    return {
        "metrics": {"acc": {key: results[name]["acc,none"] for key, name in names.items()}},
        "standard_errors": {"acc": {key: results[name]["acc_stderr,none"] for key, name in names.items()}},
        "counts": {"questions": {"all": sum(counts.values()), **counts}, "cut": {"all": lm.too_long}},
        "protocol": (
            f"lm-evaluation-harness task {probes.suite}, {probes.shots}-shot; most likely of ' A' to ' D'; "
            f"mean over questions; questions of {probes.source}"
        ),
        "shots": probes.shots,
        "seeds": {"fewshot": SEEDS["fewshot"]},
        "task_versions": {name: answer["versions"][name] for name in names.values()},
        "sources": {
            key: digest_of([list(task.eval_docs), list(task.fewshot_docs()) if probes.shots else []])
            for key, name in names.items()
            if (task := probes.loaded.tasks["tasks"].get(name)) is not None
        },
        "texts": {"all": texts_of_tasks(probes.loaded.tasks["tasks"], answered)},
    }
