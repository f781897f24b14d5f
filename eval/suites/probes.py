"""The probes of a run on its exports: the same rows, batches, forward pass and measures as while it trained.

The sets are those of the run's own configuration (`data.probes`, and its corpora): the config.yaml of the run folder,
or the file of --config. The scores of the export of a step are the numbers `probe/SET/MEASURE` of that step in
`metrics.jsonl`.

An attack leaves rows out: of every set those whose question, or text, is in a row that was learned again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.results.method import refuse_changed
from eval.suites import scoring
from eval.suites.sharing import share
from eval.suites.texts import Answered, TeacherForced, chosen_rows
from pipeline.config.load import resolve
from pipeline.config.schema import RunConfig
from pipeline.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.data.probes import ProbeSet, RowScores

PROTOCOL = (
    "teacher forcing, the first rows of each set (limit), cut at data.max_length tokens, answers in the tokenizer's "
    "chat template; extraction_strength: 1 - k/T, all tokens after the first k of T are greedy; exact_memorization: "
    "share of greedy tokens; probability: exp of the mean log-probability of a token; means over rows; loss: nats a "
    "token, mean over all tokens; accuracy: the right one of the choices has the least summed loss"
)


class Probe(NamedTuple):
    """A row of a set."""

    config: RunConfig  # which names the sets; the same of every row
    set: str
    key: str  # its question, or its text where there is none


def load_probes(folder: Path | None, suite: str = "probes", *, run: Path | None = None) -> list[Probe]:
    """The rows of the sets that a configuration names. run: config.yaml of a run, or another file with its keys.

    Raises:
        InputError: there is no configuration, it is not valid or names no set, or a source is missing, malformed or,
            of a run, another one by now.
    """
    if run is None:
        raise InputError("suite probes reads data.probes of a run: name a run folder by --model, or give --config FILE")
    from pipeline.data.probes import read_keys  # which imports transformers

    config = resolve(run)
    for name, probe in config.probes.items():
        key = f"data.probes.{name}" if name in config.data.probes else f"data.{name}"
        refuse_changed(run.parent, key, probe)
    if not (probes := [Probe(config, name, key) for name, keys in read_keys(config).items() for key in keys]):
        raise InputError(f"{run} names no row to measure; give it data.probes, or data.forget and data.retain")
    return probes


def group_of(probe: Probe) -> str:
    """The text by which a row of a corpus is known to be about this row, whatever its set."""
    return probe.key


def forgotten(probe: Probe) -> bool:
    """Whether a row belongs to the forget set."""
    return probe.set == "forget"


class _Whole:
    """A model in place of a DeepSpeed engine."""

    optimizer = None

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.module, self.device = model, device

    def __call__(self, *inputs: object, **named: object) -> Any:
        return self.module(*inputs, **named)

    def eval(self) -> nn.Module:
        return self.module.eval()

    def train(self) -> nn.Module:
        return self.module.eval()  # nothing trains here


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "probes",
) -> dict[str, Any]:
    """{"metrics": {set: {measure: value}}, "counts": {set: rows}, "protocol": text, "sources": {set: digest}, "texts":
    {set: [{"prompt", "expected", "teacher_forced"}, …]}, of a choice among answers "answer" in place of the last}.

    A batch has as many sequences as one of the probes in training (`train.micro_batch_size`) and not `batch_size`:
    another batch has other rounding errors.

    Raises:
        InputError: a row is longer than the model reads (of the run's own models none is; see `data.max_length`).
    """
    import torch

    from pipeline.data.probes import measure_sets, read_sets, schedule, source_digests
    from pipeline.modeling.outputs import temporary_outputs
    from pipeline.modeling.probes import batch_of, rows_of, score_rows

    config, keys = probes[0].config, defaultdict(set[str])
    for probe in probes:
        keys[probe.set].add(probe.key)
    sets = [left for one in read_sets(config, tokenizer) if (left := one.only(keys[one.name])).sequences]
    sequences = [sequence for found in sets for sequence in found.sequences]
    scoring.check_positions(model, max(len(ids) for ids, _ in sequences), title)
    batches = schedule(sets, config.train.micro_batch_size)
    engine = _Whole(model.eval(), model.device)

    shown = numbers_shown(sets)

    def work(batch: list[int]) -> list[tuple[RowScores, list[int]]]:
        scores, greedy = score_rows(engine, batch_of(sequences, batch).to(model.device))
        tokens = [row if number in shown else [] for number, row in zip(batch, greedy.tolist(), strict=True)]
        return [*zip(rows_of(scores), tokens, strict=True)]

    with temporary_outputs(engine), torch.no_grad():
        found = scoring.restore_order(batches, share(batches, work, title))
    rows = [row for row, _ in found]
    counts = {one.name: len(one.sequences if one.questions is None else one.questions) for one in sets}
    return {
        "metrics": measure_sets(sets, rows),
        "counts": counts,
        "protocol": PROTOCOL,
        "sources": source_digests(config, sets),
        "texts": texts_of_sets(tokenizer, sets, rows, [tokens for _, tokens in found]),
    }


def numbers_shown(sets: Sequence[ProbeSet]) -> set[int]:
    """The sequences, by their numbers among those of all sets, whose greedy tokens are kept: `chosen_rows` of a set."""
    found: set[int] = set()
    first = 0
    for one in sets:
        if one.questions is None:
            found |= {first + number for number in chosen_rows(len(one.sequences))}
        first += len(one.sequences)
    return found


def texts_of_sets(
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[ProbeSet],
    rows: Sequence[RowScores],
    greedy: Sequence[Sequence[int]],
) -> dict[str, list[TeacherForced] | list[Answered]]:
    """The `chosen_rows` of each set: with the greedy tokens or, of a choice among answers, with the chosen one.

    Args:
        rows, greedy: of the sequences of all sets, the scores, and what is greedy after each of their tokens.
    """
    texts: dict[str, list[TeacherForced] | list[Answered]] = {}
    first = 0
    for one in sets:
        own = slice(first, first + len(one.sequences))
        first = own.stop
        if one.questions is None:
            texts[one.name] = greedy_texts(tokenizer, one, greedy[own])
        else:
            texts[one.name] = choices(tokenizer, one, rows[own])
    return texts


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def greedy_texts(
    tokenizer: PreTrainedTokenizerBase, one: ProbeSet, greedy: Sequence[Sequence[int]]
) -> list[TeacherForced]:
    """Of a question its answer; of a text without a question the second half."""
    found = []
    for number in chosen_rows(len(one.sequences)):
        ids, start = one.sequences[number]
        at = start or max(len(ids) // 2, 1)
        prompt = one.keys[number] if start else text_of(tokenizer, ids[:at])
        shown = text_of(tokenizer, greedy[number][at - 1 : len(ids) - 1])
        found.append(TeacherForced(prompt=prompt, expected=text_of(tokenizer, ids[at:]), teacher_forced=shown))
    return found


def choices(tokenizer: PreTrainedTokenizerBase, one: ProbeSet, rows: Sequence[RowScores]) -> list[Answered]:
    """A question, its right answer and the one that the model finds most likely."""
    from pipeline.data.probes import chosen_option

    assert one.questions is not None, "the set is a choice among answers"
    found = []
    for number in chosen_rows(len(one.questions)):
        question = one.questions[number]
        options = [text_of(tokenizer, ids[start:]) for ids, start in (one.sequences[at] for at in question.options)]
        chosen = options[chosen_option(question, rows)]
        found.append(Answered(prompt=one.keys[number], expected=options[question.right], answer=chosen))
    return found
