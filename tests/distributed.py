"""Run a function on several gloo ranks, as a training process would be started."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run_distributed(function: Callable[..., None], world_size: int, *arguments: Any, timeout: float = 400) -> None:
    """`function(*arguments)` in `world_size` fresh processes that only know what a launcher would have told them.

    `function` must be importable. An assertion that fails on any rank fails the caller.
    """
    # Ranks are copies of a process that has imported these and done nothing yet, which takes 6 s a rank otherwise.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "peft", "transformers.models.llama.modeling_llama", "pipeline.shards"])
    port = free_port()
    ranks = [
        context.Process(target=_worker, args=(rank, world_size, port, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * world_size, f"exit codes of the ranks: {codes}"


def _worker(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from pipeline.ranks import leave

    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
