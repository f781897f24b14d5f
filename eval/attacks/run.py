"""Make attacks from a plan and run them: train or round the model, and evaluate it before and after."""

from __future__ import annotations

import math
import shlex
import shutil
import textwrap
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml

from eval.attacks.matching import Matcher
from eval.attacks.quantize import ROUNDINGS, round_linear_layers
from eval.attacks.relearn import Row, Split, columns_of, mean_nll, read_corpus, split_corpus, without_copies
from eval.attacks.spec import FRACTION, Attack, EvalSpec, Metrics, Plan
from eval.files import write_jsonl
from eval.loading import is_model, load
from eval.results.metrics import flatten
from eval.suites import AdversarialSuite, GroupedSuite, Probes, WholeSuite
from eval.suites.corpus import sample
from eval.sweep.launch import call, last_error, launcher
from pipeline.errors import InputError
from pipeline.files import Json, write_whole


class Evaluator:
    """Evaluates models; an untouched model gets each evaluation only once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.untouched = cache(self.evaluate)

    def evaluate(self, folder: Path, spec: EvalSpec, rounding: str | None = None) -> tuple[Metrics, float]:
        """(metrics of the model in `folder` with linear layers rounded, share of the rounded weights)."""
        plan, title = self.plan, f"{self.plan.suite} {folder.name}"
        model, tokenizer = load(folder, trust=plan.trust)
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
    needed = {"relearn": "forget", "retain": "retain"}.get(name)
    if needed and plan.config["data"][needed] is None:
        return f"{plan.run} has no {needed} corpus"
    if name == "relearn" and not isinstance(plan.module, GroupedSuite | WholeSuite):
        return f"suite {plan.suite} does not say which row of a corpus a probe is about (group_of)"
    if name == "probes" and not (isinstance(plan.module, AdversarialSuite) and plan.module.adversarial(plan.probes)[1]):
        return f"suite {plan.suite} has no adversarial probes"
    return None


def attacks_of(plan: Plan, names: Iterable[str]) -> list[Attack]:
    """The attacks by name, in order; raises InputError for a corpus that cannot be read or split."""
    forget = plan.config["data"]["forget"]
    rows = read_corpus(forget) if forget is not None else []
    everything = EvalSpec(plan.probes, tuple(sample(rows, plan.seed)))
    training = {"steps": plan.steps, "lr": plan.lr, "seed": plan.seed, "overrides": list(plan.overrides)}
    attacks = []
    for name in names:
        if name == "relearn":
            attacks.append(relearn(plan, rows, training))
        elif name == "retain":
            attacks.append(Attack(name, training, everything, corpus=plan.config["data"]["retain"]))
        elif name == "probes":
            assert isinstance(plan.module, AdversarialSuite)  # see `unavailable_reason`
            plain, adversarial = plan.module.adversarial(plan.probes)
            selection = {"probes": len(adversarial)}
            attacks.append(Attack(name, {}, EvalSpec(adversarial), plain=EvalSpec(plain), selection=selection))
        else:
            attacks.append(Attack(name, ROUNDINGS[name], everything, rounding=name))
    return attacks


def relearn(plan: Plan, rows: list[Row], training: Json) -> Attack:
    """Split the corpus into a part to relearn and a part for the test, without the probes of the relearned part."""
    forget, module = plan.config["data"]["forget"], plan.module
    if isinstance(module, GroupedSuite):
        keys = [key for key in map(module.group_of, plan.probes) if key is not None]
    else:
        assert isinstance(module, WholeSuite)  # see `unavailable_reason`
        keys = module.question_texts(plan.probes)
    matcher = Matcher(keys)
    found = {id(row): matcher.find(row) for row in rows}
    split = without_copies(split_rows(plan, rows, found), columns_of(forget))
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
    path = str(plan.folder / "relearn.jsonl")
    corpus = {**forget, "path": path, "name": None, "split": "train", "preferred": None}
    texts = tuple({key: row[key] for key in columns_of(forget)} for row in split.relearned)
    evaluation = EvalSpec(probes, tuple(sample(split.held_out, plan.seed)), "held_out_nll")
    settings = {**training, "fraction": FRACTION, "group": plan.group}
    return Attack("relearn", settings, evaluation, corpus=corpus, rows=texts, selection=selection)


def split_rows(plan: Plan, rows: list[Row], found: dict[int, list[str]]) -> Split:
    """The split by the column of --group, else by the first key that a row is about (`found`, by the row's id)."""
    group = plan.group
    if group is None:
        return split_corpus(rows, lambda row: next(iter(found[id(row)]), None), FRACTION, plan.seed)
    if lacking := [number for number, row in enumerate(rows, start=1) if row.get(group) is None]:
        columns = ", ".join(rows[lacking[0] - 1])
        raise InputError(f"--group {group}: row {lacking[0]} of the forget corpus has only {columns}; name one")
    return split_corpus(rows, lambda row: str(row[group]), FRACTION, plan.seed)


def probes_of_held_out(
    plan: Plan, module: GroupedSuite, matcher: Matcher, mentioned: set[str], relearned: set[str]
) -> list[Probes]:
    """The probes that are not about a relearned key.

    Args:
        mentioned: the keys that some row of the forget corpus is about.

    Raises:
        InputError: a probe of the forget set is about no row of the corpus, or none of the forget set would remain.
    """
    forgotten = [probe for probe in plan.probes if module.forgotten(probe)]
    unknown = [probe for probe in forgotten if matcher.name(module.group_of(probe)) not in mentioned]
    if unknown:
        first = module.group_of(unknown[0]) or str(unknown[0])
        raise InputError(
            f"relearn: {len(unknown)} of {len(forgotten)} probes of the forget set are about no row of the forget "
            f"corpus (the first: {shorten(first)!r}), so nobody can say whether they are learned again; give --data "
            "or data.probes whose forget set is of this corpus, or leave relearn out of --attacks"
        )
    probes = [probe for probe in plan.probes if matcher.name(module.group_of(probe)) not in relearned]
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


ALONE: Json = {
    "export_every": 0,
    "checkpoint_every": 0,
    "probe_every": 0,
    "stop_at": {},
}  # nothing on the way


def training_config(plan: Plan, corpus: Json, output: Path) -> Json:
    """The configuration of the run, changed to fine-tune all weights of its `final/` on `corpus`."""
    config = plan.config
    model = {"path": str(plan.final), "trainable": [".*"], "lora": None}
    # The configuration came with the run: what it allows, the user of this command did not allow.
    model |= {"allow_pickle": plan.trust.allow_pickle, "trust_remote_code": plan.trust.remote_code}
    return {
        **config,
        "output": str(output),
        "method": None,
        "seed": plan.seed,
        "model": {**config["model"], **model},
        "data": {**config["data"], "forget": None, "retain": corpus, "probes": {}},
        "objective": {**config["objective"], "forget": "none", "retain": "nll"},
        "synthesis": {**config["synthesis"], "rule": "sum", "scope": None, "geometry": False, "alpha": 1.0},
        "optimizer": {**config["optimizer"], "lr": plan.lr, "schedule": "constant", "warmup_ratio": 0.0},
        "train": {**config["train"], **ALONE, "steps": plan.steps, "epochs": None},
    }


def train(plan: Plan, attack: Attack) -> tuple[Path, str]:
    """Fine-tune `final/` on the attack's corpus; returns the model's folder and the command.

    Files of an earlier, killed training are removed: they may have other settings.

    Raises:
        InputError: the training failed; the message has the last line of its stderr.
    """
    from pipeline.zero.compat import release_memory  # DeepSpeed takes seconds to import

    assert attack.corpus is not None
    release_memory()  # the last evaluated model may still occupy the device that training needs
    output = plan.folder / attack.name
    shutil.rmtree(output, ignore_errors=True)
    if attack.rows:
        write_jsonl(Path(attack.corpus["path"]), attack.rows)
    file = output.with_suffix(".yaml")
    write_whole(file, yaml.safe_dump(training_config(plan, attack.corpus, output), sort_keys=False))
    line = ["--num_gpus", str(plan.ranks), "--module", "pipeline.train", "--config", str(file), *plan.overrides]
    print(f"training   {attack.name}", flush=True)
    status = call([*launcher(), *line], output.with_suffix(".training"))
    if status or not is_model(output / "final"):
        log = output.with_suffix(".training.err")
        raise InputError(f"training {attack.name} failed: {last_error(log)}; the log is {log}")
    return output / "final", shlex.join(["deepspeed", *line])


def run_attack(plan: Plan, attack: Attack, evaluator: Evaluator) -> Json:
    """Attack the model and evaluate before and after; returns the attack's entry in the file."""
    started, entry = time.perf_counter(), {"name": attack.name, "settings": attack.settings, **(attack.selection or {})}
    target = plan.final
    if attack.corpus is not None:
        target, entry["command"] = train(plan, attack)
    print(f"evaluating {attack.name}", flush=True)
    entry["before"], _ = evaluator.untouched(plan.final, attack.plain or attack.evaluation)
    entry["after"], share = evaluator.evaluate(target, attack.evaluation, attack.rounding)
    if attack.rounding:
        entry["rounded_share"] = share
    if plan.original is not None:
        entry["original"], _ = evaluator.untouched(plan.original, attack.evaluation)
    return {**entry, "seconds": round(time.perf_counter() - started, 3)}
