"""Attack an unlearned model, and say how much of what it forgot comes back.

    python -m eval.robustness --run RUN --suite NAME [--attacks relearn retain int8 int4 probes] [--data FOLDER]
        [--group FIELD] [--steps N] [--lr X] [--seed S] [--ranks N] [--output FILE.json] [--allow-pickle]
        [--trust-remote-code] [-- --key value, for training]

- `relearn`: fine-tuning on 10 % of the forget corpus (whole groups: a person, a subject, a question; else documents),
  tested on the rest. Probes of what was learned again, known by text whatever the columns are called, are left out
  (`eval/attacks/matching.py`); a forget set that is of another corpus is refused.
- `retain`: fine-tuning on the retain corpus alone, in which nothing of the forget set is said.
- `int8`, `int4`: linear layers rounded to the nearest value (`eval/attacks/quantize.py`).
- `probes`: the suite's questions as an adversary asks them, where the suite has such (bios, rwku).

Weights are read as safetensors only and code that comes with a model does not run, unless the two options say so; what
the configuration of RUN says about that does not count.

Training is the program's own, with the optimizer and the DeepSpeed file of RUN, started as a user would start it.
The answer is {"run", "suite", …, "attacks": [{"name", "settings", "before", "after", "original", "seconds", …}]} with
{metric: value} under the three: the unlearned model not attacked, attacked, and the model that was to be unlearned
(where RUN's `model.path` is a folder here). They are asked the same; under `probes`, `before` is asked plainly.
The file is written after every attack, and the same command goes on where a kill left it. Exit status 0 done, 2
unusable input (one line on stderr).
"""

import argparse
import difflib
import hashlib
import importlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.attacks.run import Evaluator, attacks_of, run_attack, unavailable_reason
from eval.attacks.spec import ATTACKS, Attack, Plan
from eval.files import exit_status, read_json, write_atomically
from eval.loading import add_trust_options, check_trust, is_model, trust_of
from eval.run import MMLU_SHOTS, SUITES, check_suites
from eval.sweep.launch import end_on_terminate, exclusive_lock
from pipeline.errors import InputError

STEPS = 100
OWN_KEYS = ("config", "method", "output", "resume", "seed", "train.steps", "optimizer.lr", "model.path")


# ---------------------------------------------------------------------------------------------------------------------
# The file


def digest(model: Path) -> str:
    """SHA-256 of the weight files: a run that was repeated is another model."""
    whole = hashlib.sha256()
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def begin(plan: Plan, data: Path | None, output: Path) -> dict[str, Any]:
    """The answer as far as `output` has it; raises UnusableInput if that is of another model, suite, data or seed."""
    described = read_json(plan.final / "config.json")
    answer = {
        "run": str(plan.run),
        "model": digest(plan.final),
        "suite": plan.suite,
        "data": data and str(data),
        "seed": plan.seed,
        "dtype": described.get("dtype") or described.get("torch_dtype"),
        "command": shlex.join(["python", "-m", "eval.robustness", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "deepspeed", "rouge-score")},
        },
        "attacks": [],
    }
    if output.exists():
        before = read_json(output)
        if not isinstance(before, dict) or not isinstance(before.get("attacks"), list):
            raise InputError(f"{output} is no answer of eval.robustness; name another --output")
        for key in ("model", "suite", "data", "seed"):
            if before.get(key) != answer[key]:
                told = "weights" if key == "model" else f"{key} {before.get(key)!r} instead of {answer[key]!r}"
                raise InputError(f"{output} is of other {told}; name another --output, or remove it")
        answer["attacks"] = before["attacks"]
    return answer


def missing(attacks: Sequence[Attack], answer: dict[str, Any], output: Path) -> list[Attack]:
    """The attacks that the answer lacks; raises UnusableInput for one that it has with other settings."""
    done = {entry["name"]: entry["settings"] for entry in answer["attacks"]}
    for attack in attacks:
        before, now = done.get(attack.name, attack.settings), attack.settings
        changed = [f"{key} {before.get(key)!r}" for key in now if before.get(key) != now[key]]
        if changed:
            raise InputError(f"{output} has {attack.name} with {', '.join(changed)}; name another --output")
    return [attack for attack in attacks if attack.name not in done]


