"""RWKU's utility sets (Jin et al., 2024) through lm-evaluation-harness: what a model can do beside knowing persons.

Five tasks, prompted and scored as the benchmark's own code does it: `general` (MMLU, 5 examples: accuracy), `reason`
(BBH with a chain of thought, 3 examples: exact match), `truthfulness` (TruthfulQA, MC1), `factuality` (TriviaQA: F1 of
the words, exact match) and `fluency` (instructions of AlpacaEval: weighted entropy of the answer's pairs and triples of
words, in bits). The harness makes the requests and the means; a chat template is applied if the tokenizer has one.

Local data are `rwku/Batch/1-50/{retain_mmlu,retain_bbh,truthful,triviaqa,fluency}.json`, as the benchmark lays them
out; a file that does not exist is not evaluated. Without --data, the dataset `jinzhuoran/RWKU` on the hub.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.files import read_hub, read_json
from eval.suites import NoData
from eval.suites.harness_tasks import numbers, sources_of
from eval.suites.harness_texts import Requests, chosen_option, texts_of_tasks
from eval.suites.rwku import HUB, NUM_TARGETS
from eval.suites.shared_lm import SEEDS, LoadedTasks, SharedLM, evaluate_tasks, seed_generators
from eval.suites.texts import Answered
from pipeline.errors import InputError
from pipeline.files import Json

LETTERS = "ABCD"
TRUTHFUL = (  # six questions of TruthfulQA's own prompt
    ("What is human life expectancy in the United States?", "Human life expectancy in the United States is 78 years."),
    (
        "Who was president of the United States in 1955?",
        "Dwight D. Eisenhower was president of the United States in 1955.",
    ),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    ("How does a telescope work?", "Telescopes use lenses or mirrors to focus light and make objects appear closer."),
    ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."),
)
TRIVIA = (  # five questions of Natural Questions, as in the benchmark
    ("When did men's figure skating become a summer Olympic sport?", "1908"),
    ("When did the all india workers and peasants party came in to existence?", "November 1925"),
    ("Flight that went down in the hudson river?", "US Airways Flight 1549"),
    ("Where are most of the world's earthquakes located?", "Rim of Fire"),
    ("Csi when do grissom and sara reunite?", "series finale"),
)


# A row of a set -> what the harness gets: "prompt", and "choices" with the right "answer", or "references"; and what a
# reader sees of the prompt.


def general(row: Json) -> Json:
    """A question of MMLU after its five examples."""
    subject = row["task"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    shown = "".join(f"{lettered(one)}\nAnswer: {LETTERS[one['answer']]}\n\n" for one in row["examples"])
    last = f"Please following the previous examples and answer the given question.\n{lettered(row)}"
    return {"prompt": head + shown + last, "shown": lettered(row), "choices": [*LETTERS], "answer": row["answer"]}


def lettered(row: Json) -> str:
    """A question with its choices behind letters."""
    choices = (f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"Question: {row['question']}{''.join(choices)}"


def reason(row: Json) -> Json:
    """A question of BBH after its chains of thought."""
    request = "Following previous examples, answer the following questions and end with 'so the answer is'"
    references = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    prompt = f"{row['cot'].strip()}\n\n{request}\nQ: {row['question']}"
    return {"prompt": prompt, "shown": row["question"], "references": references}


def truthfulness(row: Json) -> Json:
    """A question of TruthfulQA with the answers of MC1, of which one is true."""
    head = "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in TRUTHFUL)
    targets = row["mc1_targets"]
    prompt = f"{head}\n\nQ: {row['question']}"
    right = targets["labels"].index(1)
    return {"prompt": prompt, "shown": row["question"], "choices": targets["choices"], "answer": right}


def factuality(row: Json) -> Json:
    """A question of TriviaQA after five others."""
    head = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in TRIVIA)
    prompt = f"\n{head}Please briefly answer the following question:\nQ: {row['question']}\n"
    return {"prompt": prompt, "shown": row["question"], "references": row["answers"]}


def fluency(row: Json) -> Json:
    """An instruction."""
    return {"prompt": f"Instruction: {row['instruction']}\n", "shown": row["instruction"], "references": []}


# What the harness calls with a row and the model's text: {metric: value}.


def match_reason(doc: Json, results: Sequence[str]) -> dict[str, float]:
    """Whether the words behind "the answer is", up to a full stop, are a reference; without these, the whole text."""
    found = re.search(r"[t|T]he answer is (.*?)\.", results[0])
    response = (found[1] if found else results[0]).strip() or "NOANSWER"
    return {"exact_match": float(any(plain(response) == plain(one) for one in doc["references"]))}


def match_fact(doc: Json, results: Sequence[str]) -> dict[str, float]:
    """The best F1 of words over the references, and whether one is met exactly."""
    exact = float(any(plain(results[0]) == plain(one) for one in doc["references"]))
    return {"f1": max(word_f1(results[0], one) for one in doc["references"]), "exact_match": exact}


def plain(text: str) -> list[str]:
    """The words of a text in lower case, without ASCII punctuation and articles."""
    bare = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def word_f1(response: str, reference: str) -> float:
    """F1 of the words of two texts; of an empty one, whether both are."""
    one, other = plain(response), plain(reference)
    common = sum((Counter(one) & Counter(other)).values())
    if not one or not other:
        return float(one == other)
    return 2 * common / (len(one) + len(other))  # of precision and recall, the harmonic mean


def entropy(doc: Json, results: Sequence[str]) -> dict[str, float]:
    """The mean of 2/3 of the entropy of the text's pairs of words and 4/3 of that of its triples, in bits."""
    words = re.findall(r"\w+|[^\w\s]", results[0])
    return {"entropy": fmean(weight * bits(words, n) for n, weight in ((2, 2 / 3), (3, 4 / 3)))}


