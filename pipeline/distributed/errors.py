"""Raise an error of one rank on all ranks, and print why a rank ends."""

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
from pipeline.distributed.slow_work import slow_work
from pipeline.errors import FatalError, InputError, denied_files


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run a block on every rank; an InputError or a FatalError on any of them becomes the same error on all.

    So does a file that one of them may not reach (`denied_files`).
    """
    mine: tuple[type[Exception], str] | None = None
    try:
        with denied_files():
            yield
    except (InputError, FatalError) as error:
        mine = type(error), str(error)
    errors: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    for found in errors:
        if found is not None:
            kind, text = found
            raise kind(text)


def local_main_first(build: Callable[[], T]) -> T:
    """`build()` on the first rank of each machine, which fills the caches on disk, then on the others.

    The others wait as long as that takes (`slow_work`).
    """
    result: list[T] = []
    for first in (True, False):
        with raise_on_all_ranks(), slow_work():
            if (int(os.environ["LOCAL_RANK"]) == 0) is first:
                result.append(build())
    return result[0]


# torch's types of errors between ranks. Gloo has no type; its messages name the source file that raised them.
NETWORK = (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)


WAITED = ("timed out", "timeout")  # only chooses the hint


ANSWER = 5.0  # seconds to wait for the store, which another rank serves


def is_lost(error: BaseException) -> bool:
    """Whether `error` is the consequence of another rank that ended or hangs, or of a broken network."""
    of_gloo = type(error) is RuntimeError and re.search(r"\[\S*\bgloo/\S+:\d+\]", str(error)) is not None
    return isinstance(error, NETWORK) or of_gloo


def _is_first() -> bool:
    """Whether no other rank has reported an error before. The ranks count in their store; true if it does not answer.

    If the store is gone, the rank that served it has ended, and has reported its error first.
    """
    if not dist.is_initialized():
        return True
    reported: list[int] = []

    def count() -> None:
        try:
            # Try a connection first: a store whose server is gone prints its C++ frames on stderr.
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), ANSWER).close()
            reported.append(distributed_c10d._get_default_store().add("errors", 1))
        except (OSError, *NETWORK):
            reported.append(2)

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    counting.join(ANSWER)
    return not reported or reported[0] == 1


def report(error: BaseException, logged: bool = False) -> int:
    """Print on stderr why this rank ends; returns its exit status.

    The first rank that reports an error between ranks prints its traceback; the others print one line, so that the
    error of the culprit is easy to find.

    Args:
        logged: `log.txt` contains the traceback.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, KeyboardInterrupt):  # of all ranks: one that asks the store of another would be too late
        print(f"\nrank {rank}: interrupted", file=sys.stderr)
        return INTERRUPTED
    # A FatalError is one of all ranks. The first counts it, and may end, and with it the store, while another asks.
    is_first = not (isinstance(error, FatalError) and rank != "0") and _is_first()
    print(file=sys.stderr)  # end the progress line
    if isinstance(error, FatalError):
        if (
            rank != "0"
        ):  # all ranks share a full disk: the first one reports it, and the launcher ends the others meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f"error: {error}. Make room and give --resume: what was saved before is whole", file=sys.stderr)
    elif is_lost(error):
        if is_first or not logged:
            traceback.print_exception(error)
        else:
            line = (str(error).splitlines() or [""])[0][:200]
            print(f"rank {rank}: {type(error).__name__}: {line} (the traceback is in log.txt)", file=sys.stderr)
        print(_hint(error, rank, is_first), file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def _hint(error: BaseException, rank: str, is_first: bool) -> str:
    if any(sign in str(error).lower() for sign in WAITED):
        return (
            f"error: rank {rank} waited for another rank as long as train.timeout_minutes allows: that rank hangs, or "
            "needs more time"
        )
    if is_first:
        return (
            f"error: rank {rank} cannot reach another rank, and none reported an error before: another rank was "
            "killed, or the network between them failed"
        )
    return f"rank {rank}: ends because another rank ended; the error of that rank, if it printed one, is above"
