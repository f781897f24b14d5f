"""TOFU: what a model still knows about invented authors, and what else it knows (Maini et al., 2024).

Four sets of questions: forget, retain, real_authors, world_facts. Of each: the probability of the answer, the ROUGE-L
recall of the greedy answer, and the truth ratio, which compares wrong answers of the same form with the right one.
Model utility is the harmonic mean of the nine numbers outside the forget set. Forget quality is the p-value of a
two-sample Kolmogorov-Smirnov test between the truth ratios of this model and of one trained on the retain set only, on
the forget set: it is high where the test cannot distinguish the two.

Under --data, JSON lines `tofu/forgetNN_perturbed.json` (one of them), `retain_perturbed.json`,
`real_authors_perturbed.json`, `world_facts_perturbed.json`; and `tofu/retain_model.json`, which eval.run wrote for the
retain-only model. Without --data, the dataset `locuslab/TOFU` on the hub, with --forget-set.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.files import check_texts, read_hub, read_json, read_jsonl
from eval.suites import scoring
from eval.suites.rouge import recall_rouge_score, script_note
from eval.suites.texts import Answered, choose_texts
from pipeline.data.chat import encode_answers
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Probe = Json  # keys set, file, question, answer, paraphrase, perturbed and, of the forget set, reference


HUB = "locuslab/TOFU"


SETS = ("forget", "retain", "real_authors", "world_facts")


CHOICES = ("real_authors", "world_facts")  # their wrong answers are other options, their right one has no paraphrase


MAX_NEW_TOKENS = 200


PROTOCOL = (
    "questions in the chat template, else 'Question: ...\\nAnswer: ...'; probability = exp(-mean answer loss), divided "
    "by the sum over all options in real_authors and world_facts; greedy answers of at most "
    f"{MAX_NEW_TOKENS} new tokens, ROUGE-L recall of rouge_score with stemming; truth ratio R = exp(-mean loss of the "
    "perturbed answers) / exp(-loss of the paraphrase), as min(R, 1/R) in the forget set and max(0, 1 - R) elsewhere; "
    "model utility = harmonic mean of the nine numbers outside the forget set; forget quality = p-value of the "
    "two-sample Kolmogorov-Smirnov test of R against the retain-only model"
)


class Result(NamedTuple):
    """Of one question: mean losses, in nats per token, the recall of the greedy answer, and this answer."""

    answer: float
    paraphrase: float
    perturbed: list[float]
    rouge: float
    said: str = ""

    def log_truth_ratio(self) -> float:
        """log R, which is finite wherever the losses are and orders answers as R does."""
        return self.paraphrase - fmean(self.perturbed)


def load_probes(folder: Path | None, suite: str = "tofu", forget_set: str = "forget10") -> list[Probe]:
    """The questions of the sets that exist, in the order of `SETS`, from FOLDER/tofu or the hub's `forget_set`.

    Raises:
        InputError: no set, two forget sets, a malformed row, answers of another retain-only model, or no hub.
    """
    probes: list[Probe] = []
    for name in SETS:
        texts = ("question", "answer") if name in CHOICES else ("question", "answer", "paraphrased_answer")
        if folder is None:
            stem = f"{forget_set if name == 'forget' else name}_perturbed"
            where, rows = f"{HUB} ({stem})", read_hub(HUB, stem)
        else:
            pattern = "forget[0-9][0-9]" if name == "forget" else name
            found = sorted((folder / "tofu").glob(f"{pattern}_perturbed.json"))
            if not found:
                continue
            if len(found) > 1:
                raise InputError(f"{folder / 'tofu'} has {found[0].name} and {found[1].name}; leave one forget set")
            stem, where, rows = found[0].stem, str(found[0]), read_jsonl(found[0])
        for number, row in enumerate(check_texts(rows, texts, where), start=1):
            wrong = row.get("perturbed_answer")
            if not isinstance(wrong, list) or not wrong or not all(isinstance(text, str) and text for text in wrong):
                raise InputError(f"{where}, row {number}: needs a list of texts under perturbed_answer; get it again")
            probes.append(
                {
                    "set": name,
                    "file": stem,
                    "question": row["question"],
                    "answer": row["answer"],
                    "paraphrase": row.get("paraphrased_answer", row["answer"]),
                    "perturbed": wrong,
                }
            )
    if not probes:
        raise InputError(f"{folder} has no tofu/forgetNN_perturbed.json or its like; copy them there")
    forget = [probe for probe in probes if probe["set"] == "forget"]
    if folder is not None and forget and (path := folder / "tofu" / "retain_model.json").is_file():
        for probe, reference in zip(forget, read_reference(path, forget), strict=True):
            probe["reference"] = reference
    return probes


def group_of(probe: Probe) -> str | None:
    """The question of a probe of the forget set, which identifies its row in a corpus; None for other sets."""
    return probe["question"] if forgotten(probe) else None


def forgotten(probe: Probe) -> bool:
    """Whether a probe belongs to the forget set."""
    return probe["set"] == "forget"


def read_reference(path: Path, forget: list[Probe]) -> list[float]:
    """log R of the retain-only model for each question of the forget set, from the file that eval.run wrote."""
    answer = read_json(path)
    try:
        file, values = (answer["suites"]["tofu"][key] for key in ("forget_set", "log_truth_ratios"))
    except (KeyError, TypeError):
        raise InputError(f"{path} was not written by eval.run --suite tofu for one model; write it so") from None
    if file != forget[0]["file"] or len(values) != len(forget) or None in values:
        raise InputError(
            f"{path} needs {len(forget)} truth ratios, all numbers, on {forget[0]['file']}, and has {len(values)} on "
            f"{file}; evaluate the retain-only model on the same files"
        )
    return values


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "tofu",
) -> list[Result]:
    """The result of each probe, in order."""
    model.eval()
    if tokenizer.chat_template is None and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token and no chat template, so no answer can end; set one")
    texts = [(probe["answer"], probe["paraphrase"], *probe["perturbed"]) for probe in probes]
    rows = zip(probes, texts, strict=True)
    pairs = list(dict.fromkeys((probe["question"], text) for probe, row in rows for text in row))
    encoded = encode_answers(tokenizer, *zip(*pairs, strict=True))
    losses = scoring.answer_losses(model, encoded, batch_size=batch_size, title=f"{title} likelihoods")
    loss, spans = dict(zip(pairs, losses, strict=True)), dict(zip(pairs, encoded, strict=True))
    starts = [spans[probe["question"], probe["answer"]] for probe in probes]
    answers = scoring.answer(
        model,
        tokenizer,
        [ids[:start] for ids, start in starts],  # up to where training begins to predict
        stopping=scoring.Stopping(MAX_NEW_TOKENS, scoring.ends_of_answer(model, tokenizer)),
        batch_size=batch_size,
        title=f"{title} answers",
    )
    recalls = recall_rouge_score([probe["answer"] for probe in probes], answers)
    results = []
    for probe, row, recall, said in zip(probes, texts, recalls, answers, strict=True):
        right, paraphrase, *perturbed = (loss[probe["question"], text] for text in row)
        results.append(Result(right, paraphrase, perturbed, recall, said))
    return results


def probability(name: str, result: Result) -> float:
    """Of the answer, in [0, 1]: the geometric mean of its tokens' probabilities, or its share of all options."""
    if name not in CHOICES:
        return math.exp(-result.answer)
    losses = [result.answer, *result.perturbed]
    least = min(losses)
    shares = [math.exp(least - loss) for loss in losses]  # the least loss gives 1: no sum of zeros
    return shares[0] / sum(shares)