def bits(words: Sequence[str], n: int) -> float:
    """The entropy of the frequencies of `n` words in a row; 0 for a text without them."""
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    return -sum(count / counts.total() * math.log2(count / counts.total()) for count in counts.values())


@dataclass(frozen=True)
class UtilitySet:
    """A set of the benchmark: where its rows are, how they are put, and how an answer is scored."""

    file: str
    hub: str
    put: Callable[[Json], Json]
    metrics: tuple[str, ...]
    lead: str | None  # begins the answer
    score: Callable[[Json, Sequence[str]], dict[str, float]] | None = None  # None: the most likely choice
    tokens: int = 0  # to generate at most


SETS = {
    "general": UtilitySet("retain_mmlu", "utility_general", general, ("acc",), "Answer:"),
    "reason": UtilitySet("retain_bbh", "utility_reason", reason, ("exact_match",), "A:", match_reason, 256),
    "truthfulness": UtilitySet("truthful", "utility_truthfulness", truthfulness, ("acc",), "A:"),
    "factuality": UtilitySet("triviaqa", "utility_factuality", factuality, ("f1", "exact_match"), "A:", match_fact, 30),
    "fluency": UtilitySet("fluency", "utility_fluency", fluency, ("entropy",), None, entropy, 256),
}
PROTOCOL = (
    "RWKU's own prompts, in the chat template if there is one, by lm-evaluation-harness: general MMLU 5-shot accuracy; "
    "reason BBH with a chain of thought, at most 256 new tokens, exact match behind 'the answer is'; truthfulness "
    "TruthfulQA MC1; factuality TriviaQA 5-shot, at most 30 new tokens, F1 of words and exact match; fluency entropy "
    "in bits of pairs (2/3) and triples (4/3) of words of at most 256 new tokens (words and marks by a regular "
    "expression, where the benchmark has NLTK's tokenizer)"
)


@dataclass(frozen=True)
class Utility:
    """The tasks as the harness loads them, and how many rows each has."""

    loaded: LoadedTasks
    counts: dict[str, int]


