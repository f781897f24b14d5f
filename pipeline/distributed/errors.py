"""An error of one rank on all of them, and what a rank prints when it ends."""

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

import torch.distributed as dist
from torch.distributed import distributed_c10d

from pipeline.distributed.process_group import T
from pipeline.distributed.signals import INTERRUPTED
from pipeline.errors import FatalError, InputError


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
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


def local_main_first(build: Callable[[], T]) -> T:
    """`build()` on the first rank of each machine, which fills the caches on disk, then on the others."""
    result: list[T] = []
    for first in (True, False):
        with raise_on_all_ranks():
            if (int(os.environ["LOCAL_RANK"]) == 0) is first:
                result.append(build())
    return result[0]


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
    if isinstance(error, FatalError):
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
        return (
            f"error: rank {rank} waited for another rank as long as train.timeout_minutes allows: one hangs, or needs "
            "longer"
        )
    if is_first:
        return (
            f"error: rank {rank} cannot reach another rank, and none reported an error before: another rank ended "
            "without a word (killed), or the network between them failed"
        )
    return f"rank {rank}: ends because another rank ended; what that one said, if anything, is above"
