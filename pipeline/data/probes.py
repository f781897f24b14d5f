"""Sets of rows on which probes measure a model: read, encoded, put into batches; and the measures of a set.

Training and `python -m eval.run --suite probes` share this file, so both measure the same tokens in the same batches.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import RunConfig
from pipeline.config.sources import CHOICE_MEASURES, TEXT_MEASURES, Corpus, Probe, Source
from pipeline.data.chat import encode_answers
from pipeline.data.corpus import Row, read, read_rows, text_of
from pipeline.data.encode import TokenOptions, encoder, minimum_content
from pipeline.data.tables import Located
from pipeline.data.tokenize import check_tokenizer, counted
from pipeline.errors import InputError

log = logging.getLogger(__name__)

Encoded = tuple[list[int], int]  # token ids, and how many of them, from the start, are not predicted


class Question(NamedTuple):
    """A choice among answers: the sequences of the set that hold them, and the place of the right one among these."""

    options: range
    right: int


@dataclass(frozen=True)
class ProbeSet:
    """The rows of one set as sequences; `questions` is None for a set of texts or answers, a row each."""

    name: str
    sequences: list[Encoded]
    digest: str  # of the source
    questions: list[Question] | None = None
    keys: Sequence[str] = ()  # of each row: its question, or its text where there is none

    def only(self, keys: Collection[str]) -> ProbeSet:
        """The set with the rows of these keys alone."""
        rows = [number for number, key in enumerate(self.keys) if key in keys]
        left = [self.keys[number] for number in rows]
        if self.questions is None:
            return replace(self, sequences=[self.sequences[number] for number in rows], keys=left)
        sequences: list[Encoded] = []
        questions = []
        for options, right in (self.questions[number] for number in rows):
            questions.append(Question(range(len(sequences), len(sequences) + len(options)), right))
            sequences += [self.sequences[number] for number in options]
        return replace(self, sequences=sequences, questions=questions, keys=left)


class RowScores(NamedTuple):
    """What one forward pass found out about one sequence, of the tokens that it predicts."""

    loss: float  # sum over the tokens, nats
    tokens: int
    correct: int  # how many of them have the largest logit
    suffix: int  # how many of the last ones have, up to the first from the end that has not


def known_suffix(hits: Sequence[bool]) -> int:
    """How many of the last tokens are greedy, up to the first from the end that is not (`RowScores.suffix`)."""
    return next((number for number, hit in enumerate(reversed(hits)) if not hit), len(hits))


def read_sets(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[ProbeSet]:
    """The sets that the run's probes measure, in the order of their names in the configuration.

    Raises:
        InputError: a source is missing or malformed, or none of its first rows can be used.
    """
    sets = []
    for name, probe in config.probes.items():
        key, heldout = _place(config, name)
        sets.append(read_set(name, probe, tokenizer, config.data.max_length, key=key, heldout=heldout))
    return sets


def source_digests(config: RunConfig, sets: Sequence[ProbeSet]) -> dict[str, str]:
    """{set: digest of the rows that it measures}: of the source, of the columns that are read, and how many rows."""
    columns = {name: json.dumps(probe.columns, sort_keys=True) for name, probe in config.probes.items()}
    return {
        one.name: f"{one.digest}-{hashlib.sha256(columns[one.name].encode()).hexdigest()[:16]}-first-{len(one.keys)}"
        for one in sets
    }


def read_keys(config: RunConfig) -> dict[str, list[str]]:
    """The keys (see `ProbeSet`) of the first rows of each set, without a tokenizer: also of rows that cannot be used.

    Raises:
        InputError: a source is missing or malformed.
    """
    keys = {}
    for name, probe in config.probes.items():
        key, heldout = _place(config, name)
        if probe.choices:
            keys[name] = [prompt for prompt, _, _ in _first_questions(probe, key)[0]]
        else:
            keys[name] = [_key_of(row) for row in _first_rows(probe, key, heldout)[0]]
    return keys


def _place(config: RunConfig, name: str) -> tuple[str, float]:
    """(the key below `data` that names the set, the share of its rows that training does not see)."""
    return (f"probes.{name}", 0.0) if name in config.data.probes else (name, getattr(config.data, name).heldout)


def read_set(
    name: str,
    probe: Probe,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    key: str,
    heldout: float = 0.0,
) -> ProbeSet:
    """The first `probe.limit` rows, each a sequence of its own, or several where it offers a choice.

    A text or an answer is encoded as training encodes it with `data.packing: documents`, and cut at `max_length`
    tokens. A row that predicts nothing is left out, and so is a question of which a choice does not fit whole.

    Args:
        key: names the set in messages, below `data`.
        heldout: of a corpus; the rows are then the first of those that training sees.

    Raises:
        InputError: see `read_sets`.
    """
    options = TokenOptions(max_length, "documents", "truncate")
    check_tokenizer(tokenizer, key, options, questions=probe.prompt is not None)
    found = (
        _choices(name, probe, tokenizer, max_length, key)
        if probe.choices
        else _texts(name, probe, tokenizer, options, key=key, heldout=heldout)
    )
    if not found.sequences:
        needed = minimum_content(probe.prompt is not None, max_length)
        raise InputError(f"data.{key}: {probe.path} has none in its first {probe.limit} rows with {needed}; add some")
    return found


def _texts(
    name: str,
    probe: Probe,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenOptions,
    *,
    key: str,
    heldout: float,
) -> ProbeSet:
    first, digest = _first_rows(probe, key, heldout)
    pieces = [one.pieces[0] for one in encoder(tokenizer, options)(first, 0)] if first else []
    used = [number for number, (ids, start) in enumerate(pieces) if len(ids) > max(start, 1)]
    _warn_of_unused(key, len(first) - len(used), minimum_content(probe.prompt is not None, options.max_length))
    sequences, keys = [pieces[number] for number in used], [_key_of(first[number]) for number in used]
    return ProbeSet(name, sequences, digest, keys=keys)


def _first_rows(probe: Probe, key: str, heldout: float) -> tuple[list[Row], str]:
    """The first rows of a set of texts or answers, and the digest of its source."""
    rows, digest = read(Corpus(**probe.model_dump(include={*Source.model_fields}), heldout=heldout), key)
    return list(islice(rows, probe.limit)), digest


def _key_of(row: Row) -> str:
    return row.texts[0] if row.prompt is None else row.prompt


def _choices(name: str, probe: Probe, tokenizer: PreTrainedTokenizerBase, max_length: int, key: str) -> ProbeSet:
    tokenizer = copy.deepcopy(tokenizer)  # a call changes the state that is saved with a model
    first, digest = _first_questions(probe, key)
    sequences: list[Encoded] = []
    questions: list[Question] = []
    keys: list[str] = []
    unused = 0
    for prompt, choices, right in first:
        answers = encode_answers(tokenizer, [prompt] * len(choices), choices)
        if any(len(ids) > max_length or len(ids) <= max(start, 1) for ids, start in answers):
            unused += 1
            continue
        questions.append(Question(range(len(sequences), len(sequences) + len(answers)), right))
        sequences += answers
        keys.append(prompt)
    _warn_of_unused(key, unused, f"choices within {max_length} tokens (data.max_length)")
    return ProbeSet(name, sequences, digest, questions, keys)


def _first_questions(probe: Probe, key: str) -> tuple[list[tuple[str, list[str], int]], str]:
    """The first rows of a choice among answers (see `_question`), and the digest of their source."""
    rows, digest = read_rows(probe, f"data.{key}.", probe.columns)
    return [_question(probe, row) for row in islice(rows, probe.limit)], digest


def _question(probe: Probe, located: Located) -> tuple[str, list[str], int]:
    """(question, answers to choose from, number of the right one); raises an InputError that names the row."""
    where, row = located
    assert probe.prompt and probe.choices and probe.answer, "the configuration refuses this"
    prompt = text_of(where, row, probe.prompt)
    assert isinstance(row, dict), "text_of has refused any other"
    for column in (probe.choices, probe.answer):
        if column not in row:
            raise InputError(f"{where}: no field {column!r}; it has {', '.join(map(repr, row))}")
    choices, answer = row[probe.choices], row[probe.answer]
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{where}: field {probe.choices!r} needs a list of texts; repair or remove the row")
    if isinstance(answer, str):  # its text: one of the choices, or beside them where they are all wrong (TOFU)
        is_number = answer.strip().isdigit() or len(answer.strip()) == 1 or answer.strip() in map(str.strip, choices)
        if answer not in choices and is_number:
            raise InputError(
                f"{where}: field {probe.answer!r} holds {answer!r}, which is no choice to the letter; write the "
                "number of the right choice (from 0) or its text, or add it to the choices"
            )
        choices = choices if answer in choices else [*choices, answer]
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices) or len(choices) < 2:
        raise InputError(
            f"{where}: field {probe.answer!r} holds {answer!r}, which is none of {len(choices)} choices (from 0); "
            "repair or remove the row"
        )
    return prompt, choices, answer


def _warn_of_unused(key: str, number: int, needed: str) -> None:
    if number:
        log.warning("data.%s: probes cannot use %s without %s", key, counted(number, "row"), needed)


def schedule(sets: Sequence[ProbeSet], size: int) -> list[list[int]]:
    """Batches of at most `size` sequences, as their numbers among those of all sets, one set after another.

    No batch has sequences of two sets; sequences of about one length stand together, so that there is little padding.
    A batch depends neither on the number of ranks nor on the other sets: the same numbers come out of it anywhere.
    """
    batches, start = [], 0
    for found in sets:
        lengths = [len(ids) for ids, _ in found.sequences]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        batches += [[start + number for number in order[at : at + size]] for at in range(0, len(order), size)]
        start += len(order)
    return batches


def measure_sets(sets: Sequence[ProbeSet], rows: Sequence[RowScores]) -> dict[str, dict[str, float]]:
    """The measures of each set by its name, from the scores of the sequences of all sets, one set after another."""
    left = iter(rows)
    return {found.name: measures_of(found, list(islice(left, len(found.sequences)))) for found in sets}


def measures_of(found: ProbeSet, rows: Sequence[RowScores]) -> dict[str, float]:
    """The measures of a set, from the scores of its sequences in their order.

    Texts and answers: `extraction_strength`, 1 - k/T with k the least number of its T tokens after which each of the
    rest has the largest logit, given the right tokens before it (Carlini et al. 2021; 0 where the last has not);
    `exact_memorization`, the share of the tokens that have the largest logit; `probability`, the geometric mean of the
    probabilities of the tokens; all three as means over the rows. `loss` is the mean over all tokens, in nats.

    A choice among answers: `accuracy`, the share of the questions whose right answer has the least loss, summed over
    its tokens (the end of the answer among them) and not divided by their number; of equal ones the first counts.
    """
    if any(math.isnan(row.loss) for row in rows):  # the model is broken, and has no largest logit
        return dict.fromkeys(TEXT_MEASURES if found.questions is None else CHOICE_MEASURES, math.nan)
    if found.questions is not None:
        hits = [chosen_option(question, rows) == question.right for question in found.questions]
        return {"accuracy": sum(hits) / len(hits)}
    return {
        "extraction_strength": _mean(row.suffix / row.tokens for row in rows),
        "exact_memorization": _mean(row.correct / row.tokens for row in rows),
        "probability": _mean(math.exp(-row.loss / row.tokens) for row in rows),
        "loss": math.fsum(row.loss for row in rows) / sum(row.tokens for row in rows),
    }


def chosen_option(question: Question, rows: Sequence[RowScores]) -> int:
    """The option with the least summed loss; `rows`: the scores of all sequences of the set."""
    return min(range(len(question.options)), key=lambda number: rows[question.options[number]].loss)


def _mean(values: Iterable[float]) -> float:
    """In float64, rounded once: the order of the values does not matter."""
    found = list(values)
    return math.fsum(found) / len(found)
