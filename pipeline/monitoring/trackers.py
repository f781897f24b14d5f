"""DeepSpeed's monitors that the DeepSpeed file turns on: CSV, W&B, Comet, another TensorBoard. All of them on rank 0.

DeepSpeed starts them and hands numbers on. What it leaves to others is here: hyper-parameters and results, so that runs
compare; each step once after --resume; and an end. W&B and Comet keep what they are told in memory and finish when the
interpreter ends, which `ranks.leave` skips: unfinished, their files stay empty.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

_NAMES = "monitors.json"  # in the run folder: what W&B and Comet call this run


def resume_trackers(folder: Path, zero: dict[str, Any]) -> None:
    """Before DeepSpeed starts them for a run that is resumed: the run goes on there too. Changes `zero`.

    What the user asked for by W&B's variables or Comet's keys stays.
    """
    file = folder / _NAMES
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "wandb" in known:
        os.environ.setdefault("WANDB_RUN_ID", known["wandb"])
        os.environ.setdefault("WANDB_RESUME", "allow")
    if "comet" in known and "comet" in zero:
        zero["comet"].setdefault("experiment_key", known["comet"])


def end(status: int) -> None:
    """The process ends with `status`: all that W&B and Comet were told is written or sent; may wait for the network."""
    wandb, comet = sys.modules.get("wandb"), sys.modules.get("comet_ml")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=status)
    if comet is not None:
        comet.end()


class ExternalTrackers:
    """What DeepSpeed's engine has of them, which may be none. The engine itself no longer writes to them.

    It would write the learning rate against a count of samples that is not this program's.
    """

    def __init__(self, folder: Path, engine: Any, *, start: int) -> None:
        self.folder, self.monitors, self.start = folder, engine.monitor, start
        self.are_on, engine.monitor.enabled = engine.monitor.enabled, False
        self.wandb = sys.modules["wandb"].run if self.monitors.wandb_monitor is not None else None
        self.comet = self.monitors.comet_monitor.experiment if self.monitors.comet_monitor is not None else None

    def begin(self, hyperparameters: Mapping[str, str | float]) -> None:
        """What the run is; whatever was written of steps after `start` is taken back, where that can be done."""
        names = {}
        if self.wandb is not None:
            if "WANDB_NAME" not in os.environ:
                self.wandb.name = self.folder.name
            self.wandb.config.update(hyperparameters, allow_val_change=True)  # or it raises when a value is another
            names["wandb"] = self.wandb.id
        if self.comet is not None:
            self.comet.log_parameters(hyperparameters)
            names["comet"] = self.comet.get_key()
        if names:
            _replace(self.folder / _NAMES, json.dumps(names).encode())
        if self.start and self.monitors.csv_monitor is not None:
            for file in Path(self.monitors.csv_monitor.log_dir).glob("*.csv"):
                _cut(file, self.start)
                self.monitors.csv_monitor.filenames.append(file.stem)  # or it would write the header again
        if self.start and self.monitors.tb_monitor is not None:
            again = Event(step=self.start + 1, session_log=SessionLog(status=SessionLog.START))
            self.monitors.tb_monitor.summary_writer._get_file_writer().add_event(again)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """The numbers of a step but those of single layers."""
        if self.are_on:
            told = [(name, value) for name, value in values.items() if value is not None and "/" not in name]
            self.monitors.write_events([(name, value, step) for name, value in told])

    def finish(self, results: Mapping[str, float], step: int) -> None:
        """What the run came to after `step` steps, as `result/<measure>`."""
        found = {f"result/{name}": value for name, value in results.items()}
        if self.wandb is not None:
            self.wandb.summary.update(found)
        if self.comet is not None:
            self.comet.log_metrics(found, step=step)


def _cut(file: Path, start: int) -> None:
    """Take the rows of steps after `start`, and one that a full disk cut short, from the end of a CSV file."""
    rows = file.read_bytes().splitlines(keepends=True)
    while len(rows) > 1 and (not rows[-1].endswith(b"\n") or int(rows[-1].split(b",")[0]) > start):
        rows.pop()
    _replace(file, b"".join(rows))


def _replace(file: Path, content: bytes) -> None:
    """All of it or nothing."""
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, file)
