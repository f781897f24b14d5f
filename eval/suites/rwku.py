"""RWKU: what a model still knows about real persons it was to forget, and about their neighbours (Jin et al., 2024).

Seven kinds of score, for the first 50 targets (the batch setting): F-FB fill-in-the-blank, F-QA questions, F-AA
adversarial questions and F-All for what is to be forgotten; N-FB, N-QA, N-All for neighbouring knowledge. Each is the
ROUGE-L recall of a greedy answer, in [0, 1], zero-shot, by both published protocols (see `PROTOCOLS`).

Membership inference on passages of the forget set (FM) and of other persons (RM): four scores, each of which rises
with the familiarity of the text; per set their means, and AUC, the chance that a text of FM scores above one of RM.

Under --data, `rwku/Batch/1-50/NAME.json` for each NAME in `QUESTIONS` and `rwku/NAME_mia_first50.json`; a file that
does not exist is not evaluated, and its count is 0. Without --data, the dataset `jinzhuoran/RWKU` on the hub.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from eval.files import check_texts, read_hub, read_json
from eval.suites import NoData, scoring
from eval.suites.membership import MEMBERSHIP, auc, membership
from eval.suites.rouge import recall_rouge, recall_rouge_score, script_note
from eval.suites.texts import Answered, choose_texts
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Probe = Json  # keys set, subject, query, type, answer; or set (FM, RM), subject, text


HUB = "jinzhuoran/RWKU"


NUM_TARGETS = 50


QUESTIONS = {
    "F-FB": "forget_level1",
    "F-QA": "forget_level2",
    "F-AA": "forget_level3",
    "N-FB": "neighbor_level1",
    "N-QA": "neighbor_level2",
}


TEXTS = {"FM": "forget", "RM": "retain"}


LOWEST = 0.2  # the share of tokens that Min-K% and Min-K%++ look at


@dataclass(frozen=True)
class Protocol:
    """How a published evaluation prompts, stops and scores."""

    lead_in_header: bool  # 'Answer:' after the assistant's header, else at the end of the user's turn
    max_new_tokens: int
    stop_tokens: tuple[str, ...]  # beside the end of text
    stop_texts: tuple[str, ...]
    scorer: str  # the package that computes ROUGE-L recall
    pooled: bool  # All: the mean over all instances, else the mean of FB and QA
    words: str


PROTOCOLS = {
    "rwku": Protocol(
        lead_in_header=True,
        max_new_tokens=30,
        stop_tokens=("<|eot_id|>",),
        stop_texts=(),
        scorer="rouge",
        pooled=True,
        words="RWKU's own code: greedy, zero-shot, 'Answer:' after the assistant's header, at most 30 new tokens, "
        f"stops eos and <|eot_id|>, an empty answer scored as '{scoring.NO_ANSWER}'; ROUGE-L recall of the package "
        "rouge; All: mean over instances",
    ),
    "sago": Protocol(
        lead_in_header=False,
        max_new_tokens=32,
        stop_tokens=(),
        stop_texts=("\n\n", "\nQuestion", "Question:"),
        scorer="rouge_score",
        pooled=False,
        words="the SAGO paper's code: greedy, zero-shot, 'Answer:' at the end of the user's turn, at most 32 new "
        "tokens, cut at an empty line, '\\nQuestion' or 'Question:'; ROUGE-L recall of the package rouge_score "
        "with stemming; All: mean of FB and QA",
    ),
}


MEMBERSHIP_WORDS = (
    "greater is more familiar: loss = mean log-likelihood a token; zlib = loss / bytes of the compressed text; "
    f"min_k, min_k_plus = mean of the lowest {LOWEST:.0%} of the tokens' log-likelihoods, as they are and standardised "
    "by the predicted distribution; AUC = chance that FM scores above RM; texts whose scores are no numbers are "
    "left out"
)


def load_probes(folder: Path | None, suite: str = "rwku") -> list[Probe]:
    """Questions and texts in the order of `QUESTIONS` and `TEXTS`, from FOLDER/rwku or the hub.

    Raises:
        InputError: no question at all, a malformed file (the message names the row), or no hub.
    """
    probes: list[Probe] = []
    targets: list[str] = []
    keys = dict.fromkeys(QUESTIONS, ("query", "type", "answer")) | dict.fromkeys(TEXTS, ("text",))
    for name, wanted in keys.items():
        if folder is None:
            where = QUESTIONS.get(name) or f"mia_{TEXTS[name]}"
            rows = check_texts(read_hub(HUB, where), (*wanted, "subject"), f"{HUB} ({where})")
            # The hub has all 200 targets; the questions of level 1 stand in their order.
            targets = targets or list(dict.fromkeys(row["subject"] for row in rows))[:NUM_TARGETS]
            rows = [row for row in rows if row["subject"] in targets]
        else:
            part = f"Batch/1-50/{QUESTIONS[name]}" if name in QUESTIONS else f"{TEXTS[name]}_mia_first50"
            file = folder / "rwku" / f"{part}.json"
            rows = check_texts(read_json(file), wanted, str(file)) if file.is_file() else []
        probes += [{"set": name, "subject": row.get("subject"), **{key: row[key] for key in wanted}} for row in rows]
    if not any(probe["set"] in QUESTIONS for probe in probes):
        raise NoData(f"{folder} has no rwku/Batch/1-50/forget_level1.json or its like; copy them there")
    return probes


def group_of(probe: Probe) -> str | None:
    """The target of a probe of the forget set, whose name identifies passages; None for neighbours and others."""
    return probe["subject"] if forgotten(probe) else None


def forgotten(probe: Probe) -> bool:
    """Whether a probe belongs to the forget set."""
    return probe["set"][0] == "F"


def adversarial(probes: list[Probe]) -> tuple[list[Probe], list[Probe]]:
    """(plain, adversarial): F-FB and F-QA, and the attacks of level 3 on the same targets."""
    plain = [probe for probe in probes if probe["set"] in ("F-FB", "F-QA")]
    return plain, [probe for probe in probes if probe["set"] == "F-AA"]


def prompt_of(probe: Probe) -> tuple[str, str]:
    """(question, beginning of the answer) as RWKU words them; an affirmative suffix is itself that beginning."""
    task = "complete the blank in" if probe["set"].endswith("-FB") else "briefly answer"
    adversary = probe["type"] if probe["set"] == "F-AA" else ""
    lead = "" if adversary == "incontext learning" else "Question: "  # it brings its own
    question = f"Please {task} the following question.\n{lead}{probe['query']}"
    return (question, "") if adversary == "affirmative suffix" else (f"{question}\n", "Answer:")


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    protocol: Protocol,
    *,
    batch_size: int,
    title: str,
) -> list[str]:
    """The greedy answer to each probe, as the protocol cuts it."""
    prompts = []
    for question, lead in map(prompt_of, probes):
        turn, opening = (question, lead) if protocol.lead_in_header else (question + lead, "")
        prompts.append(scoring.encode_prompt(tokenizer, turn, opening))
    vocabulary = tokenizer.get_vocab()
    stop_tokens = (scoring.end_of_text(tokenizer), *(vocabulary.get(token) for token in protocol.stop_tokens))
    return scoring.answer(
        model,
        tokenizer,
        prompts,
        stopping=scoring.Stopping(protocol.max_new_tokens, stop_tokens, protocol.stop_texts),
        batch_size=batch_size,
        title=title,
    )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "rwku",
) -> tuple[list[dict[str, float]], dict[str, list[str]]]:
    """(results, answers): for each probe, in order, the recall by each protocol, or the membership scores of a text;
    and by each protocol, for each question, in order, what the model answered."""
    model.eval()
    results: list[dict[str, float]] = [{} for _ in probes]
    questions = [i for i, probe in enumerate(probes) if probe["set"] in QUESTIONS]
    answers: dict[str, list[str]] = {}
    for name, protocol in PROTOCOLS.items():
        chosen = [probes[i] for i in questions]
        answers[name] = answer(model, tokenizer, chosen, protocol, batch_size=batch_size, title=f"{title} {name}")
        recall = recall_rouge if protocol.scorer == "rouge" else recall_rouge_score
        recalls = recall([probe["answer"] for probe in chosen], answers[name])
        for i, value in zip(questions, recalls, strict=True):
            results[i][name] = value
    texts = [i for i, probe in enumerate(probes) if probe["set"] in TEXTS]
    scores = scoring.read_logits(
        model,
        [tokenizer(probes[i]["text"]).input_ids for i in texts],
        lambda at, ids, logits: membership(probes[texts[at]]["text"], ids, logits, lowest=LOWEST),
        batch_size=batch_size,
        title=f"{title} membership",
    )
    for i, of_text in zip(texts, scores, strict=True):
        results[i] = of_text
    return results, answers


def summarise(probes: list[Probe], results: list[dict[str, float]]) -> Json:
    """What `evaluate` returns, from all probes and their results."""
    sets: dict[str, list[dict[str, float]]] = {name: [] for name in (*QUESTIONS, *TEXTS)}
    for probe, result in zip(probes, results, strict=True):
        if all(math.isfinite(value) for value in result.values()):
            sets[probe["set"]].append(result)
    metrics: Json = {}
    for name, protocol in PROTOCOLS.items():
        means: dict[str, float] = {}
        for side in ("F", "N"):
            kinds = {kind: [row[name] for row in sets[kind]] for kind in QUESTIONS if kind[0] == side and sets[kind]}
            means |= {kind: fmean(values) for kind, values in kinds.items()}
            if protocol.pooled and kinds:
                means[f"{side}-All"] = fmean(value for values in kinds.values() for value in values)
            elif {f"{side}-FB", f"{side}-QA"} <= kinds.keys():
                means[f"{side}-All"] = fmean((means[f"{side}-FB"], means[f"{side}-QA"]))
        metrics[name] = means
    familiar = {name: {key: [row[key] for row in sets[name]] for key in MEMBERSHIP} for name in TEXTS if sets[name]}
    if familiar:
        metrics["membership"] = {name: {key: fmean(of) for key, of in keys.items()} for name, keys in familiar.items()}
        if len(familiar) == len(TEXTS):
            metrics["membership"]["AUC"] = {key: auc(familiar["FM"][key], familiar["RM"][key]) for key in MEMBERSHIP}
    return {
        "metrics": metrics,
        "counts": {name: len(rows) for name, rows in sets.items()},
        "protocol": {
            **{name: protocol.words for name, protocol in PROTOCOLS.items()},
            "membership": MEMBERSHIP_WORDS,
        },
        "versions": {name: version(name.replace("_", "-")) for name in ("rouge", "rouge_score")},
    }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "rwku",
) -> Json:
    """The scores by each protocol, and membership inference where its texts are there.

    Returns {"metrics": {"rwku": {"F-FB": mean, …, "N-All": mean}, "sago": {…}, "membership": {"FM": {score: mean, …},
    "RM": {…}, "AUC": {score: value, …}}}, "counts": {set: n}, "protocol": {name: text}, "notes": {metric: why it is of
    little value}, "texts": {set: [{"prompt", "expected", "answer"}, …]} by protocol `sago` (see `choose_texts`),
    "versions"}. Nothing is random. The model keeps its device and dtype and is put into evaluation mode.
    """
    results, answers = score(model, tokenizer, probes, batch_size=batch_size, title=title)
    questions = [probe for probe in probes if probe["set"] in QUESTIONS]
    texts = choose_texts(
        (probe["set"], Answered(prompt=probe["query"], expected=probe["answer"], answer=answer))
        for probe, answer in zip(questions, answers["sago"], strict=True)
    )
    notes = script_note([probe["answer"] for probe in questions])
    return {**summarise(probes, results), "notes": notes, "texts": texts}
