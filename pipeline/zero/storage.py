"""How the files of a checkpoint are written and read: outside of DeepSpeed's barriers, and memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from torch import Tensor

from pipeline.zero.engine import Engine

Content = dict[str, Any]  # what DeepSpeed puts into a file: tensors, numbers, and more of these


class Storage(CheckpointEngine):
    """Collects what DeepSpeed wants to write, whose barriers would wait for a slow disk; `write` writes it.

    What it loads is memory-mapped, so a rank needs no memory for its files beside the state that they fill.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, Content] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        self.files.clear()

    def save(self, state_dict: Content, path: str) -> None:
        self.files[Path(path)] = state_dict

    def commit(self, info: CheckpointCommitInfo) -> None:
        pass

    def load(self, path: str, map_location: Any = None) -> Content:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.load(path, map_location=map_location, mmap=True, weights_only=False)

    def write(self) -> None:
        """Write each file and drop what it was made of."""
        for path in list(self.files):
            torch.save(self.files.pop(path), path)


@contextmanager
def own_storage(engine: Engine) -> Iterator[Storage]:
    """Let `engine` save and load through a `Storage` in the block."""
    before, storage = engine.checkpoint_engine, Storage()
    engine.checkpoint_engine = storage
    try:
        yield storage
    finally:
        engine.checkpoint_engine = before


def copy_into_memory(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer in host memory, one tensor after the other, a state of its own in place of mapped files.

    torch's optimizers take the tensors that they load where they are: a file that is removed or on a machine that is
    gone would end the run.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                state[name] = value.clone()
