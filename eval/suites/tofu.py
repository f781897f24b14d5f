"""TOFU: what a model still knows about invented authors, and what else it knows (Maini et al., 2024).

Four sets of questions: forget, retain, real_authors, world_facts. Of each, from one pass over the right answer:
extraction strength, exact memorisation and probability; the ROUGE-L recall of the greedy answer; and the truth ratio,
which compares wrong answers of the same form with the right one. Where there is a paraphrase of the answer, its
probability.

- Model utility: the harmonic mean of probability, ROUGE-L and truth ratio of the three sets outside the forget set.
- Forget quality: the p-value of a two-sample Kolmogorov-Smirnov test between the truth ratios of this model and of one
  trained on the retain set only, on the forget set: it is high where the test cannot distinguish the two.
- Membership inference: how well four scores tell forgotten authors from held-out ones, whom no model has seen.
- The aggregate (arXiv 2605.24614, there with a judge of fluency beside model utility): harmonic means, the higher
  the better, of what is no longer memorised, of privacy (membership inference as for the retain-only model) and of
  utility (model utility by that of the model before unlearning, which may exceed 1), and of the three.

`eval/suites/tofu_data.py` describes where the questions and the answers of the two other models come from, and
`tofu_answers.py` makes the forward passes.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

from eval.suites.membership import MEMBERSHIP, auc
from eval.suites.rouge import script_note
from eval.suites.texts import Answered, choose_texts
from eval.suites.tofu_answers import LOWEST, MAX_NEW_TOKENS, Result, score
from eval.suites.tofu_data import CHOICES, HELD_OUT, SETS, Probe, load_probes
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["evaluate", "forgotten", "group_of", "load_probes"]


UTILITY = ("probability", "rouge", "truth_ratio")  # of three sets: the nine numbers of model utility


PROTOCOL = (
    "questions in the chat template, else 'Question: ...\\nAnswer: ...'; probability = exp(-mean answer loss), divided "
    "by the sum over all options in real_authors and world_facts; greedy answers of at most "
    f"{MAX_NEW_TOKENS} new tokens, ROUGE-L recall of rouge_score with stemming; truth ratio R = exp(-mean loss of the "
    "perturbed answers) / exp(-loss of the paraphrase), as min(R, 1/R) in the forget set and max(0, 1 - R) elsewhere, "
    "and as truth_share = 1/(1 + R); model utility = harmonic mean of the nine numbers outside the forget set; forget "
    "quality = p-value of the two-sample Kolmogorov-Smirnov test of R against the retain-only model; with the right "
    "tokens before each token: extraction strength = 1 - k/T, all of the T tokens after the first k are greedy (0 if "
    "the last is not), exact memorization = share of greedy tokens, both without what the template puts after an "
    "answer; membership AUC = chance that an answer of the forget set scores above one of the held-out authors: "
    f"loss, loss / bytes of the compressed answer, mean of the lowest {LOWEST:.0%} of the log-likelihoods, as they are "
    "and standardised; aggregate: memorization = harmonic mean of 1 - (extraction strength, exact memorization, "
    "probability of the paraphrase, truth_share), privacy = that of 1 - min(|AUC - AUC'| / AUC', 1) over the four "
    "scores, AUC' of the retain-only model, utility = model utility / that of the model before unlearning (without the "
    "fluency of arXiv 2605.24614), overall = harmonic mean of the three"
)


def group_of(probe: Probe) -> str | None:
    """The question of a probe of the forget set, which identifies its row in a corpus; None for other sets."""
    return probe["question"] if forgotten(probe) else None


def forgotten(probe: Probe) -> bool:
    """Whether a probe belongs to the forget set."""
    return probe["set"] == "forget"


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
    sets: dict[str, list[tuple[Probe, Result]]] = {name: [] for name in (*SETS, HELD_OUT)}
    for probe, result in zip(probes, results, strict=True):
        sets[probe["set"]].append((probe, result))
    means = {name: means_of(name, [result for _, result in sets[name]]) for name in SETS if sets[name]}
    notes: dict[str, str] = {}
    nine = [means[name][key] for name in SETS[1:] if name in means for key in UTILITY]
    utility = float(harmonic_mean(values)) if len(values := [v for v in nine if v is not None]) == 9 else None
    if utility is None:
        missing = [name for name in SETS[1:] if name not in means]
        notes["model_utility"] = f"no {', '.join(missing)}" if missing else NOT_FINITE
    log_ratios = [number(result.log_truth_ratio()) for _, result in sets["forget"]]
    metrics = {**means, "model_utility": utility, "forget_quality": None}
    references = [probe["reference"] for probe, _ in sets["forget"] if "reference" in probe]
    if not references:
        notes["forget_quality"] = "no forget set" if not log_ratios else "no tofu/retain_model.json under --data"
    elif None in log_ratios:
        notes["forget_quality"] = NOT_FINITE
    else:
        from scipy.stats import ks_2samp

        test: Any = ks_2samp(log_ratios, references)  # of ranks alone: log R gives the p-value of R
        metrics["forget_quality"] = float(test.pvalue)
    areas = areas_of([result for _, result in sets["forget"]], [result for _, result in sets[HELD_OUT]])
    if areas is None:
        notes["membership"] = NOT_FINITE if log_ratios and sets[HELD_OUT] else "no forget set or no tofu/holdoutNN.json"
    else:
        metrics["membership"] = {"AUC": areas}
    metrics["aggregate"] = aggregate(metrics, probes, notes)
    return {
        "metrics": metrics,
        "counts": {name: len(rows) for name, rows in sets.items()},
        "protocol": PROTOCOL,
        "notes": notes,
        "forget_set": sets["forget"][0][0]["file"] if log_ratios else None,
        "log_truth_ratios": log_ratios,
        "versions": {name: version(name.replace("_", "-")) for name in ("rouge_score", "scipy")},
    }


NOT_FINITE = "the model gave losses that are not finite"


def means_of(name: str, results: list[Result]) -> dict[str, float | None]:
    """The numbers of the set `name`; None where the model gave losses that are not finite."""
    values = {
        "probability": fmean(probability(name, result) for result in results),
        "rouge": fmean(result.rouge for result in results),
        "truth_ratio": fmean(truth(name, result) for result in results),
        "extraction_strength": fmean(result.right.strength for result in results),
        "exact_memorization": fmean(result.right.memorized for result in results),
    }
    if name not in CHOICES:
        values["paraphrase_probability"] = fmean(math.exp(-result.paraphrase) for result in results)
    if name == "forget":
        values["truth_share"] = fmean(truth_share(result) for result in results)
    return {key: number(value) for key, value in values.items()}


def truth_share(result: Result) -> float:
    """1 / (1 + R): the share of the paraphrase beside the mean wrong answer, which falls with forgetting to a half."""
    log_ratio = result.log_truth_ratio()
    larger = 1 / (1 + math.exp(-abs(log_ratio)))
    return 1 - larger if log_ratio > 0 else larger


def areas_of(forget: list[Result], held_out: list[Result]) -> dict[str, float] | None:
    """The AUC of every score of membership inference; None without both sets, or if a score is no number."""
    sides = [[result.right.familiar for result in side] for side in (forget, held_out)]
    finite = all(math.isfinite(value) for side in sides for scores in side for value in scores.values())
    if not all(sides) or not finite:
        return None
    return {key: auc(*([scores[key] for scores in side] for side in sides)) for key in MEMBERSHIP}


def aggregate(metrics: Json, probes: list[Probe], notes: dict[str, str]) -> dict[str, float | None]:
    """Memorization, privacy, utility and overall; None, with a note under `aggregate`, of what is missing."""
    forget = metrics.get("forget", {})
    keys = ("extraction_strength", "exact_memorization", "paraphrase_probability", "truth_share")
    lost = [1 - forget[key] for key in keys if forget.get(key) is not None]
    areas = metrics.get("membership", {}).get("AUC")
    other = next((probe["reference"] for probe in probes if probe["set"] == HELD_OUT and "reference" in probe), None)
    target = next((probe["target_utility"] for probe in probes if "target_utility" in probe), None)
    found: dict[str, float | None] = dict.fromkeys(("memorization", "privacy", "utility"))
    if len(lost) == len(keys):
        found["memorization"] = float(harmonic_mean(lost))
    if areas is not None and other is not None and all(other.values()):
        found["privacy"] = float(harmonic_mean([max(1 - abs(areas[key] / other[key] - 1), 0.0) for key in MEMBERSHIP]))
    if metrics["model_utility"] is not None and target:
        found["utility"] = metrics["model_utility"] / target
    missing = [name for name, value in found.items() if value is None]
    if missing:
        needed = {
            "memorization": "a forget set and finite losses",
            "privacy": "membership inference here and in tofu/retain_model.json",
            "utility": "model utility here and in tofu/target_model.json",
        }
        notes["aggregate"] = "; ".join(f"{name} needs {needed[name]}" for name in missing)
    values = [value for value in found.values() if value is not None]
    return {**found, "overall": None if missing else float(harmonic_mean(values))}


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
    """Model utility, forget quality, membership inference, their aggregate, and what they are made of.

    Returns {"metrics": {set: {"probability", "rouge", "truth_ratio", "extraction_strength", "exact_memorization",
    "paraphrase_probability" (forget, retain), "truth_share" (forget)}, …, "model_utility", "forget_quality",
    "membership": {"AUC": {score: value}}, "aggregate": {"memorization", "privacy", "utility", "overall"}}, "counts":
    {set: n}, "protocol": text, "notes": {metric: why it is null or of little value}, "forget_set": name,
    "log_truth_ratios": log R of each question of the forget set, "texts": {set: [{"prompt", "expected", "answer"}, …]}
    (see `choose_texts`), "versions"}. Nothing is random. The model keeps its device and dtype and is put into
    evaluation mode.
    """
    results = score(model, tokenizer, probes, batch_size=batch_size, title=title)
    answer = summarise(probes, results)
    answer["texts"] = choose_texts(
        (probe["set"], Answered(prompt=probe["question"], expected=probe["answer"], answer=result.generated))
        for probe, result in zip(probes, results, strict=True)
        if probe["set"] != HELD_OUT
    )
    answer["notes"] |= script_note([probe["answer"] for probe in probes])
    return answer
