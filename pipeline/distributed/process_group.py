"""The process group: find it, agree on errors, and leave it without an accident."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from typing import NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from pipeline.distributed.environment import free_port, world_from_environment
from pipeline.distributed.signals import STOPPED
from pipeline.errors import InputError

T = TypeVar("T")


def start(timeout: float = 30.0) -> torch.device:
    """Join the process group that the launcher (deepspeed, torchrun, mpirun, or nobody) set up; returns the device.

    Args:
        timeout: minutes that a collective waits for another rank.
    """
    limit = timedelta(minutes=timeout)
    # The groups that DeepSpeed makes beside torch's own are given no limit: theirs is torch's default.
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit  # pyright: ignore[reportPrivateImportUsage]
    # DeepSpeed would compile a shared-memory all-reduce for inference at this point: never used in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    under_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ
    if launched or not under_mpi:
        for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, alone)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(free_port())
        deepspeed.init_distributed(verbose=False, timeout=limit)
    else:
        from mpi4py import MPI

        started = world_from_environment()[1]
        if MPI.COMM_WORLD.Get_size() != started:  # each would train for itself, into the same folder
            raise InputError(
                f"mpirun: it started {started} ranks, of which mpi4py sees {MPI.COMM_WORLD.Get_size()}, being of "
                "another MPI; use that one's mpirun, or set MPI4PY_LIBMPI to the libmpi.so of this one"
            )
        # DeepSpeed's discovery uses one fixed port, so two jobs on a host would collide.
        port = MPI.COMM_WORLD.bcast(free_port() if MPI.COMM_WORLD.Get_rank() == 0 else None)
        deepspeed.init_distributed(distributed_port=port, verbose=False, timeout=limit)
    accelerator = get_accelerator()
    assert accelerator is not None
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


def leave(status: int) -> NoReturn:
    """End this process with `status`: 0, 2 and STOPPED are reached by all ranks alike, others by one that failed.

    The interpreter's own shutdown is skipped: with gloo it aborts now and then after all work is done, and the
    launcher would report a failure that did not happen. MPI, where it started the ranks, wants to be told.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends the other ranks as soon as one has left with 75
    if status not in (0, 2, STOPPED):
        if mpi is not None:
            mpi.COMM_WORLD.Abort(status)
        os._exit(status)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if mpi is not None:
        mpi.Finalize()
    os._exit(status)
