"""The process group: find it, agree on errors, and leave it without an accident."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from pipeline.config import InputError, world_from_environment

T = TypeVar("T")


STOPPED = 75  # EX_TEMPFAIL of sysexits.h: come back later
INTERRUPTED, KILLED = 130, 143  # as shells say it: 128 + SIGINT, + SIGTERM


class Stopped(Exception):
    """SIGTERM was obeyed by all ranks: the run is saved, and ends with status STOPPED."""


class Failure(Exception):
    """What a run can end with whose text is all there is to say; status 1. The rank that meets it takes all along."""


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
            os.environ["MASTER_PORT"] = str(_free_port())
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
        port = MPI.COMM_WORLD.bcast(_free_port() if MPI.COMM_WORLD.Get_rank() == 0 else None)
        deepspeed.init_distributed(distributed_port=port, verbose=False, timeout=limit)
    accelerator = get_accelerator()
    assert accelerator is not None
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


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


# Seconds in which a second SIGTERM is taken for the first: a launcher that was signalled together with its ranks, as a
# process group is, passes on to them what they had.
ECHO = 5.0


def stop_on_sigterm() -> threading.Event:
    """From now on SIGTERM sets the event that is returned; another one, ECHO later, ends the process with KILLED."""
    asked = threading.Event()
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def listen() -> None:  # beside the main thread, which may wait for another rank and be deaf
        first = 0.0
        while True:
            if os.read(heard, 1)[0] != signal.SIGTERM:
                continue
            if not asked.is_set():
                first = time.monotonic()
                asked.set()
            elif time.monotonic() - first > ECHO:
                os._exit(KILLED)

    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    return asked


# torch's own for what goes wrong between ranks. Gloo has no type: it says in which file of its source it threw.
NETWORK = (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)
WAITED = ("timed out", "timeout")  # chooses the hint, and nothing else
ANSWER = 5.0  # seconds that the store, which another rank serves, has to answer


def is_lost(error: BaseException) -> bool:
    """Whether this is how the end of another rank, its silence, or a broken network looks from here."""
    of_gloo = type(error) is RuntimeError and re.search(r"\[\S*\bgloo/\S+:\d+\]", str(error)) is not None
    return isinstance(error, NETWORK) or of_gloo


def _is_first() -> bool:
    """Whether no other rank has reported an error before. They count where they met; true if nobody answers.

    Where that place is gone, so is the rank that served it, and what it said comes before.
    """
    if not dist.is_initialized():
        return True
    reported: list[int] = []

    def count() -> None:
        try:
            # Asked first, for a store whose other end is gone prints its C++ frames on stderr.
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), ANSWER).close()
            reported.append(distributed_c10d._get_default_store().add("errors", 1))
        except (OSError, *NETWORK):
            reported.append(2)

    asking = threading.Thread(target=count, daemon=True)
    asking.start()
    asking.join(ANSWER)
    return not reported or reported[0] == 1


def report(error: BaseException, logged: bool = False) -> int:
    """Say on stderr why this rank ends; returns its status.

    What happened between ranks is told whole by the first rank that reports an error, and in a line by the others, so
    that the culprit's own words are found.

    Args:
        logged: `log.txt` has the traceback.
    """
    rank, is_first = os.environ.get("RANK", "0"), _is_first()
    print(file=sys.stderr)  # the progress line is open
    if isinstance(error, KeyboardInterrupt):
        print(f"rank {rank}: interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, Failure):
        if rank != "0":  # one disk is full for all: if the first rank tells it, the launcher ends us meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f"error: {error}. Make room and give --resume: what was saved before is whole", file=sys.stderr)
    elif is_lost(error):
        if is_first or not logged:
            traceback.print_exception(error)
        else:
            told = (str(error).splitlines() or [""])[0][:200]
            print(f"rank {rank}: {type(error).__name__}: {told} (whole in log.txt)", file=sys.stderr)
        print(_hint(error, rank, is_first), file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def _hint(error: BaseException, rank: str, is_first: bool) -> str:
    if any(sign in str(error).lower() for sign in WAITED):
        return f"error: rank {rank} waited for another rank as long as train.timeout allows: one hangs, or needs longer"
    if is_first:
        return (
            f"error: rank {rank} cannot reach another rank, and none reported an error before: another rank ended "
            "without a word (killed), or the network between them failed"
        )
    return f"rank {rank}: ends because another rank ended; what that one said, if anything, is above"


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
