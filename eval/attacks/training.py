"""Fine-tune the model of a run by the program itself, and read what the training measured on the way."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import yaml

from eval.attacks.spec import Attack, Plan
from eval.files import read_log, write_jsonl
from eval.loading import is_model
from eval.sweep.launch import call, last_error
from pipeline.config.schema import Model
from pipeline.distributed.launcher import rank_launcher, startable
from pipeline.errors import InputError
from pipeline.files import Json, write_whole
from pipeline.optim import fitting_lr

ALONE: Json = {
    "schedule": "sequential",  # a joint pass has two tasks
    "export_every": 0,
    "checkpoint_every": 0,
    "probe_every": 0,
    "stop_at": {},
}  # one task, and nothing on the way


def learning_rate(plan: Plan) -> float:
    """The rate at which all weights of `final/` are fine-tuned: that of --lr, or else that of the run.

    A run of adapters has a rate for adapters, ten times as large: all weights at such a rate are wrecked, and what a
    wrecked model does not say looks forgotten. In its place, as for a run that names no rate, comes the one that fits
    the size of the model; it is printed.
    """
    from pipeline.modeling.checks import num_parameters  # transformers takes seconds to import

    own, has_adapters = plan.config["optimizer"]["lr"], plan.config["model"].get("lora") is not None
    if plan.lr is not None:
        return plan.lr
    if own is not None and not has_adapters:
        return own
    size = num_parameters(Model.model_validate({"path": str(plan.final), "trust_remote_code": plan.trust.remote_code}))
    lr = fitting_lr(size, adapters=False)
    reason = f"; the run's {own:g} is for its adapters" if own is not None else ""
    print(f"--lr {lr:g}, which suits all weights of a model of {size / 1e6:.3g} million parameters{reason}", flush=True)
    return lr


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
        "synthesis": {"rule": "sum"},  # of the run's keys some are of its rule alone
        "optimizer": {**config["optimizer"], "lr": plan.lr, "schedule": "constant", "warmup_ratio": 0.0},
        "train": {**config["train"], **ALONE, "steps": plan.steps, "epochs": None},
    }


def train(plan: Plan, attack: Attack) -> tuple[Path, str]:
    """Fine-tune `final/` on the attack's corpus; returns the model's folder and the command.

    Files of an earlier, killed training are removed: they may have other settings.

    Raises:
        InputError: the training failed; the message has the last line of its stderr.
    """
    from pipeline.modeling.weights import release_memory  # DeepSpeed takes seconds to import

    assert attack.corpus is not None
    release_memory()  # the last evaluated model may still occupy the device that training needs
    output = plan.folder / attack.name
    shutil.rmtree(output, ignore_errors=True)
    if attack.rows:
        write_jsonl(Path(attack.corpus["path"]), attack.rows)
    for name, rows in attack.probed.items():
        write_jsonl(plan.folder / f"{attack.name}.{name}.jsonl", rows)
    file, config = output.with_suffix(".yaml"), training_config(plan, attack.corpus, output)
    if attack.probed:
        config["data"]["probes"] = {
            name: probe_of(plan, f"{attack.name}.{name}", len(rows)) for name, rows in attack.probed.items()
        }
        config["train"]["probe_every"] = max(1, plan.steps // NUM_PROBES)
    write_whole(file, yaml.safe_dump(config, sort_keys=False))
    line = [*rank_launcher(plan.ranks), "--module", "pipeline.train", "--config", str(file), *plan.overrides]
    print(f"training   {attack.name}", flush=True)
    status = call(startable(line), output.with_suffix(".training"))
    if status or not is_model(output / "final"):
        log = output.with_suffix(".training.err")
        raise InputError(f"training {attack.name} failed: {last_error(log)}; the log is {log}")
    return output / "final", shlex.join(line)


NUM_PROBES = 10  # of a training that measures itself, after the one before its first step


def local_corpus(plan: Plan, name: str) -> Json:
    """The `data.forget` of the run, of the rows that the attack `name` writes."""
    moved = {"path": str(plan.folder / f"{name}.jsonl"), "name": None, "split": "train", "preferred": None}
    return {**plan.config["data"]["forget"], **moved}


def probe_of(plan: Plan, name: str, limit: int) -> Json:
    """A set of `data.probes` whose rows are in the file of this name."""
    corpus = local_corpus(plan, name)
    return {key: corpus[key] for key in ("path", "field", "prompt", "response")} | {"limit": limit}


def read_curve(output: Path) -> list[Json]:
    """[{"step", SET: {measure: value}, ...}] of the probes that a training in `output` has made.

    `relearned` is the set of what the training learned, which is its retain corpus.
    """
    curve = []
    for row in read_log(output).probed:
        sets: dict[str, Json] = {}
        for key, value in row.items():
            if key.startswith("probe/"):
                _, name, measure = key.split("/")
                sets.setdefault({"retain": "relearned"}.get(name, name), {})[measure] = value
        curve.append({"step": row["step"], **sets})
    return curve
