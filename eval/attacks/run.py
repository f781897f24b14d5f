"""Carry out an attack: train or round the model, then ask it again."""

from __future__ import annotations

import math
import shlex
import shutil
import textwrap
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from eval.attacks.matching import Matcher
from eval.attacks.quantize import COLUMNS, round_linear_layers
from eval.attacks.relearn import Row, columns_of, mean_nll, read_corpus, sample, split_corpus, without_copies
from eval.attacks.spec import FRACTION, Attack, EvalSpec, Metrics, Plan
from eval.files import write_atomically, write_jsonl
from eval.loading import is_model, load
from eval.sweep.launch import call, last_error, launcher
from pipeline.errors import InputError


class Evaluator:
    """Asks models; an untouched model is asked the same only once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.untouched = cache(self.ask)

    def ask(self, folder: Path, exam: EvalSpec, bits: int | None = None) -> tuple[Metrics, float]:
        """The metrics of the model in `folder`, its linear layers rounded to `bits`, and the share that was rounded."""
        plan, title = self.plan, f"{self.plan.suite} {folder.name}"
        model, tokenizer = load(folder, trust=plan.trust)
        share = round_linear_layers(model, bits) if bits else 0.0
        if bits and not share:
            raise InputError(f"int{bits}: {folder} has no linear layer to round; leave it out of --attacks")
        answer = plan.module.evaluate(model, tokenizer, exam.probes, batch_size=plan.batch_size, title=title)
        metrics = flatten(answer["metrics"])
        if exam.documents:
            data, size = plan.config["data"], plan.batch_size
            found = mean_nll(model, tokenizer, exam.documents, data, batch_size=size, title=f"{title} documents")
            metrics |= flatten({exam.nll: found})
        return metrics, share


def flatten(metrics: dict[str, Any], prefix: str = "") -> Metrics:
    """{"forget": {"all": x}} -> {"forget.all": x}; what is no finite number is left out."""
    flat: Metrics = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None and math.isfinite(value):
            flat[prefix + key] = float(value)
    return flat


def unavailable_reason(plan: Plan, name: str) -> str | None:
    """Why the run or the suite does not allow an attack; None where they do."""
    needed = {"relearn": "forget", "retain": "retain"}.get(name)
    if needed and plan.config["data"][needed] is None:
        return f"{plan.run} has no {needed} corpus"
    if name == "relearn" and not (hasattr(plan.module, "group_of") or hasattr(plan.module, "question_texts")):
        return f"suite {plan.suite} does not say which row of a corpus a probe is about (group_of)"
    if name == "probes" and not (hasattr(plan.module, "adversarial") and plan.module.adversarial(plan.probes)[1]):
        return f"suite {plan.suite} has no adversarial probes"
    return None


def attacks_of(plan: Plan, names: Iterable[str]) -> list[Attack]:
    """The attacks by name, in order; raises UnusableInput for a corpus that cannot be read or split."""
    forget = plan.config["data"]["forget"]
    rows = read_corpus(forget) if forget is not None else []
    whole = EvalSpec(plan.probes, tuple(sample(rows, plan.seed)))
    training = {"steps": plan.steps, "lr": plan.lr, "seed": plan.seed, "overrides": list(plan.overrides)}
    made = []
    for name in names:
        if name == "relearn":
            made.append(relearn(plan, rows, training))
        elif name == "retain":
            made.append(Attack(name, training, whole, corpus=plan.config["data"]["retain"]))
        elif name == "probes":
            plain, adversarial = plan.module.adversarial(plan.probes)
            told = {"probes": len(adversarial)}
            made.append(Attack(name, {}, EvalSpec(adversarial), plain=EvalSpec(plain), told=told))
        else:
            bits = int(name.removeprefix("int"))
            made.append(Attack(name, {"bits": bits, "columns": COLUMNS[bits]}, whole, bits=bits))
    return made


def relearn(plan: Plan, rows: list[Row], training: dict[str, Any]) -> Attack:
    """Split the corpus, and leave out the probes of the part that is learned again."""
    forget, group = plan.config["data"]["forget"], plan.group
    own = getattr(plan.module, "group_of", None)
    keys = plan.module.question_texts(plan.probes) if own is None else map(own, plan.probes)
    matcher = Matcher(key for key in keys if key is not None)
    found = {id(row): matcher.find(row) for row in rows}
    if group is None:
        split = split_corpus(rows, lambda row: next(iter(found[id(row)]), None), FRACTION, plan.seed)
    else:
        if lacking := [number for number, row in enumerate(rows, start=1) if row.get(group) is None]:
            columns = ", ".join(rows[lacking[0] - 1])
            raise InputError(f"--group {group}: row {lacking[0]} of the forget corpus has only {columns}; name one")
        split = split_corpus(rows, lambda row: str(row[group]), FRACTION, plan.seed)
    split = without_copies(split, columns_of(forget))
    learned = {key for row in split.relearned for key in found[id(row)]}
    if own is None:
        probes = refuse_relearned_questions(plan, learned)
    else:
        check_matched(plan, matcher, {key for names in found.values() for key in names})
        probes = [probe for probe in plan.probes if matcher.name(own(probe)) not in learned]
        if not any(map(plan.module.forgotten, probes)):
            raise InputError(
                "relearn: what is learned again is of every probe of the forget set, so that none is left to ask; name "
                "a column of the corpus that splits it by --group, or leave relearn out of --attacks"
            )
    told = {
        "groups": split.groups,
        "documents": len(split.relearned),
        "held_out_documents": len(split.held_out),
        "excluded_probes": len(plan.probes) - len(probes) if own is not None else 0,
    }
    path = str(plan.folder / "relearn.jsonl")
    corpus = {**forget, "path": path, "name": None, "split": "train", "preferred": None}
    texts = tuple({key: row[key] for key in columns_of(forget)} for row in split.relearned)
    exam = EvalSpec(probes, tuple(sample(split.held_out, plan.seed)), "held_out_nll")
    settings = {**training, "fraction": FRACTION, "group": group}
    return Attack("relearn", settings, exam, corpus=corpus, rows=texts, told=told)


def check_matched(plan: Plan, matcher: Matcher, stated: set[str]) -> None:
    """Raises UnusableInput if a probe of the forget set is about none of the keys `stated` in the forget corpus."""
    asked = [probe for probe in plan.probes if plan.module.forgotten(probe)]
    unknown = [probe for probe in asked if matcher.name(plan.module.group_of(probe)) not in stated]
    if unknown:
        first = plan.module.group_of(unknown[0]) or str(unknown[0])
        raise InputError(
            f"relearn: {len(unknown)} of {len(asked)} probes of the forget set are about no row of the forget corpus "
            f"(the first: {shorten(first)!r}), so nobody can say whether they are learned again; give --data whose "
            "forget set is of this corpus, or leave relearn out of --attacks"
        )


def refuse_relearned_questions(plan: Plan, learned: set[str]) -> Any:
    """The probes of a suite that asks all its questions or none; raises UnusableInput if one of them is learned."""
    if learned:
        raise InputError(
            f"relearn: {len(learned)} questions of suite {plan.suite} stand in what is learned again (one of them: "
            f"{shorten(min(learned))!r}); take them out of --data, or leave relearn out of --attacks"
        )
    return plan.probes


def shorten(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder=" ...")


def train(plan: Plan, attack: Attack) -> tuple[Path, str]:
    """Fine-tune `final/` on the attack's corpus; returns the model's folder and the command.

    What a kill left of it is removed: it may be of other settings. Raises UnusableInput with the last line of stderr.
    """
    import yaml

    from pipeline.zero.compat import release_memory

    assert attack.corpus is not None
    release_memory()  # the model that was asked last may still be on the device that training needs
    config, output = plan.config, plan.folder / attack.name
    shutil.rmtree(output, ignore_errors=True)
    if attack.rows:
        write_jsonl(Path(attack.corpus["path"]), attack.rows)
    model = {"path": str(plan.final), "trainable": [".*"], "lora": None}
    # The configuration came with the run: what it allows, the user of this command did not.
    model |= {"allow_pickle": plan.trust.allow_pickle, "trust_remote_code": plan.trust.remote_code}
    changed = {
        **config,
        "output": str(output),
        "method": None,
        "seed": plan.seed,
        "model": {**config["model"], **model},
        "data": {**config["data"], "forget": None, "retain": attack.corpus},
        "objective": {**config["objective"], "forget": "none", "retain": "nll"},
        "synthesis": {**config["synthesis"], "rule": "sum", "scope": None, "geometry": False, "alpha": 1.0},
        "optimizer": {**config["optimizer"], "lr": plan.lr, "schedule": "constant", "warmup_ratio": 0.0},
        "train": {**config["train"], "steps": plan.steps, "epochs": None, "export_every": 0, "checkpoint_every": 0},
    }
    file = output.with_suffix(".yaml")
    write_atomically(file, yaml.safe_dump(changed, sort_keys=False))
    line = ["--num_gpus", str(plan.ranks), "--module", "pipeline.train", "--config", str(file), *plan.overrides]
    print(f"training   {attack.name}", flush=True)
    status = call([*launcher(), *line], output.with_suffix(".training"))
    if status or not is_model(output / "final"):
        log = output.with_suffix(".training.err")
        raise InputError(f"training {attack.name} failed: {last_error(log)}; the log is {log}")
    return output / "final", shlex.join(["deepspeed", *line])


def run_attack(plan: Plan, attack: Attack, examiner: Evaluator) -> dict[str, Any]:
    """Attack, and ask before and after; the attack's entry in the file."""
    started, entry = time.perf_counter(), {"name": attack.name, "settings": attack.settings, **(attack.told or {})}
    target = plan.final
    if attack.corpus is not None:
        target, entry["command"] = train(plan, attack)
    print(f"evaluating {attack.name}", flush=True)
    entry["before"], _ = examiner.untouched(plan.final, attack.plain or attack.exam)
    entry["after"], share = examiner.ask(target, attack.exam, attack.bits)
    if attack.bits:
        entry["rounded_share"] = share
    if plan.original is not None:
        entry["original"], _ = examiner.untouched(plan.original, attack.exam)
    return {**entry, "seconds": round(time.perf_counter() - started, 3)}
