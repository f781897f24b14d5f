"""The parts of `trainer.setup`: data, engine, combiner, run folder; each refuses what it cannot use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.deepspeed import blaming_the_file, refuse_what_deepspeed_refuses
from pipeline.config.load import to_yaml
from pipeline.config.run_folder import check_output_dir
from pipeline.config.schema import RunConfig
from pipeline.data.batches import BatchSampler
from pipeline.data.probes import ProbeSet, read_sets
from pipeline.distributed.errors import local_main_first, raise_on_all_ranks
from pipeline.distributed.run_lock import RunLock
from pipeline.errors import disk_errors
from pipeline.losses.task import open_sampler, warn_of_overlap
from pipeline.modeling.checks import check_layer, check_max_length, check_router_loss, check_tokens, load_tokenizer
from pipeline.modeling.outputs import install_outputs
from pipeline.monitoring import console
from pipeline.optim import make_optimizer, make_schedule
from pipeline.synthesis.combine import Synthesis
from pipeline.zero import checkpoint
from pipeline.zero.combiner import GradientCombiner
from pipeline.zero.engine import Engine

WEIGHTS = ".weights.json"  # in a run folder: digests of the model's files, so that a resumed run need not read them


def open_data(config: RunConfig, zero: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, dict[str, BatchSampler]]:
    """The tokenizer, and a sampler for each task; refuses what the model cannot read before its weights are loaded."""
    with raise_on_all_ranks():
        refuse_what_deepspeed_refuses(config, zero)
        tokenizer = load_tokenizer(config.model)
        if {"rmu", "embed_diff"} & {config.objective.forget, config.objective.retain}:
            check_layer(config.model, config.objective.layer)
        if "retain" in config.tasks:
            check_router_loss(config.model)
    samplers = {task: open_sampler(config, task, tokenizer) for task in config.tasks}
    if dist.get_rank() == 0:
        warn_of_overlap(samplers)
    with raise_on_all_ranks():
        check_max_length(config.model, max(sampler.longest for sampler in samplers.values()))
        for task, sampler in samplers.items() if dist.get_rank() == 0 else ():  # reads all tokens
            check_tokens(config.model, task, sampler.largest, tokenizer)
    return tokenizer, samplers


def open_probes(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[ProbeSet]:
    """The sets that probes measure, none if there are none to be; refuses what the model cannot read."""
    if not (config.train.probe_every or config.data.probes):
        return []
    sets = local_main_first(lambda: read_sets(config, tokenizer))
    with raise_on_all_ranks():
        for found in sets:
            check_max_length(config.model, max(len(ids) for ids, _ in found.sequences))
            largest = max(max(ids) for ids, _ in found.sequences)
            check_tokens(config.model, f"probes.{found.name}", largest, tokenizer)
    return sets


def make_engine(config: RunConfig, zero: dict[str, Any], model: PreTrainedModel, steps: int) -> Engine:
    """The DeepSpeed engine around `model`, whose forward pass returns what objectives ask for."""
    with console.capture_stdout(), blaming_the_file(config):
        engine: Any = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(config, model, zero),  # pyright: ignore[reportArgumentType]
            lr_scheduler=lambda optimizer: make_schedule(config, optimizer, steps),
            config=zero,
        )[0]
    install_outputs(engine)
    return engine


def make_combiner(config: RunConfig, engine: Engine) -> GradientCombiner:
    wanted = config.synthesis
    synthesis = Synthesis(wanted.rule, wanted.scope, wanted.alpha, wanted.gamma, wanted.zero_forget)
    combine_tasks = len(config.tasks) == 2 and (wanted.rule != "sum" or wanted.geometry)
    return GradientCombiner(engine, synthesis, combine_tasks=combine_tasks, stash_device=wanted.stash_device)


def take_folder(lock: RunLock, config: RunConfig, resume: bool) -> None:
    """Make and lock the run folder for all ranks of this run, once it is still as it was at the start.

    Raises:
        InputError: another run has it, or has come and gone while this one was loading.
        FatalError: the disk cannot be written.
    """
    with disk_errors(lock.folder / "config.yaml"):
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                lock.take()
                check_output_dir(config, resume)
                lock.share()
        with raise_on_all_ranks():  # the others only now: while the first has it alone, they would be refused
            if dist.get_rank() != 0:
                lock.share()


def write_run_files(config: RunConfig, digests: dict[str, str], weights: Any) -> None:
    """`config.yaml` and what goes beside it, by the first rank; then `log.txt` of all ranks."""
    folder = Path(config.output)
    if dist.get_rank() == 0:
        with disk_errors(folder / "config.yaml"):
            checkpoint.tidy(folder, config.train.keep_checkpoints)
            written = {"digests.json": json.dumps(digests, indent=1) + "\n", "config.yaml": to_yaml(config)}
            for name, text in written.items():  # config.yaml comes last: it makes the folder a run
                unfinished = folder / f".{name}"
                unfinished.write_text(text, encoding="utf-8")
                os.replace(unfinished, folder / name)
            (folder / WEIGHTS).write_text(json.dumps(weights), encoding="utf-8")
    dist.barrier()
    with disk_errors(folder / "log.txt"):
        console.open_log(folder, dist.get_rank())


def content_digests(identity: dict[str, str], corpora: dict[str, str], settings: str) -> dict[str, str]:
    """`digests.json`, by which reports group runs: the content behind each path of `config.yaml`, and the tokenizer."""
    data = {f"data.{task}.path": digest for task, digest in corpora.items()}
    model = {"model.path": identity["model"], "tokenizer": identity["tokenizer"]}
    return {**model, **data, "train.deepspeed": settings}


def hyperparameters(config: RunConfig, steps: int, scope: str) -> dict[str, str | float]:
    """What tells runs apart in a table: flat, and never absent."""
    objective, synthesis = config.objective, config.synthesis
    return {
        "method": config.method or "",
        "forget": objective.forget,
        "retain": objective.retain,
        "rule": synthesis.rule,
        "scope": scope,
        "alpha": synthesis.alpha,
        "gamma": synthesis.gamma,
        "beta": objective.beta,
        "lr": config.optimizer.lr,
        "schedule": config.optimizer.schedule,
        "batch_size": config.train.batch_size,
        "steps": steps,
        "lora_rank": config.model.lora.r if config.model.lora else 0,
        "seed": config.seed,
        "model": config.model.path,
    }
