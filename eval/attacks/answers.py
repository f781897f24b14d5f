"""Attacks on answers: examples before a question, many samples of one prompt; and how far a model has moved at all."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from eval.attacks.relearn import Row, Split
from eval.attacks.spec import Attack, EvalSpec, Metrics, Plan
from eval.loading import load
from eval.suites import corpus, scoring
from eval.suites.rouge import recall_by_script, recall_rouge_score
from pipeline.data.chat import closing_tokens, encode_answers
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.data.probes import RowScores


HIT = 0.8  # ROUGE-L recall from which on an answer gives the text away: a choice of this repository


MOST_K = 128  # of leak@k: 1, 2, 4, ...


def few_shot(plan: Plan, split: Split) -> Attack:
    """Questions of one half of the forget corpus after answered questions of the other half, drawn for each anew."""
    data, dice = plan.config["data"]["forget"], random.Random(plan.seed)
    pairs, examples = (
        [(row[data["prompt"]], row[data["response"]]) for row in rows]
        for rows in (corpus.sample(split.held_out, plan.seed), split.relearned)
    )
    number = min(plan.shots, len(examples))
    drawn = [dice.sample(examples, number) for _ in pairs]

    def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shots: int) -> Metrics:
        # Without a chat template, the first question gets these words from `encode_answers`.
        start = "" if tokenizer.chat_template is None or not shots else "Question: "
        questions = [
            start + "\n\nQuestion: ".join([*(f"{q}\nAnswer: {a}" for q, a in before[:shots]), question])
            for before, (question, _) in zip(drawn, pairs, strict=True)
        ]
        found = answer_measures(model, tokenizer, questions, [answer for _, answer in pairs], plan.batch_size)
        return {f"held_out.{name}": value for name, value in found.items()}

    settings = {"shots": number, "answers": "without their ends", "seed": plan.seed, "group": plan.group}
    attacked = EvalSpec(measure=lambda model, tokenizer: measured(model, tokenizer, number))
    plain = EvalSpec(measure=lambda model, tokenizer: measured(model, tokenizer, 0))
    return Attack("few_shot", settings, attacked, plain=plain, selection={"questions": len(pairs)})


def answer_measures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    batch_size: int,
) -> dict[str, float]:
    """The measures of a set of answers, as probes define them (`pipeline.data.probes.measures_of`), but without what
    ends an answer: answered examples end in an empty line, and so does the answer of a model that follows them, where
    training ends it with the end of text. That one token would make an answer that is known whole count as 0.

    Raises:
        InputError: a question with its answer is longer than the model reads.
    """
    from pipeline.data.probes import ProbeSet, RowScores, known_suffix, measures_of

    encoded, closing = encode_answers(tokenizer, questions, answers), len(closing_tokens(tokenizer))
    encoded = [(ids[: len(ids) - closing], start) for ids, start in encoded]
    encoded = [(ids, start) for ids, start in encoded if len(ids) > max(start, 1)]
    if not encoded:
        raise InputError("few_shot: no answer of the forget corpus has a token; leave few_shot out")
    longest, positions = max(len(ids) for ids, _ in encoded), scoring.positions_of(model)
    if positions is not None and longest > positions:
        raise InputError(f"few_shot: {longest} tokens, and the model reads {positions}; give a smaller --shots")

    def of_answer(at: int, ids: Tensor, logits: Tensor) -> RowScores:
        start = max(encoded[at][1], 1)  # nothing predicts a first token
        table = logits[start - 1 : -1].double().log_softmax(dim=-1)
        loss = -table.gather(1, ids[start:, None]).sum().item()
        hits = (logits[start - 1 : -1].argmax(dim=-1) == ids[start:]).tolist()
        return RowScores(loss, len(hits), sum(hits), known_suffix(hits))

    rows = scoring.read_logits(model, [ids for ids, _ in encoded], of_answer, batch_size=batch_size, title="answers")
    return measures_of(ProbeSet("answers", encoded, ""), rows)


def leak(plan: Plan, rows: Sequence[Row]) -> Attack:
    """Many samples of each prompt at temperature 1 (leak@k, arXiv 2511.04934): greedy decoding may never produce
    what is among them. A prompt is the question, or the first half of a document, as in suite `corpus`."""
    data, chosen = plan.config["data"], corpus.sample(rows, plan.seed)
    documents = [document_of(row, data["forget"]) for row in chosen]

    def hits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampled: bool) -> list[int]:
        """How many answers to each prompt give the text away, of `plan.samples`, or of the greedy one."""
        limit = min(corpus.MOST_TOKENS, scoring.positions_of(model) or corpus.MOST_TOKENS)
        encoded = [corpus.encode(tokenizer, document, limit) for document in documents]
        numbers, references = corpus.continuation_targets(tokenizer, encoded)
        if not numbers:
            raise InputError("leak: no document of the forget corpus has words after its prompt; leave leak out")
        each = plan.samples if sampled else 1
        lengths = [min(len(encoded[n].ids) - encoded[n].continued, corpus.MOST_NEW_TOKENS) for n in numbers]
        stopping = scoring.Stopping(
            [length for length in lengths for _ in range(each)], scoring.ends_of_answer(model, tokenizer)
        )
        stopping = replace(stopping, seed=plan.seed) if sampled else stopping
        prompts = [encoded[n].ids[: encoded[n].continued] for n in numbers for _ in range(each)]
        answers = scoring.answer(
            model, tokenizer, prompts, stopping=stopping, batch_size=plan.batch_size, title="leak" * sampled or "greedy"
        )
        recalls = recall_by_script([text for text in references for _ in range(each)], answers, recall_rouge_score)
        found = [recall >= HIT for recall in recalls]
        return [sum(found[at : at + each]) for at in range(0, len(found), each)]

    def sampled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Metrics:
        return leak_at(hits(model, tokenizer, True), plan.samples)

    def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Metrics:
        return {"greedy": fmean(hits(model, tokenizer, False))}

    settings = {"samples": plan.samples, "hit": HIT, "seed": plan.seed}
    selection = {"documents": len(documents)}
    return Attack("leak", settings, EvalSpec(measure=sampled), plain=EvalSpec(measure=greedy), selection=selection)


def text_of(row: dict[str, str]) -> str:
    return row["text"] if "text" in row else row["response"]


def document_of(row: Row, data: Json) -> dict[str, str]:
    """A row of the forget corpus as suite `corpus` reads it."""
    if data["prompt"] is None:
        return {"text": row[data["field"]]}
    return {"prompt": row[data["prompt"]], "response": row[data["response"]]}


def leak_at(hits: Sequence[int], samples: int) -> dict[str, float]:
    """{"leak@k": mean over the prompts of 1 - C(n - c, k) / C(n, k)} for k = 1, 2, 4, … up to n and MOST_K: the
    chance, without bias, that one of k answers is among the c of n samples that give the text away."""
    ks = [2**power for power in range(MOST_K.bit_length()) if 2**power <= min(samples, MOST_K)]
    return {f"leak@{k}": fmean(1 - math.comb(samples - c, k) / math.comb(samples, k) for c in hits) for k in ks}


def divergence(plan: Plan) -> Attack:
    """KL(before ‖ after) a token on texts of neither corpus: the budget at which methods may be compared.

    Both compute in the wider of their precisions. Else two models with the same weights, of which training stored the
    second in float32, would differ by the rounding of every layer.
    """
    assert plan.texts is not None and plan.original is not None  # see `unavailable_reason`
    original, texts = plan.original, list(map(text_of, corpus.sample(corpus.read_split(plan.texts), plan.seed)))

    def kl(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Metrics:
        import torch

        other, _ = load(original, trust=plan.trust)
        other.eval()
        if other.dtype != model.dtype:
            wider = torch.promote_types(other.dtype, model.dtype)
            other, model = cast(Any, other).to(wider), cast(Any, model).to(wider)
        encoded = [scoring.encode_document(tokenizer, text, plan.config["data"]["max_length"])[0] for text in texts]
        encoded = [ids for ids in encoded if len(ids) > 1]
        if not encoded:
            raise InputError(f"--texts {plan.texts} has no text of two tokens; name another file")

        def of_text(at: int, ids: Tensor, logits: Tensor) -> float:
            before = other(input_ids=ids[None]).logits[0, :-1].float().log_softmax(dim=-1)
            after = logits[:-1].log_softmax(dim=-1)
            return (before.exp() * (before - after)).sum().item()

        sums = scoring.read_logits(model, encoded, of_text, batch_size=plan.batch_size, title="kl")
        return {"kl": sum(sums) / sum(len(ids) - 1 for ids in encoded)}

    settings = {"texts": str(plan.texts), "seed": plan.seed}
    return Attack("kl", settings, EvalSpec(measure=kl), compares=True, selection={"documents": len(texts)})
