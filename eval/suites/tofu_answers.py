"""What a model answers to the questions of TOFU, and how it scores the answers that are given."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from eval.suites import scoring
from eval.suites.membership import MEMBERSHIP, membership
from eval.suites.rouge import recall_rouge_score
from eval.suites.tofu_data import HELD_OUT, Probe
from pipeline.data.chat import closing_tokens, encode_answers
from pipeline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MAX_NEW_TOKENS = 200


LOWEST = 0.4  # the share of tokens that Min-K% and Min-K%++ look at, as in OpenUnlearning's TOFU


class Scored(NamedTuple):
    """Of one answer to one question, from one forward pass."""

    loss: float  # mean, nats a token
    strength: float  # extraction strength; NaN with a loss that is no number
    memorized: float  # share of greedy tokens
    familiar: dict[str, float]  # see `membership`


class Result(NamedTuple):
    """Of one question: mean losses, in nats per token, the recall of the greedy answer, and this answer."""

    answer: float
    paraphrase: float
    perturbed: list[float]
    rouge: float
    generated: str = ""
    right: Scored = Scored(math.nan, math.nan, math.nan, dict.fromkeys(MEMBERSHIP, math.nan))

    def log_truth_ratio(self) -> float:
        """log R, which is finite wherever the losses are and orders answers as R does."""
        return self.paraphrase - fmean(self.perturbed)


def score_answer(text: str, ids: Tensor, logits: Tensor, *, start: int, closing: int) -> Scored:
    """The scores of an answer `text`, which are tokens `start` and later of `ids` [T] int64.

    Args:
        logits: [T, V] float32; row t predicts token t + 1.
        closing: tokens after the answer, for which the loss alone counts.
    """
    from torch.nn.functional import cross_entropy

    from pipeline.data.probes import known_suffix

    start, end = max(start, 1), len(ids) - closing  # nothing predicts a first token
    loss = cross_entropy(logits[start - 1 : -1], ids[start:]).item()
    familiar = membership(text, ids, logits, lowest=LOWEST, start=start, end=end)
    if not math.isfinite(loss) or end <= start:
        return Scored(loss, math.nan, math.nan, familiar)
    greedy = (logits[start - 1 : end - 1].argmax(dim=-1) == ids[start:end]).tolist()
    return Scored(loss, known_suffix(greedy) / len(greedy), fmean(greedy), familiar)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "tofu",
) -> list[Result]:
    """The result of each probe, in order. Held-out authors have `right` alone; the rest of theirs is NaN."""
    model.eval()
    if tokenizer.chat_template is None and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token and no chat template, so no answer can end; set one")
    texts = [
        (probe["answer"], probe.get("paraphrase", probe["answer"]), *probe.get("perturbed", ())) for probe in probes
    ]
    rows = zip(probes, texts, strict=True)
    pairs = list(dict.fromkeys((probe["question"], text) for probe, row in rows for text in row))
    encoded, closing = encode_answers(tokenizer, *zip(*pairs, strict=True)), len(closing_tokens(tokenizer))

    def of_pair(at: int, ids: Tensor, logits: Tensor) -> Scored:
        return score_answer(pairs[at][1], ids, logits, start=encoded[at][1], closing=closing)

    found = scoring.read_logits(
        model, [ids for ids, _ in encoded], of_pair, batch_size=batch_size, title=f"{title} likelihoods"
    )
    scored, spans = dict(zip(pairs, found, strict=True)), dict(zip(pairs, encoded, strict=True))
    questions = [probe for probe in probes if probe["set"] != HELD_OUT]
    starts = [spans[probe["question"], probe["answer"]] for probe in questions]
    answers = scoring.answer(
        model,
        tokenizer,
        [ids[:start] for ids, start in starts],  # up to where training begins to predict
        stopping=scoring.Stopping(MAX_NEW_TOKENS, scoring.ends_of_answer(model, tokenizer)),
        batch_size=batch_size,
        title=f"{title} answers",
    )
    recalls = recall_rouge_score([probe["answer"] for probe in questions], answers)
    generated = {id(probe): words for probe, words in zip(questions, zip(recalls, answers, strict=True), strict=True)}
    results = []
    for probe, row in zip(probes, texts, strict=True):
        right, paraphrase, *perturbed = (scored[probe["question"], text] for text in row)
        recall, answer = generated.get(id(probe), (math.nan, ""))
        wrong = [one.loss for one in perturbed] or [math.nan]
        results.append(Result(right.loss, paraphrase.loss, wrong, recall, answer, right))
    return results
