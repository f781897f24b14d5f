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

import argparse
import difflib
import functools
import gc
import importlib
import json
import platform
import re
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from eval import ranks
from eval.files import UnusableInput, exit_status, read_json, read_jsonl, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A suite's module has load_probes(folder | None, suite) and evaluate(model, tokenizer, probes, batch_size=, title=).
# evaluate is called on all ranks alike and shares its forward passes by eval.ranks.share.
SUITES = {
    "corpus": "eval.corpus",
    "bios": "eval.bios",
    "wmdp_bio": "eval.harness",
    "wmdp_cyber": "eval.harness",
    "mmlu": "eval.harness",
    "rwku": "eval.rwku",
    "tofu": "eval.tofu",
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FORGET_SETS = ("forget01", "forget05", "forget10")  # of TOFU on the hub
MMLU_SHOTS = 5  # the paper's, and the harness's users'; WMDP is asked without examples


@dataclass(frozen=True)
class Trust:
    """What a model may bring that can run code: by default nothing, as in training."""

    allow_pickle: bool = False
    remote_code: bool = False

    def options(self) -> dict[str, bool]:
        """Of `from_pretrained`, both always stated: about code that is left open, transformers asks the terminal."""
        # Without `use_safetensors`, transformers takes a pickle where there is nothing else.
        safetensors = {} if self.allow_pickle else {"use_safetensors": True}
        return {"trust_remote_code": self.remote_code, **safetensors}


NO_TRUST = Trust()


def add_trust_options(parser: argparse.ArgumentParser) -> None:
    """The options that `trust_of` reads."""
    parser.add_argument(
        "--allow-pickle", action="store_true", help="take weights that are not safetensors: pickles can run code"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def trust_of(arguments: argparse.Namespace) -> Trust:
    return Trust(allow_pickle=arguments.allow_pickle, remote_code=arguments.trust_remote_code)


def is_model(folder: Path) -> bool:
    """A model, or an adapter, with which transformers loads the model that it names."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def find_models(folder: Path) -> list[tuple[int | None, Path]]:
    """(step, model folder) of each model to evaluate: a run's in order of steps, or the one model with step None.

    What is no folder, and could be a name on the hub, is one.
    """
    if not (folder / "metrics.jsonl").is_file() or not (folder / "exports").is_dir():
        if not (is_model(folder) or (not folder.exists() and HUB_NAME.fullmatch(str(folder)))):
            raise UnusableInput(
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
        raise UnusableInput(f"{folder} holds no exported model yet; set train.export_every or let the run finish")
    return sorted(models.items())


def check_suites(names: list[str]) -> list[str]:
    """The names without repetition; raises UnusableInput for one that does not exist."""
    for name in names:
        if name not in SUITES:
            nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
            raise UnusableInput(f"unknown suite {name!r}; the nearest is {nearest!r} (suites: {', '.join(SUITES)})")
    return list(dict.fromkeys(names))


def load(
    folder: Path, ds_config: dict[str, Any] | None = None, trust: Trust = NO_TRUST
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in the dtype it was saved in, on the GPU if there is one, and its tokenizer.

    With `ds_config` the model is loaded sharded over the ranks and its forward passes gather it, layer by layer.

    Raises:
        UnusableInput: it cannot be loaded, or only with what `trust` does not allow.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    from pipeline.weights import WrongWeights, load_whole

    release_memory()
    logging.disable_progress_bar()  # a run has many models; each suite shows its own progress
    try:
        if find_adapter_config_file(str(folder)):
            # Else transformers takes a pickled adapter from the hub, whatever `use_safetensors` says.
            cached_file(str(folder), "adapter_model.safetensors")
        else:  # before the tokenizer, which warns of a configuration that it does not know
            AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
        if ds_config is not None:
            return load_sharded(folder, ds_config, trust), tokenizer
        model: Any = load_whole(folder, dtype="auto", **trust.options())
    except WrongWeights as error:
        raise UnusableInput(str(error)) from None
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise refusal(folder, error, trust) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def refusal(folder: Path, error: Exception, trust: Trust) -> UnusableInput:
    """What to raise where transformers does not load the model in `folder`, with the option that would help."""
    from pipeline.weights import missing_package

    reason = missing_package(folder) or str(error).splitlines()[0]
    if not trust.remote_code and "trust_remote_code" in str(error):
        return UnusableInput(
            f"the model in {folder} comes with code of its own, which runs only with --trust-remote-code; read it first"
        )
    if "adapter_model.safetensors" in reason:
        return UnusableInput(f"the adapter in {folder} has no adapter_model.safetensors, and no other file is read")
    if not trust.allow_pickle and "safetensors" in reason:
        reason += "; if you trust its other files, which can run code, give --allow-pickle"
    if not folder.exists():
        return UnusableInput(f"--model {folder} is no folder, and the hub does not give it: {reason}")
    return UnusableInput(f"cannot load the model in {folder}: {reason}; else export it again")


def check_trust(folder: Path, trust: Trust) -> None:
    """Raises UnusableInput where `load` would need what `trust` does not allow; reads no weights."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
        if not trust.allow_pickle and not any(folder.glob("*.safetensors")):
            raise OSError("it has no file *.safetensors")
    except (OSError, ValueError, ImportError) as error:
        raise refusal(folder, error, trust) from error


def load_sharded(folder: Path, ds_config: dict[str, Any], trust: Trust) -> "PreTrainedModel":
    """The model under ZeRO-3 without an optimizer; OSError or ValueError where it cannot be loaded."""
    import deepspeed
    from transformers import AutoConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from pipeline.weights import load_whole

    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            "an adapter cannot be loaded sharded; export it with model.lora.merge, or leave --ds-config out"
        )
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    dtype = str(shape.dtype).removeprefix("torch.")
    zero = {key: value for key, value in ds_config["zero_optimization"].items() if key != "offload_optimizer"}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it, also where nothing trains
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles an all-reduce, not used here
    zero3 = HfDeepSpeedConfig(config)  # while it lives, from_pretrained loads under deepspeed.zero.Init
    model: Any = load_whole(folder, dtype="auto", **trust.options())
    model.zero3 = zero3  # and generate() goes on until the last rank's answers end
    deepspeed.initialize(model=model, config=config)  # hooks its modules
    return model


def read_ds_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed file, of which `zero_optimization` is used; raises UnusableInput unless that is stage 3."""
    config = read_json(path)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise UnusableInput(
            f"--ds-config {path}: zero_optimization.stage must be 3, which alone shards a model's weights"
        )
    return config


def evaluate_all(
    models: list[tuple[int | None, Path]],
    suites: dict[str, tuple[ModuleType, Any]],
    batch_size: int,
    ds_config: dict[str, Any] | None,
    trust: Trust,
) -> tuple[list[dict[str, Any]], str]:
    """One {"step", "model", "suites"} per model, and the dtype of the last one; a suite is (module, its probes)."""

    def evaluate(folder: Path) -> tuple[dict[str, Any], str]:  # a scope of its own: no model outlives it
        with ranks.together():
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


def release_memory() -> None:
    """Give back the memory of models that are no longer used; a sharded one must not be in the middle of a forward.

    DeepSpeed 0.19 holds every model that it ever sharded in two places of a process: a list that keeps the outermost
    module, and a cache of a method with the module among its keys.
    """
    import torch

    if (offload := sys.modules.get("deepspeed.runtime.zero.parameter_offload")) is not None:
        offload.FWD_MODULE_STACK.clear()
        coordinator = "deepspeed.runtime.zero.partitioned_param_coordinator"
        for cached in gc.get_objects():
            if type(cached) is functools._lru_cache_wrapper and cached.__module__ == coordinator:
                cached.cache_clear()
    gc.collect()  # models hold themselves in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        raise UnusableInput(f"--batch-size {arguments.batch_size}: give 1 or more")
    if arguments.output.is_dir():
        raise UnusableInput(f"--output {arguments.output} is a folder; name a file")
    names = check_suites(arguments.suite)
    if arguments.shots is not None and "mmlu" not in names:
        raise UnusableInput("--shots is of suite mmlu alone; leave it out")
    if arguments.forget_set is not None and ("tofu" not in names or arguments.data is not None):
        raise UnusableInput("--forget-set is of suite tofu from the hub alone; --data has the forget set that it has")
    shots = MMLU_SHOTS if arguments.shots is None else arguments.shots
    if shots < 0:
        raise UnusableInput(f"--shots {shots}: give 0 or more")
    ds_config = None if arguments.ds_config is None else read_ds_config(arguments.ds_config)
    ranks.start(sharded=ds_config is not None)
    with ranks.together():
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
    if "eval.harness" in (SUITES[name] for name in names):
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
