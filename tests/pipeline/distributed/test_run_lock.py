"""One folder, one run at a time: the second run is refused, and a kill leaves no lock behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from pipeline.config.schema import REPOSITORY
from pipeline.distributed.run_lock import RunLock
from pipeline.errors import InputError
from tests.conftest import World
from tests.interrupted import Copied, Started, lines


def hold(do: Callable[[RunLock], None], folder: Path) -> BaseProcess:
    """A process that holds the lock until it is killed."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work() -> None:
        lock = RunLock(folder)
        do(lock)
        ready.set()
        signal.pause()

    process = context.Process(target=work, daemon=True)
    process.start()
    assert ready.wait(30)
    return process


def first_rank(lock: RunLock) -> None:
    lock.take()
    lock.share()


def test_a_lock_is_held_as_long_as_any_rank_lives_and_no_longer(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    first, second = hold(first_rank, folder), hold(RunLock.share, folder)
    for rank in (first, second):
        with pytest.raises(InputError, match=f"output: {folder} is in use by another run"):
            RunLock(folder).take()
        assert rank.pid is not None
        os.kill(rank.pid, signal.SIGKILL)
        rank.join()
    lock = RunLock(folder)
    lock.take()
    with pytest.raises(InputError):
        RunLock(folder).share()  # another run acquired it in between
    lock.release()
    RunLock(folder).take()


def alone(config: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.train", "--config", str(config), *more]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def test_two_runs_that_start_together_are_one(world: World, tmp_path: Path) -> None:
    """Neither finds a run in the folder when it checks."""
    keys = {"train": {"steps": 2}}
    files = [world.write(tmp_path / f"{name}.yaml", tmp_path / "run", **keys) for name in ("one", "other")]
    commands = [Copied(file, ranks=1) for file in files]
    refused = [command for command in commands if command.call.exception(300) is not None]
    assert len(refused) == 1, [command.log.read_text() for command in commands]
    statuses, printed = refused[0].ended()
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert statuses == {2} and ("is in use by another run" in line or "already holds a run" in line)
    assert "Traceback" not in printed and lines(tmp_path / "run") == 2


@pytest.mark.slow
def test_a_run_under_way_is_not_resumed_beside_itself_but_after_a_kill(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = world.write(tmp_path / "run.yaml", folder, train={"steps": 100_000})
    started = Started(config)
    started.wait_for_lines(folder, 2)
    process = alone(config, "--resume")
    printed = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and f"error: output: {folder} is in use by another run" in printed
    started.kill()
    again = Started(config, "--resume")
    again.wait_for_lines(folder, 2)
    again.kill()
