"""Make attacks from a plan and run them: train or round the model, and evaluate it before and after."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from eval.attacks.answers import divergence, few_shot, leak
from eval.attacks.matching import Matcher
from eval.attacks.quantize import ROUNDINGS, round_linear_layers
from eval.attacks.relearn import Row, Split, columns_of, mean_nll, read_corpus, split_corpus, without_copies
from eval.attacks.spec import FRACTION, Attack, EvalSpec, Metrics, Plan
from eval.attacks.training import local_corpus, read_curve, train
from eval.loading import load
from eval.results.method import refuse_changed
from eval.results.metrics import flatten
from eval.suites import AdversarialSuite, GroupedSuite, Probes, SplitSuite, WholeSuite
from eval.suites.corpus import read_split, sample
from eval.suites.rouge import words
from pipeline.config.sources import Corpus
from pipeline.errors import InputError
from pipeline.files import Json


class Evaluator:
    """Evaluates models; an untouched model gets each evaluation only once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.untouched = cache(self.evaluate)

    def evaluate(self, folder: Path, spec: EvalSpec, rounding: str | None = None) -> tuple[Metrics, float]:
        """(metrics of the model in `folder` with linear layers rounded, share of the rounded weights)."""
        plan, title = self.plan, f"{self.plan.suite} {folder.name}"
        model, tokenizer = load(folder, trust=plan.trust)
        if spec.measure is not None:
            return spec.measure(model.eval(), tokenizer), 0.0
        share = round_linear_layers(model, rounding) if rounding else 0.0
        if rounding and not share:
            raise InputError(f"{rounding}: {folder} has no linear layer to round; leave it out of --attacks")
        result = plan.module.evaluate(model, tokenizer, spec.probes, batch_size=plan.batch_size, title=title)
        metrics = flatten(result["metrics"])
        if spec.documents:
            data, size = plan.config["data"], plan.batch_size
            found = mean_nll(model, tokenizer, spec.documents, data, batch_size=size, title=f"{title} documents")
            metrics |= {spec.nll: found} if math.isfinite(found) else {}
        return metrics, share


def unavailable_reason(plan: Plan, name: str) -> str | None:
    """Why the run or the suite does not allow an attack; None if they do."""
    needed = {"retain": "retain", **dict.fromkeys(("relearn", "relearn_curve", "few_shot", "leak"), "forget")}.get(name)
    if needed and plan.config["data"][needed] is None:
        return f"{plan.run} has no {needed} corpus"
    if name == "few_shot" and plan.config["data"]["forget"]["prompt"] is None:
        return "the forget corpus has no questions (data.forget.prompt)"
    if name in ("kl", "unrelated") and plan.texts is None:
        return f"{name} needs texts that neither corpus holds; name a file of them by --texts, of WikiText for instance"
    if name == "kl" and plan.original is None:
        return f"the model before unlearning, {plan.config['model']['path']}, is no folder on this machine"
    if name == "relearn" and not isinstance(plan.module, GroupedSuite | WholeSuite):
        return f"suite {plan.suite} does not say which row of a corpus a probe is about (group_of)"
    if name == "probes" and not (isinstance(plan.module, AdversarialSuite) and plan.module.adversarial(plan.probes)[1]):
        return f"suite {plan.suite} has no adversarial probes"
    return None


def attacks_of(plan: Plan, names: Iterable[str]) -> list[Attack]:
    """The attacks by name, in order; raises InputError for a corpus that cannot be read or split, or is another now."""
    names, forget = list(names), plan.config["data"]["forget"]
    for task in ("forget", "retain") if "retain" in names else ("forget",):
        if plan.config["data"][task] is not None:
            refuse_changed(plan.run, f"data.{task}", Corpus.model_validate(plan.config["data"][task]))
    rows = read_corpus(forget) if forget is not None else []
    everything = EvalSpec(plan.probes, tuple(sample(rows, plan.seed)))
    training = {"steps": plan.steps, "lr": plan.lr, "seed": plan.seed, "overrides": list(plan.overrides)}
    attacks = []
    for name in names:
        if name == "relearn" and isinstance(plan.module, SplitSuite):
            attacks.append(relearn_split(plan, plan.module, rows, training))
        elif name == "relearn":
            attacks.append(relearn(plan, rows, training))
        elif name == "retain":
            attacks.append(Attack(name, training, everything, corpus=plan.config["data"]["retain"]))
        elif name == "probes":
            assert isinstance(plan.module, AdversarialSuite)  # see `unavailable_reason`
            plain, adversarial = plan.module.adversarial(plan.probes)
            selection = {"probes": len(adversarial)}
            attacks.append(Attack(name, {}, EvalSpec(adversarial), plain=EvalSpec(plain), selection=selection))
        elif name == "relearn_curve":
            attacks.append(relearn_curve(plan, split_in_half(plan, rows), training))
        elif name == "unrelated":
            attacks.append(unrelated(plan, everything, training))
        elif name == "few_shot":
            attacks.append(few_shot(plan, split_in_half(plan, rows)))
        elif name == "leak":
            attacks.append(leak(plan, rows))
        elif name == "kl":
            attacks.append(divergence(plan))
        else:
            attacks.append(Attack(name, ROUNDINGS[name], everything, rounding=name))
    return attacks


