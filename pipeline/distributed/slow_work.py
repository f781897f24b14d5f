"""Work that each rank does by itself and that may take long: no collective waits for it, so no timeout runs."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import distributed_c10d

BEAT_S = 5.0  # between two signs of life of a rank at work
POLL_S = (0.002, 0.5)  # between two looks at whether all are done: the first, and the longest


@contextmanager
def slow_work() -> Iterator[None]:
    """A block that all ranks enter, and leave together once the slowest is done, however long that takes.

    Ranks wait in the store of their process group, not in a collective, whose timeout (`train.timeout_minutes`) would
    end a run that writes to a slow disk. A rank at work gives signs of life; only when those of all ranks that are not
    done have stopped does the timeout run. An error in the block passes once the others are done, so
    that `raise_on_all_ranks` around the block can share it.

    Raises:
        DistStoreError: the ranks that are not done have given no sign of life for as long as a collective waits.
    """
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    store, done, beats = distributed_c10d._get_default_store(), f"{token[0]}/done", f"{token[0]}/beats"
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            store.add(beats, 1)

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    finally:
        over.set()
    beating.join()
    _leave(store, done, beats)
    if failed is not None:
        raise failed


def _leave(store: distributed_c10d.Store, done: str, beats: str) -> None:
    """Say that this rank is done, and wait until all are."""
    limit, world = distributed_c10d.default_pg_timeout.total_seconds(), dist.get_world_size()
    number = store.add(done, 1)
    seen, since, pause = -1, time.monotonic(), POLL_S[0]
    while number < world:
        time.sleep(pause)
        pause = min(2 * pause, POLL_S[1])
        now = store.add(beats, 0)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > limit:
            raise dist.DistStoreError(
                f"timed out: {world - number} of {world} ranks were still at work and gave no sign of life for "
                f"{limit / 60:g} minutes"
            )
        number = store.add(done, 0)
