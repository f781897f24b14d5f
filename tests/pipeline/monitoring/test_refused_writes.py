"""A disk refuses what the first rank logs: all ranks end with its message, and a step needs no collective for that."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import process_group
from pipeline.errors import FatalError
from pipeline.monitoring.metrics import Monitor
from tests.distributed import run_distributed


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def monitor(folder: Path) -> Monitor:
    """A log whose engine has no trackers."""
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
    dist.barrier()
    without = SimpleNamespace(enabled=False, wandb_monitor=None, comet_monitor=None)
    engine: Any = SimpleNamespace(device=torch.device("cpu"), monitor=without)
    return Monitor(folder, engine, start=0, steps=9)


def step(metrics: Monitor, number: int) -> list[str]:
    """Log a step; returns the names of the collectives that this took."""
    called = list[str]()

    def counting(name: str) -> Callable[..., None]:
        real = getattr(dist, name)
        return lambda *args, **named: (called.append(name), real(*args, **named))[1]

    metrics.record("forget_loss", 1.0, reduce="sum")
    metrics.record("seconds", 2.0, reduce="max")
    names = [name for name in ("all_reduce", "all_gather_object", "all_gather", "broadcast", "barrier")]
    patches = [patch.object(dist, name, counting(name)) for name in names]
    for one in patches:
        one.start()
    try:
        metrics.flush(number)
    finally:
        for one in patches:
            one.stop()
    return called


def refused(message: str, call: Callable[..., object], *arguments: object) -> None:
    """On every rank, whoever has tried to write."""
    with pytest.raises(FatalError, match=rf"^cannot write {message}"):
        call(*arguments)


def end_together(output: str) -> None:
    process_group.start()
    is_first = dist.get_rank() == 0
    no_room = r" \(.*No space left.*MiB left\. Make room and give --resume"

    folder = Path(output) / "log"
    metrics = monitor(folder)
    assert step(metrics, 1) == ["all_reduce", "all_reduce"], "one a reduction, as ever"
    if is_first:
        metrics.lines = SimpleNamespace(write=full)  # pyright: ignore[reportAttributeAccessIssue]
    assert step(metrics, 2) == ["all_reduce", "all_reduce"], "the first rank alone knows"
    refused(re.escape(f"{folder}/metrics.jsonl") + no_room, step, metrics, 3)

    for number, ends in enumerate((lambda metrics: metrics.sync(), lambda metrics: metrics.finish("card"))):
        folder = Path(output) / f"events-{number}"
        metrics = monitor(folder)
        if is_first:
            metrics.board.write = full  # pyright: ignore[reportAttributeAccessIssue]
        step(metrics, 1)
        refused(re.escape(f"{folder}/tensorboard") + no_room, ends, metrics)

    folder = Path(output) / "configuration"
    metrics = monitor(folder)
    if is_first:
        metrics.board.writer.add_text = full
    refused(re.escape(f"{folder}/tensorboard") + no_room, metrics.describe, "seed: 0", {"forget": "npo"})

    folder = Path(output) / "gone"
    metrics = monitor(folder)
    step(metrics, 1)
    if is_first:
        shutil.rmtree(folder)
    refused(rf"{re.escape(str(folder))}/metrics.jsonl \(.*No such file.*\. Make it writable and give", metrics.sync)

    folder = Path(output) / "taken"
    if is_first:
        (folder / "metrics.jsonl" / "inside").mkdir(parents=True)
    refused(rf"{re.escape(str(folder))}/metrics.jsonl \(.*directory", monitor, folder)


def test_all_ranks_end_with_the_first_ones_message(tmp_path: Path) -> None:
    """It would end alone, and the others would report a lost rank, with a traceback."""
    run_distributed(end_together, 2, str(tmp_path), timeout=120)
