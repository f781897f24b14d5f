"""Several ranks: each works on its share of the batches, and all of them get every result, in the order of one rank.

One process alone forms no group and imports neither torch nor DeepSpeed here, so that it refuses bad input quickly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import NoReturn, TypeVar

from pipeline.distributed.environment import world_from_environment
from pipeline.distributed.terminal import can_redraw

Batch = TypeVar("Batch")
Result = TypeVar("Result")


_is_sharded = [False]  # whether a forward pass of one rank needs the others


def start(sharded: bool) -> None:
    """Join the process group of the launcher. A process alone forms one only for a sharded model."""
    _is_sharded[0] = sharded
    if sharded or world_from_environment()[1] > 1:
        from pipeline.distributed import process_group

        process_group.start()


def is_joined() -> bool:
    """Whether this process belongs to a process group."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """(this rank, number of ranks)."""
    if not is_joined():
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def raise_on_all_ranks() -> AbstractContextManager[None]:
    """A block that every rank runs; an InputError on any of them becomes the same InputError on all."""
    if not is_joined():
        return nullcontext()
    from pipeline.distributed import errors

    return errors.raise_on_all_ranks()


def share(batches: Sequence[Batch], work: Callable[[Batch], Result], title: str) -> list[Result]:
    """[work(batch) for batch in batches] on every rank, each of which works on every size-th batch.

    The batches are those of one rank, so the results are too, to the bit. All ranks work equally often: a rank that has
    no batch left repeats the last one, because a forward pass of a sharded model needs every rank.

    Raises:
        torch.OutOfMemoryError: on every rank, if `work` raised it on one. Of a sharded model it ends that rank alone,
            because the others wait for it inside a forward pass.
    """
    import torch

    from pipeline.distributed.bar import Bar

    rank, size = rank_and_size()
    rounds = range(rank, -(-len(batches) // size) * size, size)
    bar = Bar(rounds, title=f"{title}, batch", is_shown=rank == 0 and can_redraw(sys.stderr))
    shown = with_lines(rounds, title) if rank == 0 and bar.disable else bar
    own, lacks = [], None
    try:
        own = [work(batches[min(i, len(batches) - 1)]) for i in shown]
    except torch.OutOfMemoryError as error:
        if _is_sharded[0]:
            raise
        lacks = str(error)
    parts, all_lack = [own] * size, [lacks] * size
    if size > 1:
        torch.distributed.all_gather_object(all_lack, lacks)
        torch.distributed.all_gather_object(parts, own)
    if found := [one for one in all_lack if one is not None]:
        raise torch.OutOfMemoryError(found[0])
    return [parts[i % size][i // size] for i in range(len(batches))]


PROGRESS_EVERY_S = 10.0  # between two lines of progress where stderr is no terminal
_last_line = [float("-inf")]  # when this process printed the last one, whatever it was about


def announce(line: str, *, always: bool = False) -> None:
    """Print a line of progress on stderr, unless one was printed a moment ago. always: even then."""
    if always or time.monotonic() - _last_line[0] >= PROGRESS_EVERY_S:
        _last_line[0] = time.monotonic()
        print(line, file=sys.stderr, flush=True)


def with_lines(rounds: range, title: str) -> Iterator[int]:
    """The rounds, with a line of progress now and then: the program must not seem to hang where no bar is drawn."""
    began = time.monotonic()
    for done, number in enumerate(rounds):
        if done:
            left = timedelta(seconds=round((time.monotonic() - began) / done * (len(rounds) - done)))
            announce(f"{title}: {done} of {len(rounds)} batches, {left} left")
        yield number


def leave(status: int) -> NoReturn:
    """End this process with `status`, together with the other ranks."""
    if not is_joined():
        sys.exit(status)
    from pipeline.distributed import process_group

    process_group.leave(status)
