"""The training loop: Algorithm 1 of the paper on shards, and everything around a step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.deepspeed import (
    blaming_the_file,
    refuse_what_deepspeed_refuses,
)
from pipeline.config.load import to_yaml
from pipeline.config.run_folder import check_output_dir, content_digest, run_fingerprint
from pipeline.config.schema import RunConfig
from pipeline.distributed.environment import world_from_environment
from pipeline.optim import make_optimizer, make_schedule

if TYPE_CHECKING:
    from pipeline.distributed.run_lock import RunLock
    from pipeline.losses.task import Task
    from pipeline.monitoring.metrics import Monitor
    from pipeline.zero.combiner import GradientCombiner


def train_step(engine: Any, shards: GradientCombiner, tasks: Sequence[Task], step: int, monitor: Monitor) -> bool:
    """Algorithm 1 of the paper, lines 3 to 7, on shards. Returns whether the update was applied."""
    start, lr = time.perf_counter(), engine.get_lr()[0]
    shards.clear()
    for task in tasks:  # forget, then retain: one activation graph alive at a time
        num_terms, total = max(task.loss_denominator(step), 1), 0.0
        # DeepSpeed averages over ranks; the loss is a mean over the global batch, so the world size goes back in.
        scale = shards.weight(task.name) * engine.world_size / num_terms
        for batch in task.sampler.batches(step):
            terms = task.loss_terms(engine, batch.to(engine.device))
            engine.backward(terms * scale, scale_wrt_gas=False)
            total = total + terms.detach().double()
        shards.take(task.name)
        monitor.record(f"{task.name}_loss", total / num_terms, reduce="sum")
    geometry = shards.combine()
    applied = False
    if shards.ready:  # else no rank steps: a non-finite gradient never reaches the optimizer
        engine.step()  # DeepSpeed's own clip, optimizer and schedule see the combined gradient
        applied = engine.was_step_applied()
    record_step(monitor, engine, shards, tasks, step, lr, time.perf_counter() - start, geometry, applied)
    return applied


GEOMETRY = (
    *("cos_forget_retain", "cos_combined_forget", "cos_combined_retain", "conflict_fraction"),
    *("forget_norm", "retain_norm", "combined_norm"),
)


def record_step(
    monitor: Monitor,
    engine: Any,
    shards: GradientCombiner,
    tasks: Sequence[Task],
    step: int,
    lr: float,
    seconds: float,
    geometry: Any,
    applied: bool,
) -> None:
    """The numbers of one step, as `metrics.jsonl` and TensorBoard name them."""
    from pipeline.monitoring.metrics import peak_memory_bytes

    for name in ("forget_loss", "retain_loss"):
        if not any(name.startswith(task.name) for task in tasks):
            monitor.record(name, None)
    measured = asdict(geometry) if geometry is not None else {}
    for name in GEOMETRY:
        monitor.record(name, measured.get(name))
    monitor.record("grad_norm", float(engine.get_global_grad_norm()) if applied else None)
    monitor.record("lr", lr)
    monitor.record("skipped", 0 if applied else 1)
    monitor.record("seconds", seconds, reduce="max")
    tokens = sum(task.sampler.loss_denominator(step, "position") for task in tasks)
    monitor.record("tokens_per_second", tokens / seconds)
    monitor.record("peak_memory_bytes", peak_memory_bytes(engine.device), reduce="max")


def record_layers(monitor: Monitor, shards: GradientCombiner) -> None:
    """The same geometry layer by layer, as `cos_forget_retain/model.layers.3`."""
    for layer, geometry in shards.by_layer().items():
        for name in GEOMETRY:
            monitor.record(f"{name}/{layer}", getattr(geometry, name))


WEIGHTS = ".weights.json"  # in a run folder: digests of the model's files, so that a resumption need not read them


def run(config: RunConfig, zero: dict[str, Any], resume: bool = False, quiet: bool = False) -> None:
    """Everything after the configuration: read, load, train, export. Resuming a finished run does nothing.

    Raises:
        InputError: unusable data, model or checkpoint (before anything is written).
        Stopped: SIGTERM, after a checkpoint.
        ranks.Failure: a disk that is full or refuses to be written.
        RuntimeError: too many non-finite steps in a row.
    """
    import deepspeed
    import torch.distributed as dist

    from pipeline.data.tokenize import tokenizer_digest
    from pipeline.distributed import process_group
    from pipeline.distributed.errors import local_main_first, raise_on_all_ranks
    from pipeline.distributed.run_lock import RunLock
    from pipeline.distributed.signals import Preempted, stop_on_sigterm
    from pipeline.errors import disk_errors
    from pipeline.losses.task import make_tasks, num_steps, open_sampler, warn_of_overlap
    from pipeline.modeling import export as models_export
    from pipeline.modeling import load
    from pipeline.modeling.card import model_card
    from pipeline.modeling.checks import check_layer, check_max_length, check_router_loss, check_tokens, load_tokenizer
    from pipeline.modeling.digests import fingerprint, weight_digests
    from pipeline.modeling.outputs import install_outputs
    from pipeline.monitoring import console
    from pipeline.monitoring import trackers as outlets
    from pipeline.monitoring.metrics import Monitor
    from pipeline.synthesis.combine import Synthesis
    from pipeline.zero import checkpoint
    from pipeline.zero.combiner import GradientCombiner
    from pipeline.zero.nvme import check_nvme_path

    folder, began = Path(config.output), time.perf_counter()
    keys, settings = (
        run_fingerprint(config, zero),
        content_digest(zero),
    )  # before DeepSpeed and the trackers write there
    console.setup_logging(world_from_environment()[0], quiet)
    process_group.start(config.train.timeout_minutes)
    if (folder / "final").exists():
        console.logger.info("%s is complete: nothing to resume", folder)
        return
    lock = RunLock(folder)
    with disk_errors(folder / "config.yaml"), raise_on_all_ranks():
        if resume and dist.get_rank() == 0 and (folder / "config.yaml").exists():
            lock.take()
    with raise_on_all_ranks():
        refuse_what_deepspeed_refuses(config, zero)
        tokenizer = load_tokenizer(config.model)
        if {"rmu", "embed_diff"} & {config.objective.forget, config.objective.retain}:
            check_layer(config.model, config.objective.layer)
        if "retain" in config.tasks:
            check_router_loss(config.model)
    streams = {task: open_sampler(config, task, tokenizer) for task in config.tasks}
    if dist.get_rank() == 0:
        warn_of_overlap(streams)
    with raise_on_all_ranks():
        check_max_length(config.model, max(stream.longest for stream in streams.values()))
        for task, stream in streams.items() if dist.get_rank() == 0 else ():  # reads all tokens
            check_tokens(config.model, task, stream.largest, tokenizer)
    steps = num_steps(config, streams)
    offload = zero.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        local_main_first(lambda: check_nvme_path(Path(offload["nvme_path"])))
    with raise_on_all_ranks(), blaming_the_file(config):
        model = load.load_model(config.model, zero, config.seed)
    weights = weight_digests(model, folder / WEIGHTS)
    origin = fingerprint(model, weights)
    if resume:
        outlets.resume_trackers(folder, zero)
    with console.capture_stdout(), blaming_the_file(config):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(config, model, zero),  # pyright: ignore[reportArgumentType]
            lr_scheduler=lambda optimizer: make_schedule(config, optimizer, steps),
            config=zero,
        )
    install_outputs(engine)
    wanted = config.synthesis
    synthesis = Synthesis(wanted.rule, wanted.scope, wanted.alpha, wanted.gamma, wanted.zero_forget)
    combine_tasks = len(config.tasks) == 2 and (wanted.rule != "sum" or wanted.geometry)
    shards = GradientCombiner(engine, synthesis, combine_tasks=combine_tasks, stash_device=wanted.stash_device)
    identity = {"model": origin, "tokenizer": tokenizer_digest(tokenizer)}
    tasks = make_tasks(config, streams, steps, engine, identity)

    corpora = {task: stream.sequences.digest for task, stream in streams.items()}
    texts = {f"data.{task}": digest for task, digest in corpora.items()}
    decisive = {**keys, **identity, **texts, "steps": steps}
    take_folder(lock, config, resume)
    start, last = 0, checkpoint.newest(folder) if resume else None
    if last is not None:
        start = checkpoint.load(engine, shards, last, decisive)
    if dist.get_rank() == 0:
        with disk_errors(folder / "config.yaml"):
            checkpoint.tidy(folder, config.train.keep_checkpoints)
            written = {"digests.json": json.dumps(content_digests(identity, corpora, settings), indent=1) + "\n"}
            for name, text in {**written, "config.yaml": to_yaml(config)}.items():  # the last one makes it a run
                unfinished = folder / f".{name}"
                unfinished.write_text(text, encoding="utf-8")
                os.replace(unfinished, folder / name)
            (folder / WEIGHTS).write_text(json.dumps(weights), encoding="utf-8")
    dist.barrier()
    with disk_errors(folder / "log.txt"):
        console.open_log(folder, dist.get_rank())
    monitor = Monitor(folder, engine, start=start, steps=steps)
    monitor.describe(to_yaml(config), hyperparameters(config, steps, synthesis.resolved_scope))

    def export(target: Path, card: str | None = None) -> None:
        with disk_errors(target, target.with_name(f".{target.name}.unfinished")):
            models_export.export(model, tokenizer, target, config.model.lora, card)

    # What is offloaded to nvme cannot be saved: there, SIGTERM ends the process as it always does.
    stop = None if offload.get("device") == "nvme" else stop_on_sigterm()
    for step in range(start, steps):
        applied = train_step(engine, shards, tasks, step, monitor)
        if wanted.layer_geometry_every and (step + 1) % wanted.layer_geometry_every == 0:
            record_layers(monitor, shards)
        monitor.record("_stop", float(stop is not None and stop.is_set()), reduce="max")  # one rank's is all ranks'
        monitor.record("_skipped_before", float(monitor.skipped_in_a_row), reduce="max")  # the first rank's
        agreed = monitor.flush(step + 1)
        asked = agreed["_stop"] and step + 1 < steps
        skipped_in_a_row = 0 if applied else int(agreed["_skipped_before"]) + 1
        if skipped_in_a_row >= min(config.train.max_skipped, steps):
            raise RuntimeError(
                f"{skipped_in_a_row} steps in a row had a non-finite gradient (step {step + 1}); "
                "lower optimizer.lr, or set optimizer.max_grad_norm, or use an objective that is bounded (npo, simnpo)"
            )
        # The export first: a kill in it then leaves a checkpoint from which it is made again.
        if config.train.export_every and (step + 1) % config.train.export_every == 0:
            export(folder / "exports" / f"step-{step + 1:06d}")
        if asked or (config.train.checkpoint_every and (step + 1) % config.train.checkpoint_every == 0):
            monitor.sync()
            keep = config.train.keep_checkpoints
            checkpoint.save(engine, shards, folder, step + 1, keep=keep, identity=decisive)
        if asked:
            raise Preempted(f"stopped by SIGTERM after step {step + 1} of {steps}; --resume goes on from there")
    card = model_card(to_yaml(config), config.model.path, origin, corpora, monitor.last)
    monitor.finish(card)
    export(folder / "final", card)
    monitor.summarise(time.perf_counter() - began)
    lock.release()


def take_folder(lock: RunLock, config: RunConfig, resume: bool) -> None:
    """The run folder for all ranks of this run: made, locked, and still as it was when the run was let in.

    Raises:
        InputError: another run has it, or has come and gone while this one was loading.
        ranks.Failure: the disk does not take it.
    """
    import torch.distributed as dist

    from pipeline.distributed.errors import raise_on_all_ranks
    from pipeline.errors import disk_errors

    with disk_errors(lock.folder / "config.yaml"):
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                lock.take()
                check_output_dir(config, resume)
                lock.share()
        with raise_on_all_ranks():  # the others only now: while the first has it alone, they would be refused
            if dist.get_rank() != 0:
                lock.share()


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


def content_digests(identity: dict[str, str], corpora: dict[str, str], settings: str) -> dict[str, str]:
    """`digests.json`, by which reports group runs: of what keys of `config.yaml` name by path, and of the tokenizer."""
    data = {f"data.{task}.path": digest for task, digest in corpora.items()}
    model = {"model.path": identity["model"], "tokenizer": identity["tokenizer"]}
    return {**model, **data, "train.deepspeed": settings}
