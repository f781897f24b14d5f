"""Several ranks: each works on its share of the batches, and all of them hold every answer, in the order of one rank.

Nothing here loads torch where one process is alone.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from pipeline.errors import InputError

B = TypeVar("B")


A = TypeVar("A")


def start(sharded: bool) -> None:
    """Join the process group that `torchrun` or `deepspeed` set up; alone, make one only for a sharded model."""
    if sharded:
        for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, alone)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def joined() -> bool:
    """Whether this process is one of a group."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def place() -> tuple[int, int]:
    """(this rank, number of ranks)."""
    if not joined():
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def gather(mine: A) -> list[A]:
    """What each rank gives, in the order of ranks, on every rank."""
    size = place()[1]
    if size == 1:
        return [mine]
    import torch.distributed as dist

    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, mine)
    return parts


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run a block on every rank; an UnusableInput on any of them becomes the same UnusableInput on all."""
    mine: str | None = None
    try:
        yield
    except InputError as error:
        mine = str(error)
    for error in gather(mine):
        if error is not None:
            raise InputError(error)


def share(batches: Sequence[B], work: Callable[[B], A], title: str) -> list[A]:
    """[work(batch) for batch in batches] on every rank, each having worked on every size-th of them.

    The batches are those of one rank, so the answers are too, to the bit. All ranks work equally often: one that has
    none left repeats the last batch, since a forward pass of a sharded model needs every rank.
    """
    from tqdm import tqdm

    rank, size = place()
    rounds = range(rank, -(-len(batches) // size) * size, size)
    silent = rank != 0 or not sys.stderr.isatty()
    mine = [
        work(batches[min(i, len(batches) - 1)])
        for i in tqdm(rounds, desc=title, unit="batch", leave=False, disable=silent)
    ]
    parts = gather(mine)
    return [parts[i % size][i // size] for i in range(len(batches))]


def leave(status: int) -> NoReturn:
    """End this process once all ranks are done; gloo now and then aborts in the interpreter's own shutdown."""
    if not joined():
        sys.exit(status)
    import torch.distributed as dist

    sys.stdout.flush()
    sys.stderr.flush()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(status)