def relearn(plan: Plan, rows: list[Row], training: Json) -> Attack:
    """Split the corpus into a part to relearn and a part for the test, without the probes of the relearned part."""
    forget, module = plan.config["data"]["forget"], plan.module
    matcher = matcher_of(plan)
    found = {id(row): matcher.find(row) for row in rows}
    split = without_copies(split_rows(plan, rows, found, FRACTION), columns_of(forget))
    relearned = {key for row in split.relearned for key in found[id(row)]}
    if isinstance(module, GroupedSuite):
        mentioned = {key for names in found.values() for key in names}
        probes = probes_of_held_out(plan, module, matcher, mentioned, relearned)
        excluded = len(plan.probes) - len(probes)
    else:
        refuse_relearned_questions(plan, relearned)
        probes, excluded = plan.probes, 0
    selection = {
        "groups": split.groups,
        "documents": len(split.relearned),
        "held_out_documents": len(split.held_out),
        "excluded_probes": excluded,
    }
    corpus = local_corpus(plan, "relearn")
    texts = tuple({key: row[key] for key in columns_of(forget)} for row in split.relearned)
    evaluation = EvalSpec(probes, tuple(sample(split.held_out, plan.seed)), "held_out_nll")
    settings = {**training, "fraction": FRACTION, "group": plan.group}
    return Attack("relearn", settings, evaluation, corpus=corpus, rows=texts, selection=selection)


def relearn_split(plan: Plan, module: SplitSuite, rows: list[Row], training: Json) -> Attack:
    """Learn what the suite brings for it, and ask all of its questions; `rows`: of the forget corpus, for its NLL."""
    texts = module.texts_to_relearn(plan.probes)
    corpus = {"path": str(plan.folder / "relearn.jsonl"), "field": "text"}
    settings, evaluation = {**training, "from": "the suite"}, EvalSpec(plan.probes, tuple(sample(rows, plan.seed)))
    learned = tuple({"text": text} for text in texts)
    return Attack("relearn", settings, evaluation, corpus=corpus, rows=learned, selection={"documents": len(texts)})


def matcher_of(plan: Plan) -> Matcher:
    """What finds the keys of the suite's probes in rows; one without keys for a suite that has none."""
    module = plan.module
    if isinstance(module, GroupedSuite):
        return Matcher(key for key in map(module.group_of, plan.probes) if key is not None)
    return Matcher(module.question_texts(plan.probes) if isinstance(module, WholeSuite) else ())


def split_in_half(plan: Plan, rows: list[Row]) -> Split:
    """The forget corpus in two halves of whole groups, without copies; the suite's questions decide nothing else."""
    matcher = matcher_of(plan)
    found = {id(row): matcher.find(row) for row in rows}
    return without_copies(split_rows(plan, rows, found, 0.5), columns_of(plan.config["data"]["forget"]))


def relearn_curve(plan: Plan, split: Split, training: Json) -> Attack:
    """Learn one half at a constant rate, and measure the other half on the way (RepSelect, arXiv 2606.17168).

    The training measures itself (`train.probe_every`): no model is written on the way, and no suite is needed.
    """
    columns = columns_of(plan.config["data"]["forget"])
    half, other = (
        tuple({key: row[key] for key in columns} for row in part) for part in (split.relearned, split.held_out)
    )
    selection = {"groups": split.groups, "documents": len(half), "held_out_documents": len(other)}
    probed = {"retain": tuple(sample(half, plan.seed)), "held_out": tuple(sample(other, plan.seed))}
    settings, corpus = {**training, "group": plan.group}, local_corpus(plan, "relearn_curve")
    return Attack("relearn_curve", settings, EvalSpec(), corpus=corpus, rows=half, probed=probed, selection=selection)


