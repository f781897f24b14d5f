"""The training loop: Algorithm 1 of the paper on shards (`TrainStep`), everything around a step (`Trainer`), `setup`.

`run` is `setup` and `Trainer.fit`, which is what the command does (pipeline/train.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.deepspeed import DeepSpeedDict, blaming_the_file
from pipeline.config.load import to_yaml
from pipeline.config.run_folder import content_digest, run_fingerprint
from pipeline.config.schema import RunConfig
from pipeline.data.tokenize import tokenizer_digest
from pipeline.distributed import process_group
from pipeline.distributed.environment import world_from_environment
from pipeline.distributed.errors import local_main_first, raise_on_all_ranks
from pipeline.distributed.run_lock import RunLock
from pipeline.distributed.signals import Preempted, stop_on_sigterm
from pipeline.errors import FatalError, disk_errors
from pipeline.losses.dual import log_weight, move_weight
from pipeline.losses.joint import accumulate_jointly
from pipeline.losses.known import warn_of_unknown
from pipeline.losses.task import Task, make_tasks, num_steps
from pipeline.modeling.card import card_or_warning
from pipeline.modeling.digests import fingerprint, weight_digests
from pipeline.modeling.load import load_model
from pipeline.modeling.outputs import ModelEngine
from pipeline.modeling.probes import Prober, Probes
from pipeline.monitoring import console, trackers
from pipeline.monitoring.geometry import record_geometry
from pipeline.monitoring.levels import Levels, probe_names
from pipeline.monitoring.metrics import Monitor, peak_memory_bytes
from pipeline.monitoring.verdicts import forgetting_failed
from pipeline.startup import (
    WEIGHTS,
    Run,
    choose,
    content_digests,
    hyperparameters,
    log_disk_use,
    make_combiner,
    make_engine,
    make_joint,
    open_data,
    open_probes,
    prepare_rows,
    probe_digests,
    take_folder,
    write_run_files,
)
from pipeline.synthesis.geometry import Geometry
from pipeline.zero import checkpoint
from pipeline.zero.combiner import GradientCombiner
from pipeline.zero.joint import JointPass
from pipeline.zero.nvme import check_nvme_path
from pipeline.zero.self_test import self_test
from pipeline.zero.update import update_sums


class StepResult(NamedTuple):
    """What one step came to."""

    losses: dict[str, Tensor | None]  # by task: 0-dim, this rank's part of the mean over the global batch
    geometry: Geometry | None  # None where the two gradients were added up without being compared
    applied: bool  # the optimizer updated the weights
    update: Tensor | None  # what it did along the retain gradient, `update_sums`; None: not known


@dataclass
class TrainStep:
    """Algorithm 1 of the paper, lines 3 to 7, on shards; a task that the run does not have is None."""

    engine: ModelEngine
    combiner: GradientCombiner
    forget: Task | None
    retain: Task | None
    joint: JointPass | None = field(default=None, kw_only=True)  # both tasks in one pass; None: one after the other

    def train_step(self, step: int) -> StepResult:
        self.combiner.clear()
        losses: dict[str, Tensor | None]
        if self.joint is not None:  # the forget gradient goes to the forget buffer by itself
            losses = accumulate_jointly(self.engine, self.joint, self.forget, self.retain, step)
        else:
            losses = {"forget": self.accumulate(self.forget, step)}
            self.combiner.stash_forget()
            losses["retain"] = self.accumulate(self.retain, step)
        combined = self.combiner.combine()
        applied = combined.should_step and self.optimizer_step()
        update = update_sums(self.combiner) if applied else None
        return StepResult(losses, combined.geometry, applied, update)

    def accumulate(self, task: Task | None, step: int) -> Tensor | None:
        """Forward and backward of all micro-batches of `task`; returns this rank's part of the mean loss."""
        if task is None:
            return None
        denominator = max(task.loss_denominator(step), 1)
        # DeepSpeed averages over ranks; the loss is a mean over the global batch, so the world size goes back in.
        scale = self.combiner.loss_weight(task.name) * self.engine.world_size / denominator
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for batch in task.sampler.batches(step):
            terms = task.loss_terms(self.engine, batch.to(self.engine.device))
            self.engine.backward(terms * scale, scale_wrt_gas=False)
            total += terms.detach()
        return total / denominator

    def optimizer_step(self) -> bool:
        """DeepSpeed's own clipping, optimizer and schedule see the combined gradient. Whether they applied it."""
        self.engine.step()
        return self.engine.was_step_applied()


