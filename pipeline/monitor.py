"""Numbers -> TensorBoard, JSON lines and one progress bar. Each number says how the ranks' values become one."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Monitor:
    """Collects the numbers of a step with `record`, and writes them with `flush`. Writes on rank 0 alone.

    A run that goes on after `start` steps drops what it logged beyond them: each step is there once, in order.
    """

    def __init__(self, folder: Path, *, start: int, steps: int, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, Any] = {}
        self.pending: dict[str, dict[str, torch.Tensor]] = {}
        self.is_writer = dist.get_rank() == 0
        self.last: dict[str, Any] = {}  # the newest line of the log, of rank 0
        if self.is_writer:
            kept = _keep_lines(folder / "metrics.jsonl", start)
            self.last = json.loads(kept[-1]) if kept else {}
            self.lines = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
            self.bar = tqdm(total=steps, initial=start, desc="unlearning", unit=" steps", mininterval=0.5)

    def text(self, tag: str, text: str) -> None:
        """A text page in TensorBoard."""
        if self.is_writer:
            self.board.add_text(tag, text)

    def record(self, name: str, value: float | torch.Tensor | None, reduce: str = "none") -> None:
        """One number of the present step. reduce: `none` (the same on every rank), `sum` or `max` over the ranks.

        A name that starts with `_` is for the ranks to agree on, and is not written.
        """
        self.values[name] = value
        if reduce != "none":
            tensor = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
            self.pending.setdefault(reduce, {})[name] = tensor

    def flush(self, step: int) -> dict[str, Any]:
        """Reduce, write and forget the recorded numbers; returns them (a number that is not finite is None)."""
        for reduce, tensors in self.pending.items():
            stacked = torch.stack(list(tensors.values()))
            dist.all_reduce(stacked, _REDUCTIONS[reduce])
            self.values.update(zip(tensors, stacked.tolist(), strict=True))
        values = {
            name: None if value is None or not math.isfinite(value) else value for name, value in self.values.items()
        }
        self.values, self.pending = {}, {}
        if self.is_writer:
            written = {name: value for name, value in values.items() if not name.startswith("_")}
            self.last = {"step": step, **written}
            self.lines.write(json.dumps(self.last) + "\n")
            for name, value in written.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)
            shown = {"forget": "forget_loss", "retain": "retain_loss", "conflict": "conflict_fraction"}
            shown = {label: values.get(name) for label, name in shown.items()}
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items() if v is not None}, refresh=False)
            self.bar.update()
        return values

    def close(self) -> None:
        if self.is_writer:
            self.bar.close()
            self.board.close()
            self.lines.close()


def _keep_lines(file: Path, number: int) -> list[str]:
    """Cut a log back to its first `number` lines, all at once; returns them."""
    if not file.exists():
        return []
    kept = file.read_text(encoding="utf-8").splitlines(keepends=True)[:number]
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, file)
    return kept


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank ever used: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
