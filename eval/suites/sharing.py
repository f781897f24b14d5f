"""Several ranks: each works on its share of the batches, and all of them get every result, in the order of one rank.

One process alone forms no group and imports neither torch nor DeepSpeed here, so that it refuses bad input quickly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn, TypeVar

from eval.suites.progress import Progress, Unit
from pipeline.distributed.environment import world_from_environment

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
    no batch left repeats the last one, because a forward pass of a sharded model needs every rank. Progress counts
    batches.

    Raises:
        torch.OutOfMemoryError: on every rank, if `work` raised it on one. Of a sharded model it ends that rank alone,
            because the others wait for it inside a forward pass.
    """
    return _share(batches, lambda batch, _: work(batch), [1] * len(batches), Unit("batch", "batches"), title)


def share_writing(
    batches: Sequence[Batch],
    work: Callable[[Batch, Callable[[], None]], Result],
    lengths: Sequence[int],
    title: str,
) -> list[Result]:
    """The same of answers, which take minutes a batch on a CPU: progress counts the tokens of a row.

    Args:
        work: gets a function as well, to call after each token.
        lengths: the most tokens that it writes for a row of each batch.
    """
    return _share(batches, work, lengths, Unit("token", "tokens"), title)


def _share(
    batches: Sequence[Batch],
    work: Callable[[Batch, Callable[[], None]], Result],
    lengths: Sequence[int],
    unit: Unit,
    title: str,
) -> list[Result]:
    import torch

    rank, size = rank_and_size()
    own_batches = [min(i, len(batches) - 1) for i in range(rank, -(-len(batches) // size) * size, size)]
    progress = Progress(sum(lengths[i] for i in own_batches), title, unit, is_shown=rank == 0)
    own, lacks = [], None
    try:
        for i in own_batches:
            end = progress.done + lengths[i]
            own.append(work(batches[i], progress.advance))
            progress.advance(end - progress.done)
    except torch.OutOfMemoryError as error:
        if _is_sharded[0]:
            raise
        lacks = str(error)
    finally:
        progress.bar.close()
    parts, all_lack = [own] * size, [lacks] * size
    if size > 1:
        torch.distributed.all_gather_object(all_lack, lacks)
        torch.distributed.all_gather_object(parts, own)
    if found := [one for one in all_lack if one is not None]:
        raise torch.OutOfMemoryError(found[0])
    return [parts[i % size][i // size] for i in range(len(batches))]


def leave(status: int) -> NoReturn:
    """End this process with `status`, together with the other ranks."""
    if not is_joined():
        sys.exit(status)
    from pipeline.distributed import process_group

    process_group.leave(status)
