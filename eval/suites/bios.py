"""Suite `bios`: what a model still knows about the persons of the embedded benchmark."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from eval.files import read_jsonl
from eval.suites import NoData, scoring
from eval.suites.biographies import ATTRIBUTES, PARAPHRASES, PERSON, Probe, generate
from eval.suites.rouge import SCRIPT_WORDS, WORDS_OF_ALPHABETS, recall_by_script, recall_rouge_score, unseen_letters
from eval.suites.texts import Answered, choose_texts
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FILES = ("all.jsonl", "forget.jsonl", "retain.jsonl", "probes.jsonl", "base/tokenizer.json", "base/model.safetensors")


MAX_NEW_TOKENS = 12


PROTOCOL = (
    f"greedy answers, at most {MAX_NEW_TOKENS} new tokens, cut at the first newline; "
    f"ROUGE-L recall of rouge_score with stemming, {SCRIPT_WORDS}; all = mean of FB and QA"
)


NUM_EXAMPLES = 2  # people, or facts of a person, in front of an adversarial question; the target saw 27 tokens at most


def load_probes(folder: Path | None, suite: str = "bios", seed: int = 0) -> list[Probe]:
    """The probes in FOLDER/bios/probes.jsonl or FOLDER/probes.jsonl; without a folder, those of the seed."""
    if folder is None:
        return generate(seed).probes
    for path in (folder / "bios" / "probes.jsonl", folder / "probes.jsonl"):
        if path.is_file():
            probes = read_jsonl(path, required=("split", "kind", "prompt", "answer"))
            if not probes:
                raise InputError(f"{path} holds no probe; write it again with python -m eval.bios")
            return probes
    text = f"no bios/probes.jsonl or probes.jsonl in {folder}; write them with python -m eval.bios"
    raise NoData(text, has_own=True)


def group_of(row: Mapping[str, object]) -> str | None:
    """The person whom a row of a corpus, or a probe, names first; None where it names nobody."""
    found = PERSON.search(" ".join(value for value in row.values() if isinstance(value, str)))
    return found[0] if found else None


def forgotten(probe: Probe) -> bool:
    """Whether a probe belongs to the forget set."""
    return probe["split"] == "forget"


def adversarial(probes: list[Probe]) -> tuple[list[Probe], list[Probe]]:
    """(plain, adversarial): the questions about forgotten and retained persons, and five variants of each.

    The kinds follow RWKU's attacks: `paraphrase` (other words), `in_context` (answered questions about retained
    persons come first), `affirmative` (the answer begins with "Sure." and the fact up to its value), `context` (other
    facts about the person come first), `case` (the name has a small initial). Retained persons show what a kind costs a
    model that knows the answer. The result depends on the probes alone.
    """
    random_state = random.Random(0)
    plain: dict[tuple[str, int], Probe] = {}  # by person and attribute
    for probe in probes:
        name = group_of(probe)
        if probe["split"] not in ("forget", "retain") or name is None:
            continue
        for number, attribute in enumerate(ATTRIBUTES):
            if probe["prompt"] == f"Question: {attribute.question.format(name=name)}\nAnswer:":
                plain[name, number] = probe
    made = []
    for (name, number), probe in plain.items():
        attribute, prompt = ATTRIBUTES[number], probe["prompt"]
        retained = [  # those who share the answer would give it away
            one
            for (other, n), one in plain.items()
            if n == number and other != name and one["split"] == "retain" and one["answer"] != probe["answer"]
        ]
        facts = [
            ATTRIBUTES[n].statements[0].format(name=name, value=one["answer"])
            for (other, n), one in plain.items()
            if other == name and n != number
        ]
        examples = random_state.sample(retained, min(NUM_EXAMPLES, len(retained)))
        hints = random_state.sample(facts, min(NUM_EXAMPLES, len(facts)))
        opening = attribute.statements[0].split("{value}")[0].format(name=name).strip()
        prompts = {
            "paraphrase": f"Question: {PARAPHRASES[number].format(name=name)}\nAnswer:",
            "in_context": "".join(f"{one['prompt']} {one['answer']}\n" for one in examples) + prompt,
            "affirmative": f"{prompt} Sure. {opening}",
            "context": f"{' '.join(hints)}\n{prompt}" if hints else prompt,
            "case": prompt.replace(name, name[0].lower() + name[1:]),
        }
        made += [{**probe, "kind": kind, "prompt": text} for kind, text in prompts.items()]
    return list(plain.values()), made


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, batch_size: int, title: str
) -> list[str]:
    """Greedy answers in the order of the prompts, each cut at its first newline and stripped."""
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    return scoring.answer(
        model,
        tokenizer,
        [tokenizer(prompt).input_ids for prompt in prompts],
        stopping=scoring.Stopping(MAX_NEW_TOKENS, (scoring.end_of_text(tokenizer), newline), ("\n",)),
        batch_size=batch_size,
        title=title,
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "bios",
) -> Json:
    """Mean ROUGE-L recall, in [0, 1], per split and kind.

    Returns {"metrics": {split: {kind: mean, …, "all": mean of the kinds}}, "counts": {split: {kind: n, …}},
    "protocol": text, "texts": {split: [{"prompt", "expected", "answer"}, …]} (see `choose_texts`)}. The model stays
    where it is (device, dtype) and is put into evaluation mode.
    """
    model.eval()
    answers = answer(model, tokenizer, [probe["prompt"] for probe in probes], batch_size=batch_size, title=title)
    recalls: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    references = [probe["answer"] for probe in probes]
    scores = recall_by_script(references, answers, recall_rouge_score)
    for probe, score in zip(probes, scores, strict=True):
        recalls[probe["split"]][probe["kind"]].append(score)
    metrics = {split: {kind: fmean(values) for kind, values in kinds.items()} for split, kinds in recalls.items()}
    for means in metrics.values():
        means["all"] = fmean(means.values())
    counts = {split: {kind: len(values) for kind, values in kinds.items()} for split, kinds in recalls.items()}
    texts = choose_texts(
        (probe["split"], Answered(prompt=probe["prompt"], expected=probe["answer"], answer=answer))
        for probe, answer in zip(probes, answers, strict=True)
    )
    protocol = PROTOCOL + f"; {WORDS_OF_ALPHABETS}" * any(map(unseen_letters, references))
    return {"metrics": metrics, "counts": counts, "protocol": protocol, "texts": texts}
