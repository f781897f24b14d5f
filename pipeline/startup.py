"""The parts of `trainer.setup`: data, engine, combiner, run folder; each refuses what it cannot use."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import deepspeed
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.deepspeed import DeepSpeedDict, blaming_the_file, refuse_what_deepspeed_refuses
from pipeline.config.load import to_yaml
from pipeline.config.objectives import NEEDS
from pipeline.config.rules import READERS, combines_tasks
from pipeline.config.run_folder import check_output_dir
from pipeline.config.schema import RunConfig
from pipeline.data.batches import BatchSampler
from pipeline.data.corpus import read_heldout
from pipeline.data.packing import choose_packing
from pipeline.data.probes import ProbeSet, read_sets, source_digests
from pipeline.distributed.errors import local_main_first, raise_on_all_ranks
from pipeline.distributed.run_lock import RunLock
from pipeline.distributed.slow_work import slow_work
from pipeline.errors import disk_errors
from pipeline.files import Json, write_whole
from pipeline.losses.joint import check_separation
from pipeline.losses.task import open_sampler, warn_of_overlap
from pipeline.modeling.checks import (
    check_layer,
    check_max_length,
    check_router_loss,
    check_tokens,
    check_writing,
    load_tokenizer,
    num_parameters,
)
from pipeline.modeling.digests import Digest
from pipeline.modeling.export import export
from pipeline.modeling.outputs import ModelEngine, install_outputs
from pipeline.modeling.row_rules import install_rules
from pipeline.monitoring import console
from pipeline.optim import fitting_lr, make_optimizer, make_schedule
from pipeline.synthesis.combine import Synthesis
from pipeline.synthesis.confine import Confinement
from pipeline.synthesis.rules import Options
from pipeline.zero import checkpoint
from pipeline.zero.combiner import GradientCombiner
from pipeline.zero.joint import JointPass, TaskRows
from pipeline.zero.parameters import whole_shape
from pipeline.zero.sizes import disk_use, in_units, sums_locally

HELDOUT = "heldout.jsonl"  # in a run folder, for suite corpus
WEIGHTS = ".weights.json"  # in a run folder: digests of the model's files, so that a resumed run need not read them


@dataclass
class Run:
    """What a run is, and where it is written."""

    config: RunConfig
    folder: Path
    lock: RunLock
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, str]  # digests of the model and of the tokenizer
    corpora: dict[str, str]  # digests of the corpora, by task
    fingerprint: Json  # what decides the weights; a checkpoint of another run is refused
    steps: int
    start: int  # steps that were done before this process
    saves_on_sigterm: bool
    began: float  # time.perf_counter() when the process began to set up

    def export(self, target: Path, card: str | None = None) -> None:
        export(self.model, self.tokenizer, target, self.config.model.lora, card)


def choose(config: RunConfig) -> RunConfig:
    """The configuration with the packing and the learning rate that fit data and model, where it leaves them open.

    The first rank of each machine reads a corpus first, so that the others find it in the hub's cache.

    Raises:
        InputError: data or model cannot be read.
    """
    data, wanted = config.data, config.optimizer
    if data.packing == "auto":
        corpora = {task: getattr(data, task) for task in config.tasks}
        packing, reason = local_main_first(
            lambda: choose_packing(corpora, load_tokenizer(config.model), data.max_length)
        )
        console.logger.info("data.packing: %s, because %s", packing, reason)
        config = config.model_copy(update={"data": data.model_copy(update={"packing": packing})})
    if wanted.lr is None:
        with raise_on_all_ranks():
            size, adapters = num_parameters(config.model), config.model.lora is not None
        lr = fitting_lr(size, adapters)
        kind = "low-rank adapters of a model" if adapters else "a model"
        console.logger.info("optimizer.lr: %g, which suits %s of %.3g million parameters", lr, kind, size / 1e6)
        config = config.model_copy(update={"optimizer": wanted.model_copy(update={"lr": lr})})
    return config


def open_data(config: RunConfig, zero: DeepSpeedDict) -> tuple[PreTrainedTokenizerBase, dict[str, BatchSampler]]:
    """The tokenizer, and a sampler for each task; refuses what the model cannot read before its weights are loaded."""
    with raise_on_all_ranks():
        refuse_what_deepspeed_refuses(config, zero)
        tokenizer = load_tokenizer(config.model)
        check_writing(tokenizer.save_pretrained, "tokenizer", config.model.path)
        if any(NEEDS[getattr(config.objective, task)].hidden for task in config.tasks):
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
            key = f"probes.{found.name}" if found.name in config.data.probes else found.name
            check_tokens(config.model, key, largest, tokenizer)
    return sets


def make_engine(config: RunConfig, zero: DeepSpeedDict, model: PreTrainedModel, steps: int) -> ModelEngine:
    """The DeepSpeed engine around `model`, whose forward pass returns what objectives ask for."""
    with console.capture_stdout(), blaming_the_file(config):
        made = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(config, model, zero),  # pyright: ignore[reportArgumentType]
            lr_scheduler=lambda optimizer: make_schedule(config, optimizer, steps),  # pyright: ignore[reportArgumentType]
            config=zero,
        )
    engine = cast(ModelEngine, made[0])
    install_outputs(engine)
    return engine


def make_combiner(config: RunConfig, engine: ModelEngine) -> GradientCombiner:
    wanted = config.synthesis
    options = Options(seed=config.seed, **{key: x for key in READERS if (x := getattr(wanted, key)) is not None})
    scaled = (wanted.alpha, wanted.gamma, wanted.zero_forget)
    synthesis = Synthesis(wanted.rule, wanted.scope, *scaled, options, wanted.metric)
    place, combines = wanted.stash_device, combines_tasks(config)
    confinement = None
    if (confine := wanted.confine) is not None:
        confinement = Confinement(confine.share, confine.by, confine.new_share)
    combiner = GradientCombiner(
        engine,
        synthesis,
        combine_tasks=combines,
        stash_device=place,
        measure_update=wanted.update_geometry,
        confinement=confinement,
    )
    elements = sum(whole_shape(parameter).numel() for parameter in engine.module.parameters())
    bucket, trained = int(engine.zero_reduce_bucket_size()), sum(combiner.sizes)
    if sums_locally(trained, elements, bucket, micro_batches(config, engine)):
        combiner.store.sum_locally()
    return combiner


def micro_batches(config: RunConfig, engine: ModelEngine) -> int:
    """Of a task, on each rank and in each step."""
    return config.train.batch_size // (config.train.micro_batch_size * engine.world_size)


def prepare_rows(config: RunConfig, model: PreTrainedModel) -> TaskRows | None:
    """Under `train.schedule: joint`, what its passes need of the model, before an engine is made of it.

    Raises:
        InputError: a module owns trained parameters and cannot separate the rows of two tasks.
    """
    if config.train.schedule == "sequential":
        return None
    rows = TaskRows()
    if combines_tasks(config):
        with raise_on_all_ranks():
            install_rules(model, rows)
    return rows


def make_joint(
    config: RunConfig, engine: ModelEngine, combiner: GradientCombiner, rows: TaskRows | None
) -> JointPass | None:
    """The joint passes of the run, once the model was seen to separate two gradients; None where `rows` is.

    Raises:
        InputError: it does not.
    """
    if rows is None:
        return None
    joint = JointPass(combiner, rows, micro_batches(config, engine))
    check_separation(engine, joint)
    return joint


def log_disk_use(config: RunConfig, zero: DeepSpeedDict, model: PreTrainedModel, steps: int) -> None:
    """Log what the run is going to write, if that is a gigabyte or more, or more than the disk has left."""
    parameters = list(model.parameters())
    elements, trained = (
        sum(whole_shape(p).numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad])
    )
    stage, itemsize = zero["zero_optimization"].get("stage", 0), parameters[0].element_size()
    use, folder = disk_use(config, stage, elements, trained, itemsize, steps), Path(config.output)
    left = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if use.peak > left:
        remedy = "make room, or lower train.keep_checkpoints or set a larger train.export_every"
        console.logger.warning("disk of %s: %s; %s are free: %s", folder, use, in_units(left), remedy)
    elif use.peak >= 1e9:
        console.logger.info("disk of %s: %s; %s are free", folder, use, in_units(left))


def take_folder(lock: RunLock, config: RunConfig, resume: bool) -> None:
    """Make and lock the run folder for all ranks of this run, once it is still as it was at the start.

    Raises:
        InputError: another run has it, or has come and gone while this one was loading.
        FatalError: the disk cannot be written.
    """
    file = lock.folder / "config.yaml"
    with raise_on_all_ranks(), disk_errors(file):
        if dist.get_rank() == 0:
            lock.take()
            check_output_dir(config, resume)
            lock.share()
    with raise_on_all_ranks(), disk_errors(file):  # the others only now: while the first has it alone, they are refused
        if dist.get_rank() != 0:
            lock.share()


def write_run_files(config: RunConfig, digests: dict[str, str], weights: dict[str, Digest]) -> None:
    """`config.yaml` and what goes beside it, by the first rank; then `log.txt` of all ranks.

    Raises:
        InputError: the corpus with held-out documents can no longer be read.
    """
    folder = Path(config.output)
    with raise_on_all_ranks(), slow_work(), disk_errors(folder / "config.yaml"):
        if dist.get_rank() == 0:
            checkpoint.tidy(folder, config.train.keep_checkpoints)
            write_whole(folder / WEIGHTS, json.dumps(weights))
            written = heldout_rows(config) | {"digests.json": json.dumps(digests, indent=1) + "\n"}
            written["config.yaml"] = to_yaml(config)  # the last: it makes the folder a run
            for name, text in written.items():
                write_whole(folder / name, text)
    with raise_on_all_ranks(), disk_errors(folder / "log.txt"):
        console.open_log(folder, dist.get_rank())


def heldout_rows(config: RunConfig) -> dict[str, str]:
    """The name and text of the file of documents that training does not see; nothing without `data.retain.heldout`."""
    retain = config.data.retain
    if retain is None or not retain.heldout or "retain" not in config.tasks:
        return {}
    rows = [
        {"text": row.texts[0]} if row.prompt is None else {"prompt": row.prompt, "response": row.texts[0]}
        for row in read_heldout(retain, "retain")
    ]
    console.logger.info("%d documents of data.retain are held out for evaluation, in %s", len(rows), HELDOUT)
    return {HELDOUT: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}


def content_digests(identity: dict[str, str], corpora: dict[str, str], settings: str) -> dict[str, str]:
    """`digests.json`, by which reports group runs: the content behind each path of `config.yaml`, and the tokenizer."""
    data = {f"data.{task}.path": digest for task, digest in corpora.items()}
    model = {"model.path": identity["model"], "tokenizer": identity["tokenizer"]}
    return {**model, **data, "train.deepspeed": settings}


def probe_digests(config: RunConfig, sets: list[ProbeSet]) -> dict[str, str]:
    """The rows of each set of probes in `digests.json`: reports refuse to compare runs that differ there."""
    return {f"data.probes.{name}.path": digest for name, digest in source_digests(config, sets).items()}


def hyperparameters(config: RunConfig, steps: int, scope: str) -> dict[str, str | float]:
    """What tells runs apart in a table: flat, and never absent."""
    objective, synthesis, lr = config.objective, config.synthesis, config.optimizer.lr
    assert lr is not None, "`choose` decides it"
    return {
        "method": config.method or "",
        "forget": objective.forget,
        "retain": objective.retain,
        "rule": synthesis.rule,
        "scope": scope,
        "alpha": synthesis.alpha,
        "gamma": synthesis.gamma,
        "beta": objective.beta,
        "lr": lr,
        "schedule": config.optimizer.schedule,
        "batch_size": config.train.batch_size,
        "steps": steps,
        "lora_rank": config.model.lora.r if config.model.lora else 0,
        "seed": config.seed,
        "model": config.model.path,
    }
