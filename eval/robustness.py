"""Attack an unlearned model, and report how much of what it forgot returns.

    python -m eval.robustness --run RUN --suite NAME [--attacks NAME [NAME …]] [--data FOLDER] [--group FIELD]
        [--steps N] [--lr X] [--shots N] [--samples N] [--texts FILE] [--seed S] [--ranks N] [--batch-size N]
        [--output FILE.json] [--allow-pickle] [--trust-remote-code] [-- --key value, for training]

- `relearn`: fine-tuning on 10 % of the forget corpus (whole groups: a person, a subject, a question; else documents),
  tested on the rest. The test leaves out probes about the relearned part; the match is by text, whatever the names of
  the columns (`eval/attacks/matching.py`). A forget set that belongs to another corpus is refused.
- `retain`: fine-tuning on the retain corpus alone, which mentions nothing of the forget set.
- `int8`, `int4`, `nf4`: linear layers rounded to the nearest value (`eval/attacks/quantize.py`).
- `probes`: the suite's questions as an adversary puts them, if the suite has such probes (bios, rwku).

Five more by name, which take longer, or an option. All but the first look at the forget corpus itself, whatever the
suite:

- `unrelated`: fine-tuning on `--texts` of neither corpus; the probability of the forget corpus at about ten steps on
  the way is under `curve`.
- `relearn_curve`: fine-tuning on one half of the forget corpus, at a constant rate, and the probability of the other
  half at about ten steps on the way, under `curve`.
- `few_shot`: questions of one half after `--shots` answered questions of the other half.
- `leak`: leak@k, the chance that one of k answers drawn at temperature 1 gives the text away, from `--samples` answers
  to each prompt.
- `kl`: KL(before ‖ after) a token on `--texts` of neither corpus: the budget at which methods may be compared.

Suite `probes` measures the sets of RUN's own configuration, and suite `corpus` without --data its corpora.

The command reads weights from safetensors only and does not run code that comes with a model, unless the two options
allow it, whatever the configuration of RUN allows.

Training is the program's own, with the optimizer and the DeepSpeed file of RUN, started by the usual command. The
output is {"run", "suite", …, "attacks": [{"name", "settings", "before", "after", "original", "seconds", …}]} with
{metric: value} under the three: the unlearned model before the attack and after it, and the model before unlearning (if
RUN's `model.path` is a folder on this machine). All three get the same probes; only `before` of `probes` has the plain
questions. The command writes the file after every attack; after a kill, the same command continues. Exit status: 0
done, 2 unusable input (one line on stderr).
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.attacks.record import begin, missing, table
from eval.attacks.run import Evaluator, attacks_of, run_attack, unavailable_reason
from eval.attacks.spec import ATTACKS, BY_DEFAULT, TRAINING, Plan
from eval.attacks.training import learning_rate
from eval.files import check_output, exit_status, read_config
from eval.loading import add_trust_options, check_trust, is_model, trust_of
from eval.results.general import GENERAL
from eval.results.metrics import nearest
from eval.suites import SUITES, check_suites, load_suite
from eval.sweep.launch import end_on_terminate, exclusive_lock, refuse_overrides, split_overrides
from pipeline.distributed.launcher import rank_launcher
from pipeline.errors import InputError
from pipeline.files import Json, write_whole

STEPS = 100
OWN_KEYS = ("config", "method", "output", "resume", "seed", "train.steps", "optimizer.lr", "model.path")
SECTIONS = ("model", "data", "objective", "synthesis", "optimizer", "train")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.robustness", description="Attack an unlearned model.")
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="the folder of a finished training run")
    add("--suite", required=True, metavar="NAME", help=f"the suite that measures, one of: {', '.join(SUITES)}")
    allowed = f"default: of {', '.join(BY_DEFAULT)} all that the run and the suite allow"
    add("--attacks", nargs="+", metavar="NAME", help=f"one or more of: {', '.join(ATTACKS)} ({allowed})")
    add("--data", type=Path, metavar="FOLDER", help="local copies of the suite's data")
    groups = "column of the forget corpus whose values are the groups for relearning (default: by suite)"
    add("--group", metavar="FIELD", help=groups)
    rate = "default: the run's; after a run of adapters, one that fits the model's size"
    add("--steps", type=int, default=STEPS, metavar="N", help=f"of fine-tuning (default {STEPS})")
    add("--lr", type=float, metavar="X", help=f"learning rate of fine-tuning ({rate})")
    add("--seed", type=int, default=0, metavar="S", help="selects and orders what is relearned (default 0)")
    add("--ranks", type=int, default=2, metavar="N", help="processes that train, a GPU each (default 2)")
    add("--shots", type=int, default=5, metavar="N", help="answered questions before each one, of few_shot (default 5)")
    add("--samples", type=int, default=200, metavar="N", help="answers drawn to each prompt, of leak (default 200)")
    add("--texts", type=Path, metavar="FILE", help="texts of neither corpus, of kl and unrelated: .txt, .jsonl, ...")
    add("--batch-size", type=int, default=64, metavar="N", help="prompts in one batch (default 64)")
    add("--output", type=Path, metavar="FILE.json", help="the file to write (default RUN/robustness.json)")
    add_trust_options(parser)
    parser.epilog = "After --, overrides for fine-tuning: -- --train.micro_batch_size 1"
    return parser


def check(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Raises InputError for options that are out of range."""
    refuse_overrides(overrides, OWN_KEYS, "by this command")
    for name in ("steps", "ranks", "batch_size", "shots", "samples"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: give 1 or more")
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise InputError(f"--lr {options.lr}: give a number above 0")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: a seed is 0 or more")
    for name in options.attacks or ():
        if name not in ATTACKS:
            raise InputError(
                f"unknown attack {name!r}; the nearest is {nearest(name, ATTACKS)!r} (attacks: {', '.join(ATTACKS)})"
            )


def read_finished(run: Path) -> Json:
    """The resolved configuration of a finished run whose model is not an adapter; raises InputError for another."""
    config = read_config(run, SECTIONS)
    if (run / "final" / "adapter_config.json").is_file():
        raise InputError(f"{run / 'final'} is an adapter; run the training again with --model.lora.merge true")
    if not is_model(run / "final"):
        raise InputError(f"{run} has no final/; let the run finish (--resume)")
    return config


def probes_of_run(options: argparse.Namespace, suite: str) -> dict[str, Path]:
    """The further argument of `load_probes` of a suite whose rows are those of the run itself."""
    own = {"probes": options.run / "config.yaml", "corpus": options.run}
    return {"run": own[suite]} if suite in own else {}


def parse_command_line(arguments: Sequence[str]) -> tuple[Plan, list[str], Path | None, Path]:
    """The plan, the names of its attacks, --data and --output; raises InputError."""
    own, overrides = split_overrides(arguments)
    options = make_parser().parse_args(own)
    check(options, overrides)
    (suite,) = check_suites([options.suite])
    if suite in GENERAL:
        raise InputError(f"--suite {suite} measures general ability, which no attack brings back; name another suite")
    config = read_finished(options.run)
    output = options.output or options.run / "robustness.json"
    if output.is_dir() or output.suffix != ".json":
        raise InputError(f"--output {output}: name a file that ends in .json")
    check_output(output)
    module = load_suite(suite)
    plan = Plan(
        run=options.run,
        config=config,
        suite=suite,
        module=module,
        probes=module.load_probes(options.data, suite, **probes_of_run(options, suite)),
        group=options.group,
        steps=options.steps,
        lr=options.lr,
        seed=options.seed,
        overrides=overrides,
        ranks=options.ranks,
        batch_size=options.batch_size,
        folder=output.with_suffix(""),
        trust=trust_of(options),
        shots=options.shots,
        samples=options.samples,
        texts=options.texts,
    )
    reasons = {name: unavailable_reason(plan, name) for name in options.attacks or BY_DEFAULT}
    for name, reason in reasons.items():
        if reason and options.attacks:
            raise InputError(f"--attacks {name}: {reason}; leave it out")
    for folder in filter(None, (plan.final, plan.original)):
        check_trust(folder, plan.trust)  # now, and not after hours of fine-tuning
    names = [name for name, reason in reasons.items() if reason is None]
    if any(name in TRAINING for name in names):
        rank_launcher(plan.ranks)  # refuses more than there are GPUs
        plan = replace(plan, lr=learning_rate(plan))
    return plan, names, options.data, output


def main() -> None:
    plan, names, data, output = parse_command_line(sys.argv[1:])
    end_on_terminate()
    attacks = attacks_of(plan, names)
    with exclusive_lock(plan.folder, "eval.robustness"):
        record, evaluator = begin(plan, data, output), Evaluator(plan)
        for attack in missing(attacks, record, output):
            record["attacks"].append(run_attack(plan, attack, evaluator))
            write_whole(output, json.dumps(record, indent=1) + "\n")
    print(table(record["attacks"]) + f"\nread {output}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