def table(entries: Iterable[dict[str, Any]]) -> str:
    """What came back, metric by metric; where there is an overall score, that alone, but for probes (see the file)."""
    rows: list[tuple[str, ...]] = [("attack", "metric", "original", "before", "after")]
    for entry in entries:
        columns = [entry.get(key, {}) for key in ("original", "before", "after")]
        names = list(dict.fromkeys(name for column in columns for name in column))
        overall = {name.rpartition(".")[0] for name in names if name.lower().endswith("all")}
        overall = overall if entry["name"] != "probes" else set()  # its kinds differ in what they are worth
        for name in names:
            if name.rpartition(".")[0] not in overall or name.lower().endswith("all"):
                values = (f"{column[name]:.3f}" if name in column else "–" for column in columns)
                rows.append((entry["name"], name, *values))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_config(run: Path) -> dict[str, Any]:
    """The resolved configuration of a finished run; raises UnusableInput."""
    import yaml

    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        for section in ("model", "data", "objective", "synthesis", "optimizer", "train"):
            config[section].keys()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--run {run} has no config.yaml of a run ({reason}); name the folder of a run") from error
    if (run / "final" / "adapter_config.json").is_file():
        raise InputError(f"{run / 'final'} is an adapter; run the training again with --model.lora.merge true")
    if not is_model(run / "final"):
        raise InputError(f"{run} has no final/; let the run finish (--resume)")
    return config


def parse_command_line(arguments: Sequence[str]) -> tuple[Plan, list[str], Path | None, Path]:
    """The plan, the names of its attacks, --data and --output; raises UnusableInput."""
    parser = argparse.ArgumentParser(prog="python -m eval.robustness", description="Attack an unlearned model.")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the folder of a finished training run")
    parser.add_argument("--suite", required=True, metavar="NAME", help=f"what measures, of: {', '.join(SUITES)}")
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="NAME",
        help=f"of: {', '.join(ATTACKS)} (default: all that the run and the suite allow)",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="local copies of the suite's data")
    parser.add_argument(
        "--group",
        metavar="FIELD",
        help="column of the forget corpus; relearning takes whole groups (default: by suite)",
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of fine-tuning (default {STEPS})")
    parser.add_argument("--lr", type=float, metavar="X", help="learning rate of fine-tuning (default: the run's)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="what is relearned, in which order (default 0)"
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes that train (default 2)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="prompts at a time (default 64)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the answer (default RUN/robustness.json)")
    add_trust_options(parser)
    parser.epilog = "After --, overrides for fine-tuning: -- --train.micro_batch_size 1"
    border = list(arguments).index("--") if "--" in arguments else len(arguments)
    given, overrides = parser.parse_args(arguments[:border]), tuple(arguments[border + 1 :])
    for token in overrides:
        key = token.removeprefix("--").partition("=")[0]
        if token.startswith("--") and key in OWN_KEYS:
            raise InputError(f"override {token}: {key} is decided by this command; take it out from behind --")
    for name in ("steps", "ranks", "batch_size"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(given, name)}: give 1 or more")
    if given.lr is not None and not 0 < given.lr < math.inf:
        raise InputError(f"--lr {given.lr}: give a number above 0")
    if given.seed < 0:
        raise InputError(f"--seed {given.seed}: a seed is 0 or more")
    for name in given.attacks or ():
        if name not in ATTACKS:
            near = difflib.get_close_matches(name, ATTACKS, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown attack {name!r}; the nearest is {near!r} (attacks: {', '.join(ATTACKS)})")
    (suite,) = check_suites([given.suite])
    config = read_config(given.run)
    output = given.output or given.run / "robustness.json"
    if output.is_dir() or output.suffix != ".json":
        raise InputError(f"--output {output}: name a file that ends in .json")
    module = importlib.import_module(SUITES[suite])
    options = {"shots": MMLU_SHOTS} if suite == "mmlu" else {}
    plan = Plan(
        run=given.run,
        config=config,
        suite=suite,
        module=module,
        probes=module.load_probes(given.data, suite, **options),
        group=given.group,
        steps=given.steps,
        lr=config["optimizer"]["lr"] if given.lr is None else given.lr,
        seed=given.seed,
        overrides=overrides,
        ranks=given.ranks,
        batch_size=given.batch_size,
        folder=output.with_suffix(""),
        trust=trust_of(given),
    )
    refusals = {name: unavailable_reason(plan, name) for name in given.attacks or ATTACKS}
    for name, reason in refusals.items():
        if reason and given.attacks:
            raise InputError(f"--attacks {name}: {reason}; leave it out")
    for folder in filter(None, (plan.final, plan.original)):
        check_trust(folder, plan.trust)  # now, and not after hours of fine-tuning
    return plan, [name for name, reason in refusals.items() if reason is None], given.data, output


def main() -> None:
    plan, names, data, output = parse_command_line(sys.argv[1:])
    end_on_terminate()
    attacks = attacks_of(plan, names)
    with exclusive_lock(plan.folder, "eval.robustness"):
        answer, examiner = begin(plan, data, output), Evaluator(plan)
        for attack in missing(attacks, answer, output):
            answer["attacks"].append(run_attack(plan, attack, examiner))
            write_atomically(output, json.dumps(answer, indent=1) + "\n")
    print(table(answer["attacks"]) + f"\nread {output}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