def unrelated(plan: Plan, everything: EvalSpec, training: Json) -> Attack:
    """Fine-tune on --texts, as `retain` does on the retain corpus, and measure the forget corpus on the way.

    The file has documents, or the columns `prompt` and `response`.
    """
    assert plan.texts is not None  # see `unavailable_reason`
    texts = read_split(plan.texts)
    columns = {"prompt": "prompt", "response": "response"} if "prompt" in texts[0] else {"field": "text"}
    corpus = Corpus.model_validate({"path": str(plan.texts), **columns}).model_dump()
    probed = {}
    if everything.documents:
        own = columns_of(plan.config["data"]["forget"])
        probed = {"forget": tuple({key: row[key] for key in own} for row in everything.documents)}
    settings, selection = {**training, "texts": str(plan.texts)}, {"documents": len(texts)}
    return Attack("unrelated", settings, everything, corpus=corpus, probed=probed, selection=selection)


def split_rows(plan: Plan, rows: list[Row], found: dict[int, list[str]], fraction: float) -> Split:
    """The split by the column of --group, else by the first key that a row is about (`found`, by the row's id)."""
    group = plan.group
    if group is None:
        return split_corpus(rows, lambda row: next(iter(found[id(row)]), None), fraction, plan.seed)
    if lacking := [number for number, row in enumerate(rows, start=1) if row.get(group) is None]:
        columns = ", ".join(rows[lacking[0] - 1])
        raise InputError(f"--group {group}: row {lacking[0]} of the forget corpus has only {columns}; name one")
    return split_corpus(rows, lambda row: str(row[group]), fraction, plan.seed)


def probes_of_held_out(
    plan: Plan, module: GroupedSuite, matcher: Matcher, mentioned: set[str], relearned: set[str]
) -> list[Probes]:
    """The probes that are not about a relearned key. One whose key has no words (`* * *`) is left out.

    Args:
        mentioned: the keys that some row of the forget corpus is about.

    Raises:
        InputError: a probe of the forget set is about no row of the corpus, or none of the forget set would remain.
    """
    measured = [probe for probe in plan.probes if (key := module.group_of(probe)) is None or words(key)]
    forgotten = [probe for probe in measured if module.forgotten(probe)]
    unknown = [probe for probe in forgotten if matcher.name(module.group_of(probe)) not in mentioned]
    if unknown:
        first = module.group_of(unknown[0]) or str(unknown[0])
        raise InputError(
            f"relearn: {len(unknown)} of {len(forgotten)} probes of the forget set are about no row of the forget "
            f"corpus (the first: {shorten(first)!r}), so nobody can say whether they are learned again; give --data "
            "or data.probes whose forget set is of this corpus, or leave relearn out of --attacks"
        )
    probes = [probe for probe in measured if matcher.name(module.group_of(probe)) not in relearned]
    if not any(map(module.forgotten, probes)):
        raise InputError(
            "relearn: the relearned rows are about every probe of the forget set, so that no probe would remain; name "
            "a column of the corpus that splits it by --group, or leave relearn out of --attacks"
        )
    return probes


def refuse_relearned_questions(plan: Plan, relearned: set[str]) -> None:
    """Raises InputError if the relearned rows hold a question of a suite that evaluates all its questions or none."""
    if relearned:
        raise InputError(
            f"relearn: the relearned rows contain {len(relearned)} questions of suite {plan.suite} (one of them: "
            f"{shorten(min(relearned))!r}); take them out of --data, or leave relearn out of --attacks"
        )


def shorten(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder=" ...")


def run_attack(plan: Plan, attack: Attack, evaluator: Evaluator) -> Json:
    """Attack the model and evaluate before and after; returns the attack's entry in the file."""
    started, entry = time.perf_counter(), {"name": attack.name, "settings": attack.settings, **(attack.selection or {})}
    target = plan.final
    if attack.corpus is not None:
        target, entry["command"] = train(plan, attack)
    if attack.probed:
        curve = read_curve(target.parent)
        if not attack.evaluation.probes:
            return {**entry, **ends_of(curve), "seconds": round(time.perf_counter() - started, 3)}
        entry["curve"] = curve
    print(f"evaluating {attack.name}", flush=True)
    if attack.compares:
        after, _ = evaluator.untouched(plan.final, attack.evaluation)
        return {**entry, "before": {}, "after": after, "seconds": round(time.perf_counter() - started, 3)}
    entry["before"], _ = evaluator.untouched(plan.final, attack.plain or attack.evaluation)
    entry["after"], share = evaluator.evaluate(target, attack.evaluation, attack.rounding)
    if attack.rounding:
        entry["rounded_share"] = share
    if plan.original is not None:
        entry["original"], _ = evaluator.untouched(plan.original, attack.evaluation)
    return {**entry, "seconds": round(time.perf_counter() - started, 3)}


def ends_of(curve: list[Json]) -> Json:
    """{"before", "after", "curve"}: the scores before the first step and after the last, and those of every step."""
    before, after = (flatten({name: of for name, of in row.items() if name != "step"}) for row in (curve[0], curve[-1]))
    return {"before": before, "after": after, "curve": curve}
