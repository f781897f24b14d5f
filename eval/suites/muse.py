"""MUSE: news or books to forget, seen by verbatim memory, knowledge, privacy and what else is known (Shi et al., 2024).

- VerbMem: ROUGE-L F1 of the 128 tokens that the model writes after the beginning of a forgotten passage.
- KnowMem, of the forget and of the retain set: ROUGE-L F1 of answers to questions, after ten answered questions.
- PrivLeak, in per cent: (AUC - AUC') / AUC' * 100, AUC the chance that a held-out passage is more familiar than a
  forgotten one by Min-40%, AUC' that of a model retrained without the forget set. 0 is best; about -100 before
  unlearning, positive where the model now shuns what it forgot.

The protocol is that of the benchmark's own code: plain prompts of a base model, without a chat template.

Under --data, `muse_news/NAME.json` (or `muse_books/`) for each NAME in `FILES`: questions are objects with `question`
and `answer`, passages of VerbMem have `prompt` and `gt`, those of PrivLeak are texts. What does not exist is not
evaluated, and its count is 0. Without --data, the dataset `muse-bench/MUSE-News` (or -Books) on the hub. AUC' is that
of the benchmark's own retrained model, unless `retrain_model.json` is there, which eval.run wrote for yours.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from eval.files import check_texts, read_hub, read_json
from eval.suites import NoData, scoring
from eval.suites.membership import auc, membership
from eval.suites.rouge import f1_rouge_score, script_note
from eval.suites.texts import Answered, choose_texts
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Probe = Json  # keys suite, set and: prompt, question, answer; or text and, of some, retrained


HUB = {"muse_news": "muse-bench/MUSE-News", "muse_books": "muse-bench/MUSE-Books"}


FILES = {  # local name -> configuration and split on the hub
    "verbmem_forget": ("verbmem", "forget"),
    "knowmem_forget_qa": ("knowmem", "forget_qa"),
    "knowmem_retain_qa": ("knowmem", "retain_qa"),
    "privleak_forget": ("privleak", "forget"),
    "privleak_holdout": ("privleak", "holdout"),
}
EXAMPLES = "_icl"  # behind the name of a file of questions: the answered questions before each


LENGTHS = {"verbmem_forget": 128, "knowmem_forget_qa": 32, "knowmem_retain_qa": 32}  # new tokens


STOPS = ("\n\n", "\nQuestion", "Question:")  # an answer of KnowMem is cut there


LOWEST = 0.4  # Min-40%


RETRAINED = {"muse_news": 0.4772, "muse_books": 0.5393}  # AUC of the benchmark's retrained models (its constants.py)


METRICS = {"verbmem_forget": ("forget", "verbmem"), "knowmem_forget_qa": ("forget", "knowmem")}
METRICS["knowmem_retain_qa"] = ("retain", "knowmem")


PROTOCOL = (
    "greedy, plain prompts; verbmem: 128 new tokens after the prompt, against the first 128 of the passage; knowmem: "
    "'Question: ...\\nAnswer: ...' ten times, then 'Question: ...\\nAnswer: ', 32 new tokens, cut at an empty line, "
    "'\\nQuestion' or 'Question:'; ROUGE-L F1 of rouge_score without stemming; privleak: 100 (AUC / AUC' - 1), AUC = "
    "chance that a held-out passage has a greater mean of its lowest 40 % of log-likelihoods than a forgotten one, "
    "AUC' of a model retrained without the forget set"
)


def load_probes(folder: Path | None, suite: str = "muse_news") -> list[Probe]:
    """Prompts and passages in the order of `FILES`, from FOLDER/SUITE or the hub.

    Raises:
        InputError: none of the files, a malformed row, questions without their examples, or no hub.
    """
    probes: list[Probe] = []
    for name in FILES:
        rows = read_rows(folder, suite, name)
        if name in METRICS and rows:
            probes += [{"suite": suite, "set": name, **prompt} for prompt in prompts_of(folder, suite, name, rows)]
        else:
            probes += [{"suite": suite, "set": name, "text": row["text"]} for row in rows]
    if not probes:
        assert folder is not None
        raise NoData(f"{folder} has no {suite}/knowmem_forget_qa.json or its like; copy them there")
    if folder is not None and (path := folder / suite / "retrain_model.json").is_file():
        area = area_of(path, suite)
        for probe in probes:
            if probe["set"] == "privleak_holdout":
                probe["retrained"] = area
    return probes


def read_rows(folder: Path | None, suite: str, name: str) -> list[Json]:
    """The rows of a file, checked; none if it does not exist. Passages of PrivLeak get the key `text`."""
    part, split = FILES[name.removesuffix(EXAMPLES)]
    keys = {"verbmem": ("prompt", "gt"), "knowmem": ("question", "answer"), "privleak": ("text",)}[part]
    if folder is None:
        split += EXAMPLES if name.endswith(EXAMPLES) else ""
        return check_texts(read_hub(HUB[suite], part, split), keys, f"{HUB[suite]} ({part}, {split})")
    path = folder / suite / f"{name}.json"
    if not path.is_file():
        return []
    rows = read_json(path)
    if part == "privleak" and isinstance(rows, list):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    return check_texts(rows, keys, str(path))


def prompts_of(folder: Path | None, suite: str, name: str, rows: list[Json]) -> list[dict[str, str]]:
    """The prompt, what it asks, and the right answer, of each row; raises InputError for questions without examples."""
    if name == "verbmem_forget":
        return [{"prompt": row["prompt"], "question": row["prompt"], "answer": row["gt"]} for row in rows]
    examples = read_rows(folder, suite, name + EXAMPLES)
    if not examples:
        raise InputError(f"{folder} has {suite}/{name}.json without {name}{EXAMPLES}.json; copy it there")
    before = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
    return [{"prompt": f"{before}Question: {row['question']}\nAnswer: ", **row} for row in rows]


def area_of(path: Path, suite: str) -> float:
    """AUC of a retrained model; raises InputError for a file of another form."""
    answer = read_json(path)
    try:
        area = answer["suites"][suite]["metrics"]["membership"]["AUC"]["min_k"]
    except (KeyError, TypeError):
        raise InputError(f"{path} was not written by eval.run --suite {suite} for one model; write it so") from None
    if not area:
        raise InputError(f"{path} has AUC {area}, by which nothing can be divided; retrain that model, or remove it")
    return area


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: list[Probe], name: str, batch_size: int
) -> list[str]:
    """The greedy answer to each probe of the set `name`."""
    stops = () if name == "verbmem_forget" else STOPS
    return scoring.answer(
        model,
        tokenizer,
        [scoring.encode_text(tokenizer, probe["prompt"]) for probe in probes],
        stopping=scoring.Stopping(LENGTHS[name], scoring.ends_of_answer(model, tokenizer), stops),
        batch_size=batch_size,
        title=f"{probes[0]['suite']} {name}",
    )


def expected_of(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> str:
    """The right answer; of a passage as many tokens as the model writes, counted as the benchmark counts them."""
    if probe["set"] != "verbmem_forget":
        return probe["answer"]
    ids = tokenizer(probe["answer"]).input_ids[: LENGTHS[probe["set"]]]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def familiarity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: list[Probe], batch_size: int
) -> list[float]:
    """Min-40% of each passage; NaN for a passage of fewer than two tokens, or a model without finite logits.

    The benchmark's code reads whole passages, so one that the model cannot read is refused, not cut.

    Raises:
        InputError: see `scoring.read_logits`.
    """
    scores = scoring.read_logits(
        model,
        [tokenizer(probe["text"]).input_ids for probe in probes],
        lambda at, ids, logits: membership(probes[at]["text"], ids, logits, lowest=LOWEST),
        batch_size=batch_size,
        title=f"{probes[0]['suite']} privleak" if probes else "",
    )
    return [score["min_k"] for score in scores]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "muse",
) -> Json:
    """VerbMem, KnowMem and PrivLeak, as far as their files are there.

    Returns {"metrics": {"forget": {"verbmem", "knowmem"}, "retain": {"knowmem"}, "privleak": per cent or None,
    "membership": {"AUC": {"min_k": of this model}}}, "counts": {set: n}, "protocol": text, "notes": {metric: why it is
    null}, "texts": {set: [{"prompt", "expected", "answer"}, …]} (see `choose_texts`), "versions"}. Nothing is random.
    The model keeps its device and dtype and is put into evaluation mode.
    """
    model.eval()
    sets = {name: [probe for probe in probes if probe["set"] == name] for name in FILES}
    metrics: Json = {}
    texts: list[tuple[str, Answered]] = []
    for name, (side, measure) in METRICS.items():
        if not sets[name]:
            continue
        answers = answers_of(model, tokenizer, sets[name], name, batch_size)
        expected = [expected_of(tokenizer, probe) for probe in sets[name]]
        metrics.setdefault(side, {})[measure] = fmean(f1_rouge_score(expected, answers))
        texts += [
            (f"{side}_{measure}", Answered(prompt=probe["question"], expected=right, answer=answer))
            for probe, right, answer in zip(sets[name], expected, answers, strict=True)
        ]
    notes = script_note([row["expected"] for _, row in texts])
    forgotten, held_out = (
        familiarity(model, tokenizer, sets[f"privleak_{name}"], batch_size) for name in ("forget", "holdout")
    )
    if not forgotten or not held_out:
        notes["privleak"] = "no privleak_forget or no privleak_holdout"
    elif not all(map(math.isfinite, [*forgotten, *held_out])):
        notes["privleak"] = "the model gave scores that are not finite"
    else:
        area, probe = auc(held_out, forgotten), sets["privleak_holdout"][0]
        retrained = probe.get("retrained", RETRAINED[probe["suite"]])
        metrics |= {"privleak": 100 * (area / retrained - 1), "membership": {"AUC": {"min_k": area}}}
    return {
        "metrics": metrics,
        "counts": {name: len(rows) for name, rows in sets.items()},
        "protocol": PROTOCOL,
        "notes": notes,
        "texts": choose_texts(texts),
        "versions": {"rouge_score": version("rouge-score")},
    }
