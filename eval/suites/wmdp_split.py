"""WMDP's questions in two parts that share little: T to learn again, V to ask (RepSelect, arXiv 2606.17168).

A model that learns the facts of T and then answers V has recovered what it seemed to have forgotten, because T does not
teach V. Suites `wmdp_bio_low_mi` and `wmdp_cyber_low_mi` ask V as the suites of all questions do; the attack `relearn`
of `eval.robustness` trains on T, whatever the forget corpus of the run was.

Local data are `wmdp/wmdp_{bio,cyber}_{T,V}.jsonl`, questions as in `eval/suites/harness.py`; a row of T may have
`sentences`, a list of texts that state its fact. Without a folder the hub has `filypo/wmdp_{bio,cyber}_{T,V}`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from eval.files import read_hub
from eval.suites import NoData
from eval.suites.harness import (
    BUILT_IN,
    Questions,
    Row,
    evaluate,
    load_questions,
    question_of,
    question_texts,
    write_task,
)
from eval.suites.rouge import words
from pipeline.data.tables import Located, json_rows
from pipeline.errors import InputError

__all__ = ["evaluate", "load_probes", "question_texts", "texts_to_relearn"]

ENDING = "_low_mi"  # of the names of these suites
OWNER = "filypo"  # of the data sets on the hub


@dataclass(frozen=True)
class SplitQuestions(Questions):
    """The questions of V, and the texts of T."""

    learned: tuple[str, ...] = ()


def read_part(folder: Path | None, name: str) -> tuple[str, Sequence[Located]]:
    """The place of a part's rows, and each row with its own place; raises InputError for a missing part."""
    if folder is None:
        place = f"{OWNER}/{name}"
        return place, [(f"{place}, row {n}", row) for n, row in enumerate(read_hub(place, "default", "train"), 1)]
    file = folder / "wmdp" / f"{name}.jsonl"
    if not file.is_file():
        raise NoData(f"there is no {file}; --data needs it (keys question, choices, answer), or leave --data out")
    return str(file), list(json_rows(file))


def load_probes(folder: Path | None, suite: str = f"wmdp_bio{ENDING}") -> SplitQuestions:
    """The questions of V and the texts of T, from FOLDER/wmdp or the hub.

    Raises:
        InputError: a part is missing, empty or malformed (the message names the row), or T has a question of V.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is intended here: a model object
    datasets.disable_progress_bars()
    task = suite.removesuffix(ENDING)
    learned_from, to_learn = read_part(folder, f"{task}_T")
    source, to_ask = read_part(folder, f"{task}_V")
    questions = [question_of(where, row) for where, row in to_ask]
    learned = [(question_of(where, row), where, row) for where, row in to_learn]
    if not questions or not learned:
        raise InputError(f"{learned_from if questions else source} holds no question; get it again")
    known = {tuple(words(question["question"])) for question in questions}
    for question, where, _ in learned:
        if tuple(words(question["question"])) in known:
            raise InputError(
                f"{where}: {source} has this question too ({question['question'][:80]!r}), so that relearning would "
                "teach its answer; take it out of one of them"
            )
    with tempfile.TemporaryDirectory() as temporary:
        write_task(Path(temporary), BUILT_IN / "wmdp" / f"{task}.yaml", questions, [])
        found = load_questions(Path(temporary), task, 0, source)
    texts = tuple(text for question, where, row in learned for text in texts_of(question, where, row))
    return SplitQuestions(found.suite, found.loaded, found.shots, found.source, texts)


def texts_of(question: Row, where: str, row: object) -> list[str]:
    """The texts that state the fact of a question: its `sentences`, or else the question with its right answer."""
    sentences = row.get("sentences") if isinstance(row, dict) else None
    if sentences is None:
        return [f"{question['question'].strip()}\nAnswer: {question['choices'][question['answer']]}"]
    if not isinstance(sentences, list) or not all(isinstance(text, str) and text.strip() for text in sentences):
        raise InputError(f"{where}: sentences must be a list of texts; repair or remove it")
    return sentences


def texts_to_relearn(probes: SplitQuestions) -> list[str]:
    """The texts of T, in their order."""
    return [*probes.learned]
