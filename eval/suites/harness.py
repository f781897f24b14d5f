"""WMDP and MMLU by lm-evaluation-harness: its prompts, its scoring, its means; batches are shared over ranks.

A question is put as "…\\nA. …\\nB. …\\nC. …\\nD. …\\nAnswer:"; the answer is the most likely of " A" to " D". WMDP is
asked without examples (Li et al. 2024 pin that), MMLU after the first five of each subject's `dev` split.

Local data are `wmdp/wmdp_bio.jsonl`, `wmdp/wmdp_cyber.jsonl` and `mmlu/{dev,test}/SUBJECT.jsonl`, one object a line:
{"question": text, "choices": [four texts], "answer": 0 to 3}. Each file becomes a task that includes the harness's own
and differs in where its questions come from. Without a folder, the harness loads them from the hub.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import yaml
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.files import read_jsonl, write_jsonl
from eval.suites import scoring
from eval.suites.sharing import place, share
from pipeline.data.corpus import lines
from pipeline.errors import InputError

Row = dict[str, Any]  # keys question, choices, answer


BUILT_IN = Path(lm_eval.__file__).parent / "tasks"


MMLU = BUILT_IN / "mmlu" / "default"


FEWSHOT_SEED = 1234  # the harness's own; MMLU takes its examples in order, so that nothing is drawn


@dataclass(frozen=True)
class Questions:
    """The tasks of a suite as the harness holds them, the examples before each question, and where they come from."""

    suite: str
    loaded: Any
    shots: int
    source: str


def read_questions(path: Path) -> list[Row]:
    """The questions of a file.

    Raises:
        UnusableInput: no such file, none in it, or a line that is no question; names the line.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}; --data needs it (keys question, choices, answer), or leave --data out")
    rows = read_jsonl(path, required=("question", "choices", "answer"))
    if not rows:
        raise InputError(f"{path} holds no question; fill or remove it")
    for number, row in zip(_line_numbers(path), rows, strict=True):
        question, choices, answer = row["question"], row["choices"], row["answer"]
        four = isinstance(choices, list) and len(choices) == 4 and all(isinstance(choice, str) for choice in choices)
        if not isinstance(question, str) or not four or type(answer) is not int or answer not in range(4):
            raise InputError(
                f"{path}, line {number}: question must be a text, choices four texts, answer a number from 0 to 3; "
                "repair or remove the line"
            )
    return [{key: row[key] for key in ("question", "choices", "answer")} for row in rows]


def _line_numbers(path: Path) -> list[int]:
    """Of the lines that are not blank, counted from 1."""
    return [number for number, line in lines(path) if line.strip()]


def read_mmlu(folder: Path, shots: int) -> dict[str, tuple[list[Row], list[Row]]]:
    """{subject: (test, dev)} of the subjects in FOLDER/mmlu/test, in the order of names; dev is [] without shots.

    Raises:
        UnusableInput: no subject, one that MMLU does not have, too few examples, or a file that cannot be read.
    """
    files = sorted((folder / "mmlu" / "test").glob("*.jsonl"))
    if not files:
        raise InputError(f"there is no mmlu/test/SUBJECT.jsonl in {folder}; --data needs one, or leave --data out")
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
    """A task in `folder`: the built-in one of the same name, on these questions and examples."""
    name = built_in.stem
    files = {}
    for split, rows in (("test", test), ("dev", dev)):
        if rows:
            files[split] = str(folder / f"{name}.{split}.jsonl")
            write_jsonl(Path(files[split]), rows)
    changes: dict[str, Any] = {
        "include": str(built_in),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        # Read into memory: the folder need not outlive the reading, and nothing is left in the user's cache.
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache"), "keep_in_memory": True},
    }
    if not dev:
        changes |= {"fewshot_split": None, "fewshot_config": None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(changes), encoding="utf-8")


def write_tasks(folder: Path, data: Path, suite: str, shots: int) -> None:
    """The tasks of a suite in `folder`, on the questions below `data`; for MMLU also their group."""
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