@dataclass
class Trainer(TrainStep):
    """A run that is set up: `fit` trains, logs, exports and saves."""

    run: Run
    metrics: Monitor
    probes: Probes

    def fit(self) -> None:
        """Train to the end, then export the model.

        Raises:
            Preempted: SIGTERM, after a checkpoint.
            FatalError: a disk that is full or cannot be written.
            RuntimeError: too many non-finite steps in a row.
        """
        # DeepSpeed cannot save what it offloads to nvme: there, SIGTERM ends the process as it always does.
        sigterm = stop_on_sigterm() if self.run.saves_on_sigterm else None
        self.probes.begin(self.run.start)
        for step in range(self.run.start, self.run.steps):
            if self.probes.is_over:
                break
            began, lr = time.perf_counter(), self.engine.get_lr()[0]
            result = self.train_step(step)
            self.record(step, result, lr, time.perf_counter() - began)
            self.probes.record(step + 1)
            self.record_layers(step + 1, result.update)
            self.metrics.record("_stop", float(sigterm is not None and sigterm.is_set()), reduce="max")
            self.metrics.record("_skipped_before", float(self.metrics.skipped_in_a_row), reduce="max")  # of rank 0
            log_weight(self.combiner, self.run.config.objective, self.metrics)
            agreed = self.metrics.flush(step + 1)
            retain_loss = agreed["retain_loss"] if result.applied else None
            move_weight(self.combiner, self.run.config.objective, step, retain_loss)
            self.check_skipped(step, 0 if result.applied else int(agreed["_skipped_before"]) + 1)
            preempted = bool(agreed["_stop"]) and step + 1 < self.run.steps and not self.probes.is_over
            self.save(step + 1, preempted)
            if preempted:
                raise Preempted(f"stopped by SIGTERM after step {step + 1} of {self.run.steps}; --resume continues it")
        self.finish()

    def record(self, step: int, result: StepResult, lr: float, seconds: float) -> None:
        """The numbers of one step, as `metrics.jsonl` and TensorBoard name them."""
        for name, loss in result.losses.items():
            self.metrics.record(f"{name}_loss", loss, reduce="none" if loss is None else "sum")
        record_geometry(self.metrics, result.geometry, result.update)
        if self.run.config.synthesis.confine is not None:
            self.metrics.record("share_updated", self.combiner.share_updated)
        norm = self.engine.get_global_grad_norm() if result.applied else None
        self.metrics.record("grad_norm", None if norm is None else float(norm))
        self.metrics.record("lr", lr)
        self.metrics.record("skipped", 0 if result.applied else 1)
        self.metrics.record("seconds", seconds, reduce="max")
        tokens = sum(task.sampler.loss_denominator(step, "position") for task in (self.forget, self.retain) if task)
        self.metrics.record("tokens_per_second", tokens / seconds)
        self.metrics.record("peak_memory_bytes", peak_memory_bytes(self.engine.device), reduce="max")

    def record_layers(self, done: int, update: Tensor | None) -> None:
        """The same geometry by layers, as `cos_forget_retain/model.layers.3`, at intervals and at the last step."""
        every = self.run.config.synthesis.layer_geometry_every
        is_last = done == self.run.steps or self.probes.is_over
        if not every or (done % every and not is_last):
            return
        rows = self.combiner.rows_by_layer()
        for layer, geometry in self.combiner.by_layer().items():
            record_geometry(self.metrics, geometry, None if update is None else update[rows[layer]], layer)

    def check_skipped(self, step: int, in_a_row: int) -> None:
        """Raises:
        RuntimeError: as many steps in a row as `train.max_skipped` had a non-finite gradient.
        """
        if in_a_row >= min(self.run.config.train.max_skipped, self.run.steps):
            raise RuntimeError(
                f"{in_a_row} steps in a row had a non-finite gradient (step {step + 1}); lower optimizer.lr, or set "
                "optimizer.max_grad_norm, or use an objective that is bounded (npo, simnpo)"
            )

    def save(self, done: int, preempted: bool) -> None:
        """Export and checkpoint where the intervals say so, after `done` steps."""
        settings, folder = self.run.config.train, self.run.folder
        # The export first: a kill in it then leaves a checkpoint from which it is made again.
        if self.probes.exports(done) or (settings.export_every and done % settings.export_every == 0):
            self.run.export(folder / "exports" / f"step-{done:06d}")
        if preempted or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
            self.metrics.sync()
            keep = settings.keep_checkpoints
            checkpoint.save(self.engine, self.combiner, folder, done, keep=keep, identity=self.run.fingerprint)

    def finish(self) -> None:
        """The final export with its card, then the end of the log and the summary, which cost no weights if they fail.

        `final/` counts as the model of the log's last row. Where that of the last step could not be written, the model
        is exported under the number of its step.
        """
        run, first = self.run, dist.get_rank() == 0
        made = (to_yaml(run.config), run.identity["model"], run.corpora, self.metrics.last)
        card = card_or_warning(*made, run.tokenizer.chat_template is not None) if first else None
        try:
            self.metrics.raise_refusal()
        except FatalError:
            done = max(run.start, self.probes.levels.step or 0) if self.probes.is_over else run.steps
            run.export(run.folder / "exports" / f"step-{done:06d}", card)
            raise
        run.export(run.folder / "final", card)
        self.metrics.finish(card or "")
        losses = [row["forget_loss"] for row in self.metrics.rows.steps if row.get("forget_loss") is not None]
        if warning := forgetting_failed(run.config.objective.forget, losses):
            console.logger.warning(warning)
        self.metrics.summarise(time.perf_counter() - run.began)


