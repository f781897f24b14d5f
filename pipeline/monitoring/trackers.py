"""The trackers that the DeepSpeed file turns on: CSV, W&B, Comet, another TensorBoard. All of them on rank 0.

DeepSpeed starts them and passes numbers to them. This file adds what DeepSpeed leaves out: hyper-parameters and
results, by which runs are compared; each step once after --resume; and a proper end. W&B and Comet buffer in memory and
finish when the interpreter ends, which `process_group.leave` skips: without `end` their files stay empty.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from pipeline.config.deepspeed import DeepSpeedDict
from pipeline.files import write_whole
from pipeline.monitoring.levels import PREFIX

if TYPE_CHECKING:
    from deepspeed.monitor.monitor import MonitorMaster

_NAMES = "monitors.json"  # in the run folder: the identifiers of this run in W&B and Comet


def resume_trackers(folder: Path, zero: DeepSpeedDict) -> None:
    """Make W&B and Comet continue the resumed run; call it before DeepSpeed starts them. Changes `zero`.

    W&B's variables and Comet's keys that the user has set take precedence.
    """
    file = folder / _NAMES
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "wandb" in known:
        os.environ.setdefault("WANDB_RUN_ID", known["wandb"])
        os.environ.setdefault("WANDB_RESUME", "allow")
    if "comet" in known and "comet" in zero:
        zero["comet"].setdefault("experiment_key", known["comet"])


def end(status: int) -> None:
    """Flush W&B and Comet before the process ends with `status`; this may wait for the network."""
    wandb, comet = sys.modules.get("wandb"), sys.modules.get("comet_ml")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=status)
    if comet is not None:
        comet.end()


class Monitored(Protocol):
    """The part of a DeepSpeed engine that monitoring needs."""

    device: torch.device
    monitor: MonitorMaster


class ExternalTrackers:
    """The trackers of a DeepSpeed engine, of which there may be none. The engine itself stops writing to them:
    it would write the learning rate against a count of samples that is not this program's.
    """

    def __init__(self, folder: Path, engine: Monitored, *, start: int) -> None:
        self.folder, self.monitors, self.start = folder, engine.monitor, start
        self.are_on, engine.monitor.enabled = engine.monitor.enabled, False
        self.wandb = sys.modules["wandb"].run if self.monitors.wandb_monitor is not None else None
        self.comet = self.monitors.comet_monitor.experiment if self.monitors.comet_monitor is not None else None

    def begin(self, hyperparameters: Mapping[str, str | float]) -> None:
        """Write the hyper-parameters; remove what was written of steps after `start`, where the tracker can."""
        names = {}
        if self.wandb is not None:
            if "WANDB_NAME" not in os.environ:
                self.wandb.name = self.folder.name
            self.wandb.config.update(hyperparameters, allow_val_change=True)  # or it raises when a value is another
            names["wandb"] = self.wandb.id
        if self.comet is not None:
            self.comet.log_parameters(dict(hyperparameters))
            names["comet"] = self.comet.get_key()
        if names:
            write_whole(self.folder / _NAMES, json.dumps(names))
        csv, tensorboard = self.monitors.csv_monitor, self.monitors.tb_monitor
        if self.start and csv is not None and csv.log_dir is not None:
            for file in Path(csv.log_dir).glob("*.csv"):
                _cut(file, self.start)
                csv.filenames.append(file.stem)  # or it would write the header again
        if self.start and tensorboard is not None and tensorboard.summary_writer is not None:
            again = Event(step=self.start + 1, session_log=SessionLog(status=SessionLog.START))
            tensorboard.summary_writer._get_file_writer().add_event(again)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the numbers of a step, except those of single layers."""
        if self.are_on:
            of_layer = {name for name in values if "/" in name and not name.startswith(PREFIX)}
            written = [(name, value) for name, value in values.items() if value is not None and name not in of_layer]
            self.monitors.write_events([(name, value, step) for name, value in written])

    def finish(self, results: Mapping[str, float], step: int) -> None:
        """Write the results after `step` steps, as `result/<measure>`."""
        found = {f"result/{name}": value for name, value in results.items()}
        if self.wandb is not None:
            self.wandb.summary.update(found)
        if self.comet is not None:
            self.comet.log_metrics(found, step=step)


def _cut(file: Path, start: int) -> None:
    """Remove the rows of steps after `start`, and a row that a full disk cut short, from the end of a CSV file."""
    rows = file.read_bytes().splitlines(keepends=True)
    while len(rows) > 1 and (not rows[-1].endswith(b"\n") or int(rows[-1].split(b",")[0]) > start):
        rows.pop()
    write_whole(file, b"".join(rows))
