"""Run a function on several gloo ranks that know what a launcher would have told them.

The ranks are a pool: they stay alive from call to call and from file to file, in one process group for each number of
ranks. `tests/rank.py` says what a rank forgets between two calls. A test whose subject is how processes start or end
starts its own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from pipeline.distributed.environment import free_port

GRACE = 10.0  # seconds that the other ranks have for words of their own once one has failed


class Ranks:
    """Processes of one process group, waiting for calls."""

    def __init__(self, world_size: int) -> None:
        # They are copies of a process that has imported what they need and done nothing yet: that takes 6 s a rank.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.rank"])
        port = free_port()
        self.have_left = False  # with status 0, as a command does at its end
        self.calls: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs))
            process.start()
            theirs.close()
            self.calls.append(mine)
            self.processes.append(process)

    def call(self, function: Callable[..., None], arguments: tuple[Any, ...], timeout: float) -> dict[int, str]:
        """rank -> why it has failed; of all ranks, once they have answered or `timeout` seconds have passed."""
        failed: dict[int, str] = {}
        waiting = {connection: rank for rank, connection in enumerate(self.calls)}
        deadline = time.monotonic() + timeout
        for connection, rank in list(waiting.items()):
            try:
                connection.send((function, arguments))
            except (BrokenPipeError, ConnectionResetError):
                failed[rank] = "its process had ended before the call"
                del waiting[connection]
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionResetError):
                    answer = self._ended(rank)
                if answer is not None:
                    failed[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE)
        why = "still waiting when another failed" if failed else f"no answer within {timeout:.0f} s"
        return failed | {rank: why for rank in waiting.values()}

    def _ended(self, rank: int) -> str | None:
        self.processes[rank].join(GRACE)
        self.have_left = True
        code = self.processes[rank].exitcode
        return None if code == 0 else f"its process ended with exit code {code}"

    def end(self) -> None:
        for connection in self.calls:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, port: int, calls: Connection) -> None:
    from tests.rank import serve  # in the rank alone: it imports torch and DeepSpeed

    serve(rank, world_size, port, calls)


_IDLE: defaultdict[int, list[Ranks]] = defaultdict(list)  # number of ranks -> pools that no call uses


def run_distributed(function: Callable[..., None], world_size: int, *arguments: Any, timeout: float = 400) -> None:
    """`function(*arguments)` on each of `world_size` ranks; two threads that call at once have two pools.

    `function` must be importable. What it raises on any rank, or the end of a rank with another status than 0, or no
    answer of one within `timeout` seconds, fails the caller. Whatever ended a rank, the next call has a new pool.
    """
    ranks = _IDLE[world_size].pop() if _IDLE[world_size] else Ranks(world_size)
    failed: dict[int, str] | None = None
    try:
        failed = ranks.call(function, arguments, timeout)
    finally:
        if failed == {} and not ranks.have_left:
            _IDLE[world_size].append(ranks)
        else:
            ranks.end()
    assert not failed, "\n".join(f"rank {rank} of {world_size}: {why}" for rank, why in sorted(failed.items()))


@atexit.register
def end_idle_ranks() -> None:
    """The next call of `run_distributed` has ranks that have run no other test."""
    for pools in _IDLE.values():
        while pools:
            pools.pop().end()
