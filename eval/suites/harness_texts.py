"""What a model answered to tasks of lm-evaluation-harness, in words: the few answers that an evaluation keeps.

They are read from the requests that the harness put and the answers that it got, once all scores are computed. Its own
log of samples would hold every document of every task, and would call a task's functions between those that score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from eval.suites.texts import Answered, chosen_rows

OTHER_TEXT = "(another text)"  # where the harness asked only whether the right text is the greedy one

Requests = list[Instance]  # of one document


def chosen_option(requests: Requests, options: int) -> int:
    """The option with the greatest log-likelihood, as the harness's `acc` takes it; of equal ones the first."""
    return max(range(options), key=lambda at: requests[at].resps[0][0])


def texts_of_tasks(
    tasks: Mapping[str, Any], answered: Callable[[Any, Requests], Answered | None] | None = None
) -> list[Answered]:
    """The `chosen_rows` of the documents of all these tasks together, as their last evaluation put them.

    Args:
        tasks: evaluated tasks of the harness by their names.
        answered: the answer of a document of a task; None: `answer_of`.
    """
    documents: list[tuple[Any, Requests]] = []
    for task in tasks.values():
        of_document: dict[int | None, Requests] = defaultdict(list)
        for request in task.instances:
            of_document[request.doc_id].append(request)
        documents += [(task, sorted(requests, key=lambda one: one.idx)) for requests in of_document.values()]
    rows = [(answered or answer_of)(*documents[number]) for number in chosen_rows(len(documents))]
    return [row for row in rows if row is not None]


def answer_of(task: Any, requests: Requests) -> Answered | None:
    """The answer to a document of any task; None of a text that is only scored, or of a task that is a class.

    Of a choice, `expected` and `answer` are the choices themselves; of a likelihood, the answer is known only where the
    right text is the greedy one.
    """
    document, kind = requests[0].doc, task.OUTPUT_TYPE
    if not isinstance(task, ConfigurableTask) or kind == "loglikelihood_rolling":
        return None
    prompt, target = task.doc_to_text(document), task.doc_to_target(document)
    if kind == "multiple_choice":
        choices = task.doc_to_choice(document)
        if task.multiple_input:  # the choices are what comes before one ending
            prompt, target = f"… {target}", prompt
        response, expected = choices[chosen_option(requests, len(choices))], words_of(target, choices)
    elif kind == "loglikelihood":
        expected = words_of(target, ())
        response = expected if requests[0].resps[0][1] else OTHER_TEXT
    else:
        choices = () if task.config.doc_to_choice is None else task.doc_to_choice(document)
        response, expected = requests[0].resps[0], words_of(target, choices)
    return Answered(prompt=str(prompt).strip(), expected=expected.strip(), answer=str(response).strip())


def words_of(target: object, choices: Sequence[str]) -> str:
    """A target in words: a number is that of a choice (none that is out of range), and a list has alternatives."""
    if isinstance(target, list):
        return " / ".join(filter(None, (words_of(one, choices).strip() for one in target)))
    if isinstance(target, int) and choices:
        return choices[target] if 0 <= target < len(choices) else ""
    return str(target)
