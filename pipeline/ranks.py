"""The process group: find it, agree on errors, and leave it without an accident."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist

from pipeline.config import InputError

T = TypeVar("T")


def start() -> torch.device:
    """Join the process group that the launcher (deepspeed, torchrun, mpirun, or nobody) set up; returns the device."""
    # DeepSpeed would compile a shared-memory all-reduce for inference at this point: never used in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    under_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ
    if launched or not under_mpi:
        for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, alone)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_free_port())
        deepspeed.init_distributed(verbose=False)
    else:
        from mpi4py import MPI

        # DeepSpeed's discovery uses one fixed port, so two jobs on a host would collide.
        port = MPI.COMM_WORLD.bcast(_free_port() if MPI.COMM_WORLD.Get_rank() == 0 else None)
        deepspeed.init_distributed(distributed_port=port, verbose=False)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextmanager
def together() -> Iterator[None]:
    """Run a block on every rank; an InputError on any of them becomes the same InputError on all."""
    mine: str | None = None
    try:
        yield
    except InputError as error:
        mine = str(error)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    for error in errors:
        if error is not None:
            raise InputError(error)


def one_before_others(build: Callable[[], T]) -> T:
    """`build()` on the first rank of each machine, which fills the caches on disk, then on the others."""
    result: list[T] = []
    for first in (True, False):
        with together():
            if (int(os.environ["LOCAL_RANK"]) == 0) is first:
                result.append(build())
    return result[0]


def leave(status: int) -> NoReturn:
    """End this process with `status`.

    After success all ranks meet first. The interpreter's own shutdown is skipped: with gloo it aborts now and then
    after all work is done, and the launcher would report a failure that did not happen.
    """
    if dist.is_initialized():
        if status == 0:
            dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