def run(config: RunConfig, zero: DeepSpeedDict, resume: bool = False, quiet: bool = False) -> None:
    """Set up and train. Resuming a finished run does nothing.

    Raises:
        InputError: unusable data, model or checkpoint, before anything is written.
        Exception: see `Trainer.fit`.
    """
    trainer = setup(config, zero, resume, quiet)
    if trainer is not None:
        try:
            trainer.fit()
        finally:
            trainer.run.lock.release()


def setup(config: RunConfig, zero: DeepSpeedDict, resume: bool = False, quiet: bool = False) -> Trainer | None:
    """Everything before the first step: read, load, shard, resume. None if the run is complete.

    Args:
        zero: what `pipeline.config.deepspeed.deepspeed_config` made of the DeepSpeed file.

    Raises:
        InputError: unusable data, model or checkpoint, before anything is written.
        FatalError: a disk that is full or cannot be written.
    """
    began, folder = time.perf_counter(), Path(config.output)
    settings = content_digest(zero)  # before DeepSpeed and trackers write into `zero`, as is `keys`
    console.setup_logging(world_from_environment()[0], quiet)
    process_group.start(config.train.timeout_minutes)
    if (folder / "final").exists():
        console.logger.info("%s is complete: nothing to resume", folder)
        return None
    lock = RunLock(folder)
    with raise_on_all_ranks(), disk_errors(folder / "config.yaml"):
        if resume and dist.get_rank() == 0 and (folder / "config.yaml").exists():
            lock.take()
    config = choose(config)
    keys = run_fingerprint(config, zero)
    tokenizer, samplers = open_data(config, zero)
    sets = open_probes(config, tokenizer)
    steps, offload = num_steps(config, samplers), zero["zero_optimization"].get("offload_optimizer") or {}
    on_nvme = offload.get("device") == "nvme"
    if on_nvme:
        local_main_first(lambda: check_nvme_path(Path(offload["nvme_path"])))
    with console.capture_stdout(), raise_on_all_ranks(), blaming_the_file(config):
        self_test(zero)
    with raise_on_all_ranks(), blaming_the_file(config):
        model = load_model(config.model, zero, config.seed)
    rows = prepare_rows(config, model)
    weights = weight_digests(model, folder / WEIGHTS)
    if resume:
        trackers.resume_trackers(folder, zero)
    engine = make_engine(config, zero, model, steps)
    identity = {"model": fingerprint(model, weights), "tokenizer": tokenizer_digest(tokenizer)}
    combiner = make_combiner(config, engine)
    joint = make_joint(config, engine, combiner, rows)
    tasks = {task.name: task for task in make_tasks(config, samplers, steps, engine, identity)}
    corpora = {task: sampler.sequences.digest for task, sampler in samplers.items()}
    contents = {f"data.{task}": digest for task, digest in corpora.items()}
    contents |= {f"data.probes.{found.name}": found.digest for found in sets if found.name in config.data.probes}
    decisive = {**keys, **identity, **contents, "steps": steps}
    take_folder(lock, config, resume)
    if dist.get_rank() == 0:
        log_disk_use(config, zero, model, steps)
    last = checkpoint.newest(folder) if resume else None
    start = checkpoint.load(engine, combiner, last, decisive) if last is not None else 0
    if not start:
        warn_of_unknown(config, samplers, engine)
    write_run_files(config, content_digests(identity, corpora, settings) | probe_digests(config, sets), weights)
    metrics = Monitor(folder, engine, start=start, steps=steps, has_probes=bool(config.train.probe_every))
    metrics.describe(to_yaml(config), hyperparameters(config, steps, combiner.synthesis.resolved_scope))
    prober = Prober(engine, sets, config.train.micro_batch_size)
    probes = Probes(prober, metrics, Levels(probe_names(config.train.stop_at)), config.train, steps)
    state = Run(config, folder, lock, model, tokenizer, identity, corpora, decisive, steps, start, not on_nvme, began)
    return Trainer(engine, combiner, tasks.get("forget"), tasks.get("retain"), state, metrics, probes, joint=joint)
