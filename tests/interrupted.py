"""Runs under way, to be cut off; and what of two runs must be the same, however often one of them was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config.schema import REPOSITORY
from tests.distributed import free_port, run_distributed

SECTIONS: dict[str, Any] = {  # gru has a state; kl asks the original, which is not what the checkpoint holds
    "objective": {"forget": "npo", "retain": "kl"},
    "synthesis": {"rule": "gru"},
    "optimizer": {"schedule": "linear", "warmup_ratio": 0.2, "eps": 1e-6},
    "train": {"steps": 12, "checkpoint_every": 3, "export_every": 4},
}


def command(config: Path, *more: str, ranks: int = 2) -> list[str]:
    module = ["--module", "pipeline.train", "--config", str(config), *more]
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), *module]


def complete(config: Path, *more: str, ranks: int = 2) -> None:
    """The same run, on ranks of the pool: no process is started.

    Raises:
        AssertionError: it does not end well.
    """
    run_distributed(run_in_process, ranks, ["--config", str(config), *more])


def run_in_process(arguments: list[str]) -> None:
    """What the command does with its arguments, but for how it ends."""
    from pipeline import trainer as train
    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.load import parse_command_line
    from pipeline.config.run_folder import check_output_dir

    config, resume, quiet = parse_command_line(arguments)
    check_output_dir(config, resume)
    train.run(config, deepspeed_config(config), resume, quiet)


STARTED: list[Started] = []


class Started:
    """A run under way, in a process group of its own. Its stderr goes to the file of that name beside `config`."""

    def __init__(self, config: Path, *more: str, launcher: Sequence[str] = (), **environment: str) -> None:
        """launcher: what starts the ranks, up to the program, in place of `deepspeed` with two of them."""
        own = [*launcher, "--config", str(config), *more]
        self.log, self.began = config.with_suffix(".stderr"), time.time()
        self.process = subprocess.Popen(
            own if launcher else command(config, *more),
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=self.log.open("w"),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's background job
        )

        STARTED.append(self)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def wait_for_lines(self, folder: Path, number: int) -> None:
        """Until it has itself brought the log to `number` lines."""
        log = folder / "metrics.jsonl"
        self.wait_for(lambda: log.exists() and log.stat().st_mtime > self.began and lines(folder) >= number)

    def ranks(self) -> list[psutil.Process]:
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in below if is_rank(one)]

    def ended(self) -> tuple[int, str]:
        """Status, and what it wrote to stderr. No process may be left a minute later: launchers wait for theirs."""
        status = self.process.wait(200)
        self.wait_for_the_others()
        return status, self.log.read_text()

    def wait_for_the_others(self) -> None:
        """Until no process of its group is left, which may hold the run folder."""
        deadline = time.monotonic() + 60
        while True:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.1)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.wait_for_the_others()


class Copied:
    """A run under way: the whole command, to its exit status, on ranks of the pool in place of a launcher.

    They are copies of a process that has imported everything, so their start costs seconds less than `Started`'s. How
    launchers pass on signals and statuses is tested where there are launchers (test_stop.py).
    """

    def __init__(self, config: Path, *more: str, ranks: int = 2) -> None:
        self.log, self.began = config.with_suffix(".stderr"), time.time()
        self.ids = [config.with_suffix(f".rank-{rank}") for rank in range(ranks)]
        for file in self.ids:
            file.unlink(missing_ok=True)
        given = ["--config", str(config), *more]
        self.call = ThreadPoolExecutor(1).submit(run_distributed, whole_command, ranks, given, self.log, self.ids)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not happened():
            assert not self.call.done() and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def wait_for_lines(self, folder: Path, number: int) -> None:
        """Until it has itself brought the log to `number` lines."""
        log = folder / "metrics.jsonl"
        self.wait_for(lambda: log.exists() and log.stat().st_mtime > self.began and lines(folder) >= number)

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(int(file.read_text())) for file in self.ids]

    def ended(self) -> tuple[set[int], str]:
        """Statuses of the ranks that did not end well, and what all wrote to stderr."""
        with pytest.raises(AssertionError) as caught:
            self.call.result(200)
        statuses = {int(code) for code in re.findall(r"ended with exit code (-?\d+)", str(caught.value))}
        return statuses, self.log.read_text()

    def kill(self) -> None:
        for rank in self.ranks():
            rank.kill()
        assert self.ended()[0] == {-signal.SIGKILL}


def whole_command(arguments: list[str], log: Path, ids: list[Path]) -> None:
    """On each rank: `pipeline.train`, which ends the process. Its stderr goes to `log`, its process id to a file."""
    from pipeline import train

    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    ids[int(os.environ["RANK"])].write_text(str(os.getpid()))
    sys.exit(train.main(arguments))


def is_rank(process: psutil.Process) -> bool:
    """Whether `process` is Python with the program, and not a launcher that names it."""
    words = process.cmdline()
    return bool(words) and "python" in words[0] and "pipeline.train" in words[1:4]


def lines(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock and a machine decide."""
    varying = ("seconds", "tokens_per_second", "peak_memory_bytes")
    log = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in varying} for line in log]


def card(folder: Path) -> list[str]:
    varying = ("seconds", "tokens_per_second", "peak_memory_bytes", "output:", "# ")
    text = (folder / "final" / "README.md").read_text().splitlines()
    return [line for line in text if not any(word in line for word in varying)]


def on_the_board(folder: Path) -> list[tuple[int, float]]:
    """The forget loss as TensorBoard has it, step by step."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("2_loss/forget_loss")]


def assert_same(one: Path, other: Path) -> None:
    """Weights of every export, log, board and model card."""
    assert on_the_board(one) == on_the_board(other) and len(on_the_board(one)) == lines(one)
    exports = sorted(path.relative_to(one) for path in one.rglob("model.safetensors"))
    assert exports == sorted(path.relative_to(other) for path in other.rglob("model.safetensors")) and exports
    for path in exports:
        first, second = load_file(one / path), load_file(other / path)
        assert all(torch.equal(first[name], second[name]) for name in first), path
    assert numbers(one) == numbers(other) and card(one) == card(other)
    assert not [path for path in other.rglob(".*") if path.is_dir()], "something half written is left"
