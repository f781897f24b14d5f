"""Evaluate a model folder, or every export of a training run, on named suites.

    python -m eval.run --model FOLDER --suite NAME [NAME …] --output FILE.json [--data FOLDER] [--batch-size N]
                       [--shots N] [--ds-config FILE.json] [--allow-pickle] [--trust-remote-code]

Weights are read as safetensors only and code that comes with a model does not run, unless the last two options say so.

Under `torchrun` or `deepspeed` (`--module eval.run`) the ranks share the work, with the scores of one rank; the first
writes. `--ds-config` shards the model over them by ZeRO-3, for one that does not fit on a rank.

A *run folder* (it has `metrics.jsonl` and `exports/`) gives {"trajectory": [{"step", "model", "suites"}, …], …} in the
order of steps; any other folder is one Hugging Face model and gives {"model", "suites", …}. Each suite answers with
"metrics" (nested means), "counts" and the "protocol" in words. Exit status 0 done, 2 unusable input (one line on
stderr, nothing written).
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import platform
import re
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from eval.files import exit_status, read_jsonl, write_atomically
from eval.loading import Trust, add_trust_options, is_model, load, read_ds_config, trust_of
from eval.suites import sharing as ranks
from pipeline.errors import InputError

if TYPE_CHECKING:
    pass


# A suite's module has load_probes(folder | None, suite) and evaluate(model, tokenizer, probes, batch_size=, title=).
# evaluate is called on all ranks alike and shares its forward passes by eval.ranks.share.
SUITES = {
    "corpus": "eval.suites.corpus",
    "bios": "eval.suites.bios",
    "wmdp_bio": "eval.suites.harness",
    "wmdp_cyber": "eval.suites.harness",
    "mmlu": "eval.suites.harness",
    "rwku": "eval.suites.rwku",
    "tofu": "eval.suites.tofu",
}


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


FORGET_SETS = ("forget01", "forget05", "forget10")  # of TOFU on the hub


MMLU_SHOTS = 5  # the paper's, and the harness's users'; WMDP is asked without examples


def find_models(folder: Path) -> list[tuple[int | None, Path]]:
    """(step, model folder) of each model to evaluate: a run's in order of steps, or the one model with step None.

    What is no folder, and could be a name on the hub, is one.
    """
    if not (folder / "metrics.jsonl").is_file() or not (folder / "exports").is_dir():
        if not (is_model(folder) or (not folder.exists() and HUB_NAME.fullmatch(str(folder)))):
            raise InputError(
                f"--model {folder} is no Hugging Face model folder (no config.json, no adapter_config.json), "
                "no run folder (metrics.jsonl, exports/) and no name of the hub; name one of these"
            )
        return [(None, folder)]
    models = {
        int(match[1]): path
        for path in (folder / "exports").iterdir()
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and is_model(path)
    }
    steps = [int(row["step"]) for row in read_jsonl(folder / "metrics.jsonl", required=("step",))]
    if steps and is_model(folder / "final"):
        models[steps[-1]] = folder / "final"  # the same weights as an export of that step
    if not models:
        raise InputError(f"{folder} holds no exported model yet; set train.export_every or let the run finish")
    return sorted(models.items())


def check_suites(names: list[str]) -> list[str]:
    """The names without repetition; raises UnusableInput for one that does not exist."""
    for name in names:
        if name not in SUITES:
            nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown suite {name!r}; the nearest is {nearest!r} (suites: {', '.join(SUITES)})")
    return list(dict.fromkeys(names))


def evaluate_all(
    models: list[tuple[int | None, Path]],
    suites: dict[str, tuple[ModuleType, Any]],
    batch_size: int,
    ds_config: dict[str, Any] | None,
    trust: Trust,
) -> tuple[list[dict[str, Any]], str]:
    """One {"step", "model", "suites"} per model, and the dtype of the last one; a suite is (module, its probes)."""

    def evaluate(folder: Path) -> tuple[dict[str, Any], str]:  # a scope of its own: no model outlives it
        with ranks.raise_on_all_ranks():
            model, tokenizer = load(folder, ds_config, trust)
        answers = {
            name: module.evaluate(model, tokenizer, probes, batch_size=batch_size, title=f"{name} {folder.name}")
            for name, (module, probes) in suites.items()
        }
        return answers, str(model.dtype).removeprefix("torch.")

    entries, dtype = [], ""
    for step, folder in models:
        answers, dtype = evaluate(folder)
        entries.append({"step": step, "model": str(folder), "suites": answers})
    return entries, dtype


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Evaluate a model or a run.")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="FOLDER", help="a model or run folder, or a hub name"
    )
    parser.add_argument("--suite", nargs="+", required=True, metavar="NAME", help=f"of: {', '.join(SUITES)}")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="the answer, one JSON object")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="local copies of the suites' data")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="prompts at a time (default 64)")
    parser.add_argument(
        "--shots", type=int, metavar="N", help=f"examples before a question of mmlu (default {MMLU_SHOTS})"
    )
    parser.add_argument("--forget-set", choices=FORGET_SETS, help=f"of tofu from the hub (default {FORGET_SETS[-1]})")
    parser.add_argument(
        "--ds-config", type=Path, metavar="FILE.json", help="ZeRO-3: the ranks hold a share of the model each"
    )
    add_trust_options(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # `deepspeed` adds it
    arguments = parser.parse_args()

    started = time.perf_counter()
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: give 1 or more")
    if arguments.output.is_dir():
        raise InputError(f"--output {arguments.output} is a folder; name a file")
    names = check_suites(arguments.suite)
    if arguments.shots is not None and "mmlu" not in names:
        raise InputError("--shots is of suite mmlu alone; leave it out")
    if arguments.forget_set is not None and ("tofu" not in names or arguments.data is not None):
        raise InputError("--forget-set is of suite tofu from the hub alone; --data has the forget set that it has")
    shots = MMLU_SHOTS if arguments.shots is None else arguments.shots
    if shots < 0:
        raise InputError(f"--shots {shots}: give 0 or more")
    ds_config = None if arguments.ds_config is None else read_ds_config(arguments.ds_config)
    ranks.start(sharded=ds_config is not None)
    with ranks.raise_on_all_ranks():
        models = find_models(arguments.model)
        # Probes are read before any model is loaded: a wrong --data costs no time.
        suites = {}
        for name in names:
            module = importlib.import_module(SUITES[name])
            options: dict[str, Any] = {"shots": shots} if name == "mmlu" else {}
            if name == "tofu" and arguments.forget_set is not None:
                options["forget_set"] = arguments.forget_set
            suites[name] = (module, module.load_probes(arguments.data, name, **options))
    entries, dtype = evaluate_all(models, suites, arguments.batch_size, ds_config, trust_of(arguments))
    rank, size = ranks.place()
    if rank != 0:
        return
    single = models[0][0] is None
    packages = ["torch", "transformers", "rouge_score"]
    if "eval.suites.harness" in (SUITES[name] for name in names):
        packages.append("lm_eval")
    if ds_config is not None:
        packages.append("deepspeed")
    arguments_given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    answer = {
        **({"model": entries[0]["model"], "suites": entries[0]["suites"]} if single else {"trajectory": entries}),
        "command": shlex.join(["python", "-m", "eval.run", *arguments_given]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name.replace("_", "-")) for name in packages},
        },
        "dtype": dtype,
        "ranks": size,
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_atomically(arguments.output, json.dumps(answer, indent=2) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    ranks.leave(exit_status(main))