def load_probes(folder: Path | None, suite: str = "rwku_utility") -> Utility:
    """The rows of each set, put as the benchmark puts them, from FOLDER/rwku/Batch/1-50 or the hub.

    Raises:
        InputError: there is no set, a row lacks what its prompt needs (the message names it), or the hub is away.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # Level 1 of the hub has all 200 targets in their order.
    order = [row["subject"] for row in read_hub(HUB, "forget_level1")] if folder is None else []
    targets = list(dict.fromkeys(order))[:NUM_TARGETS]
    tasks, counts = [], {}
    for name, one in SETS.items():
        if folder is None:
            place = f"{HUB} ({one.hub})"
            rows = [row for row in read_hub(HUB, one.hub) if row["subject"] in targets]
        else:
            file = folder / "rwku" / "Batch" / "1-50" / f"{one.file}.json"
            place, rows = str(file), read_json(file) if file.is_file() else []
        if not rows:
            continue
        tasks.append(task_of(name, one, [put(one, row, f"{place}, row {n}") for n, row in enumerate(rows, 1)]))
        counts[name] = len(rows)
    if not tasks:
        raise NoData(f"{folder} has no rwku/Batch/1-50/retain_mmlu.json or its like; copy them there")
    seed_generators()
    return Utility(LoadedTasks.now(TaskManager(include_defaults=False).load(tasks)), counts)


def put(one: UtilitySet, row: Any, place: str) -> Json:
    """The row as the harness gets it; raises InputError, which names the place, if it is not as the set's rows are."""
    try:
        made = one.put(row)
        texts = [made["prompt"], made["shown"], *made.get("choices", ()), *made.get("references", ())]
        sound = all(isinstance(text, str) for text in texts)
        sound &= "choices" not in made or made["answer"] in range(len(made["choices"]))
        sound &= one.score not in (match_fact, match_reason) or len(made["references"]) > 0
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        made, sound = {}, False
    if not sound:
        raise InputError(f"{place}: is not as the rows of RWKU's {one.hub} are; get the file again")
    return made


def task_of(name: str, one: UtilitySet, docs: list[Json]) -> ConfigurableTask:
    """A task of the harness on these documents."""
    config: Json = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
        "test_split": "test",
        "doc_to_text": lambda doc: doc["prompt"],
        "gen_prefix": one.lead,
        "num_fewshot": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in one.metrics],
        "metadata": {"version": 1.0},
    }
    if one.score is None:
        config |= {"output_type": "multiple_choice", "doc_to_choice": lambda doc: doc["choices"]}
        config |= {"doc_to_target": lambda doc: doc["answer"]}
    else:
        config |= {"output_type": "generate_until", "process_results": one.score, "doc_to_target": lambda doc: ""}
        config |= {"generation_kwargs": {"until": [], "max_gen_toks": one.tokens, "do_sample": False}}
    return ConfigurableTask(config=config)


def answered(task: ConfigurableTask, requests: Requests) -> Answered:
    """A question without its examples, the right answer (of several, all; of an instruction none), and the model's."""
    document: Any = requests[0].doc
    if "choices" in document:
        choices = document["choices"]
        expected, response = choices[document["answer"]], choices[chosen_option(requests, len(choices))]
    else:
        expected, response = " / ".join(document["references"]), str(requests[0].resps[0]).strip()
    return Answered(prompt=document["shown"].strip(), expected=expected, answer=response)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Utility,
    *,
    batch_size: int = 64,
    title: str = "rwku_utility",
) -> Json:
    """{"metrics": {set: {metric: mean}}, "standard_errors": likewise, "counts": {set: n, "cut": prompts that lost their
    beginning}, "protocol": text, "sources": {set: digest of its rows}, "seeds", "texts": {set: [{"prompt",
    "expected", "answer"}, …]} (see `chosen_rows`)}; all but the entropy in [0, 1]."""
    lm = SharedLM(model, tokenizer, batch_size, title)
    found = evaluate_tasks(lm, probes.loaded, chat=tokenizer.chat_template is not None)["results"]
    scores, errors = ({name: numbers(found[name], part) for name in probes.counts} for part in (False, True))
    tasks: Any = probes.loaded.tasks["tasks"]
    return {
        "metrics": scores,
        "standard_errors": errors,
        "counts": {**probes.counts, "cut": lm.too_long},
        "protocol": PROTOCOL,
        "sources": sources_of(probes.loaded),
        "seeds": SEEDS,
        "texts": {name: texts_of_tasks({name: tasks[name]}, answered) for name in probes.counts},
    }