def load_probes(folder: Path | None, suite: str, shots: int = 0) -> Questions:
    """The questions of `suite` below `folder`, or of the hub without one; `shots` examples before each.

    Raises:
        UnusableInput: a file is missing or malformed, there are fewer than `shots` examples, or the hub is silent.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant: a model object, shots given
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        path = MMLU if suite == "mmlu" else BUILT_IN / "wmdp"
        if folder is not None:
            path = Path(temporary)
            write_tasks(path, folder, suite, shots)
        try:
            loaded = TaskManager(include_path=str(path), include_defaults=False).load([suite])
        except (OSError, ValueError) as error:
            if folder is not None:
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"suite {suite}: the hub does not give its questions ({reason}); give --data") from error
    for name, task in loaded["tasks"].items():
        examples = len(list(task.fewshot_docs())) if shots else 0
        if examples < shots:
            raise InputError(f"--shots {shots}: {name} has only {examples} examples in its dev split; ask for fewer")
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return Questions(suite, loaded, shots, "hub" if folder is None else str(folder))


def question_texts(probes: Questions) -> list[str]:
    """The questions as they are written; what the attack `relearn` must not have learned again."""
    tasks = probes.loaded["tasks"].values()
    return [doc["question"] for task in tasks for doc in task.eval_docs]


Base: Any = HFLM  # a decorator of the harness hides its type


class SharedLM(Base):
    """The harness's model with its batches shared over ranks, and a count of the questions that did not fit."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, title: str) -> None:
        # A copy: to a tokenizer without padding the harness adds a token, which the model does not have.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self.title = title
        self.too_long = 0

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        """The harness looks whether a text begins with the BOS or EOS token; where there is neither, it does not."""
        if add_special_tokens is None and self.prefix_token_id is None:
            add_special_tokens = True  # what a tokenizer does unless told otherwise
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) per request (texts, context ids, continuation ids), in their order.

        Requests that differ in their last token alone are answered by one sequence, which is what the harness does
        within a call. One call per batch is therefore one forward pass, so ranks can be given equally many. The batches
        are those the harness would form, longest sequences first, but for the limit of tokens of `eval.scoring`.
        """
        sequences: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            sequences[*context, *continuation[:-1]].append(i)
        order = sorted(sequences)
        self.too_long = sum(len(tokens) > self.max_length for tokens in order)
        fitting = [tokens[-self.max_length :] for tokens in order]  # what the harness leaves of them
        rows = scoring.batches(fitting, self.batch_size_per_gpu, scoring.MOST_TOKENS, longest_first=True)
        batches = [[i for row in batch for i in sequences[order[row]]] for batch in rows]
        answer = super()._loglikelihood_tokens
        answers = share(batches, lambda batch: answer([requests[i] for i in batch], disable_tqdm=True), self.title)
        answered = {
            i: one for batch, some in zip(batches, answers, strict=True) for i, one in zip(batch, some, strict=True)
        }
        return [answered[i] for i in range(len(requests))]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Questions,
    *,
    batch_size: int = 64,
    title: str = "harness",
) -> dict[str, Any]:
    """Accuracy in [0, 1] as the harness reports it; for MMLU per subject, and over all questions ("all").

    Returns {"metrics": {"acc": {"all": x, subject: x, …}}, "standard_errors": likewise, "counts": {"questions":
    {"all": n, …}, "cut": {"all": n}}, "protocol": text, "shots": n, "seeds": {"fewshot": n}, "task_versions":
    {name: n}}. "cut" counts the questions whose prompt is longer than the model's context and lost its beginning.
    """
    # The harness draws one bar per subject while it writes prompts, on every rank.
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # pyright: ignore[reportPrivateImportUsage]
    lm = SharedLM(model, tokenizer, batch_size, title)
    # As the harness sees it every rank is alone, so that each gets the whole answer.
    answer: Any = harness_evaluate(lm, probes.loaded, log_samples=False)
    # {"all" or subject: the harness's name}; the group, or the one task, comes first
    names = {"all": probes.suite} | {
        name.removeprefix("mmlu_"): name for name in probes.loaded["tasks"] if name != probes.suite
    }
    results = answer["results"]
    counts = {key: answer["n-samples"][name]["effective"] for key, name in names.items() if name in answer["n-samples"]}
    if lm.too_long and place()[0] == 0:
        print(
            f"warning: {title}: {lm.too_long} prompts are longer than the model's context of {lm.max_length} tokens "
            "and lost their beginning; ask for fewer --shots",
            file=sys.stderr,
        )
    return {
        "metrics": {"acc": {key: results[name]["acc,none"] for key, name in names.items()}},
        "standard_errors": {"acc": {key: results[name]["acc_stderr,none"] for key, name in names.items()}},
        "counts": {"questions": {"all": sum(counts.values()), **counts}, "cut": {"all": lm.too_long}},
        "protocol": (
            f"lm-evaluation-harness task {probes.suite}, {probes.shots}-shot; most likely of ' A' to ' D'; "
            f"mean over questions; questions of {probes.source}"
        ),
        "shots": probes.shots,
        "seeds": {"fewshot": FEWSHOT_SEED},
        "task_versions": {name: answer["versions"][name] for name in names.values()},
    }