def truth(name: str, result: Result) -> float:
    """The truth ratio as it is averaged, in [0, 1]; 1 is the best value in every set."""
    log_ratio = result.log_truth_ratio()
    return math.exp(-abs(log_ratio)) if name == "forget" else 1.0 - math.exp(min(log_ratio, 0.0))


def summarise(probes: list[Probe], results: list[Result]) -> Json:
    """What `evaluate` returns, from all probes and their results."""
    sets: dict[str, list[tuple[Probe, Result]]] = {name: [] for name in SETS}
    for probe, result in zip(probes, results, strict=True):
        sets[probe["set"]].append((probe, result))
    means = {
        name: {
            "probability": number(fmean(probability(name, result) for _, result in rows)),
            "rouge": fmean(result.rouge for _, result in rows),
            "truth_ratio": number(fmean(truth(name, result) for _, result in rows)),
        }
        for name, rows in sets.items()
        if rows
    }
    notes: dict[str, str] = {}
    nine = [value for name, row in means.items() if name != "forget" for value in row.values()]
    utility = float(harmonic_mean(values)) if len(values := [v for v in nine if v is not None]) == 9 else None
    if utility is None:
        missing = [name for name in SETS[1:] if name not in means]
        notes["model_utility"] = f"no {', '.join(missing)}" if missing else "the model gave losses that are not finite"
    log_ratios = [number(result.log_truth_ratio()) for _, result in sets["forget"]]
    references = [probe["reference"] for probe, _ in sets["forget"] if "reference" in probe]
    quality = None
    if not references:
        notes["forget_quality"] = "no forget set" if not log_ratios else "no tofu/retain_model.json under --data"
    elif None in log_ratios:
        notes["forget_quality"] = "the model gave losses that are not finite"
    else:
        from scipy.stats import ks_2samp

        test: Any = ks_2samp(log_ratios, references)  # of ranks alone: log R gives the p-value of R
        quality = float(test.pvalue)
    return {
        "metrics": {**means, "model_utility": utility, "forget_quality": quality},
        "counts": {name: len(rows) for name, rows in sets.items()},
        "protocol": PROTOCOL,
        "notes": notes,
        "forget_set": sets["forget"][0][0]["file"] if log_ratios else None,
        "log_truth_ratios": log_ratios,
        "versions": {name: version(name.replace("_", "-")) for name in ("rouge_score", "scipy")},
    }


def number(value: float) -> float | None:
    """The value, or None if it is not finite: JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "tofu",
) -> Json:
    """Model utility, forget quality and what they are made of.

    Returns {"metrics": {set: {"probability", "rouge", "truth_ratio"}, …, "model_utility", "forget_quality"}, "counts":
    {set: n}, "protocol": text, "notes": {metric: why it is null or of little value}, "forget_set": name,
    "log_truth_ratios": log R of each question of the forget set, "texts": {set: [{"prompt", "expected", "answer"}, …]}
    (see `choose_texts`), "versions"}. Nothing is random. The model keeps its device and dtype and is put into
    evaluation mode.
    """
    results = score(model, tokenizer, probes, batch_size=batch_size, title=title)
    answer = summarise(probes, results)
    answer["texts"] = choose_texts(
        (probe["set"], Answered(prompt=probe["question"], expected=probe["answer"], answer=result.said))
        for probe, result in zip(probes, results, strict=True)
    )
    answer["notes"] |= script_note([probe["answer"] for probe in probes])
    return answer
