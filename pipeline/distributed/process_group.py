"""Join the process group, and leave it."""

from __future__ import annotations

import errno
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
    """Join the process group that the launcher (deepspeed, torchrun, mpirun, or none) set up; returns the device.

    Args:
        timeout: minutes that a collective waits for another rank.

    Raises:
        InputError: mpirun and mpi4py belong to different MPIs; another program has the port at which ranks meet.
    """
    limit = timedelta(minutes=timeout)
    # DeepSpeed passes no limit to the groups that it makes itself: they get torch's default.
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit  # pyright: ignore[reportPrivateImportUsage]
    skip_shm_op()
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    under_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ
    if launched or not under_mpi:
        for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, alone)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(free_port())
        try:
            deepspeed.init_distributed(verbose=False, timeout=limit)
        except dist.DistNetworkError as error:
            if errno.errorcode[errno.EADDRINUSE] not in str(error):  # which torch's message has, its type does not
                raise
            raise InputError(
                f"port {os.environ['MASTER_PORT']} of this machine, at which ranks meet, is in use by another program, "
                "perhaps by another training; choose a free one: deepspeed --master_port N (torchrun has it too)"
            ) from None
    else:
        from mpi4py import MPI

        started = world_from_environment()[1]
        if MPI.COMM_WORLD.Get_size() != started:  # each rank would train alone, into the same folder
            raise InputError(
                f"mpirun: it started {started} ranks, of which mpi4py sees {MPI.COMM_WORLD.Get_size()}, because "
                "mpi4py uses another MPI; use the mpirun of that MPI, or set MPI4PY_LIBMPI to the libmpi.so of this one"
            )
        # DeepSpeed's discovery uses one fixed port, so two jobs on a host would collide.
        port = MPI.COMM_WORLD.bcast(free_port() if MPI.COMM_WORLD.Get_rank() == 0 else None)
        deepspeed.init_distributed(distributed_port=port, verbose=False, timeout=limit)
    accelerator = get_accelerator()
    assert accelerator is not None
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if accelerator.device_name() == "cuda":
        # DeepSpeed asks NVML by the numbers in CUDA_VISIBLE_DEVICES, which may hold UUIDs: ZeRO 1 and 2 would fail.
        accelerator.available_memory = lambda device_index=None: torch.cuda.mem_get_info(device_index)[0]
    return torch.device(accelerator.current_device_name())


def skip_shm_op() -> None:
    """Else DeepSpeed compiles a shared-memory all-reduce for inference when ranks meet, which nothing here uses."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def part() -> None:
    """Meet the other ranks for the last time; what a rank does alone afterwards may take longer than they wait."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with `status`. All ranks end with 0, 2 or STOPPED together; a rank that failed ends alone.

    The interpreter's own shutdown is skipped: with gloo it sometimes aborts after all work is done, and the launcher
    would report a failure that did not happen. MPI must be finalized where it started the ranks.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends the other ranks as soon as one has left with 75
    if status not in (0, 2, STOPPED):
        if mpi is not None:
            mpi.COMM_WORLD.Abort(status)
        os._exit(status)
    part()
    if mpi is not None:
        mpi.Finalize()
    os._exit(status)
