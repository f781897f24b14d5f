"""SIGTERM, and with which status ranks and their launchers end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.schema import REPOSITORY
from pipeline.distributed.signals import KILLED, STOPPED
from pipeline.zero.checkpoint import MARKER, newest
from tests.conftest import World
from tests.distributed import free_port
from tests.interrupted import SECTIONS, Started, assert_same, lines

DEAF = """
import ctypes
from pipeline.distributed import signals
signals.DUPLICATE_SIGTERM_S, asked = 1.0, signals.stop_on_sigterm()
print("ready", flush=True)
assert asked.wait(60)
print("asked", flush=True)
mutex = ctypes.create_string_buffer(64)
while True:  # the second time for ever, where Python sees no signal
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_an_echo_of_sigterm_is_not_a_second_one() -> None:
    with subprocess.Popen([sys.executable, "-c", DEAF], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "asked\n"
        process.terminate()
        time.sleep(1.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(20) == KILLED


# ---------------------------------------------------------------------------------------------------------------------
# Minutes: pytest -m slow


def moment(dice: random.Random, started: Started, folder: Path) -> str:
    """Wait for one that is still to come, while it trains, saves or exports; says which."""
    done = lines(folder)
    saves = [folder / "checkpoints" / f"step-{step:06d}" for step in (3, 6, 9) if step > done]
    exports = [folder / "exports" / f"step-{step:06d}" for step in (4, 8, 12) if step > done]
    what = dice.choice(["train"] + ["save"] * bool(saves) + ["export"] * bool(exports))
    if what == "train":
        started.wait_for_lines(folder, min(done + dice.randint(1, 4), 11))
    elif what == "save":
        there = dice.choice(saves)
        started.wait_for(there.exists)
    else:
        there = dice.choice(exports)
        partial = f".{there.name}.*.unfinished"
        started.wait_for(lambda: any(there.parent.glob(partial)) or there.exists())
    time.sleep(dice.random() * 0.2)
    return what


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_stopped_again_and_again(seed: int, whole: Path, world: World, tmp_path: Path) -> None:
    dice, folder = random.Random(seed), tmp_path / "run"
    config = world.write(tmp_path / "cut.yaml", folder, **SECTIONS)
    for target in (*dice.sample(["one", "all", "group"], 2), "nobody"):
        started = Started(config, "--resume")
        what = "-" if target == "nobody" else moment(dice, started, folder)
        ranks = started.ranks()
        if target == "group":  # a launcher in it passes on what the ranks were sent already
            os.killpg(started.process.pid, signal.SIGTERM)
        for rank in {"one": ranks[1:], "all": ranks}.get(target, []):
            rank.terminate()
        status, stderr = started.ended()
        found = newest(folder)
        print(f"seed {seed}: {what}, {target}: {status} at {lines(folder)} lines; {stderr.splitlines()[-1:]}")
        assert "Traceback" not in stderr
        if (folder / "final").exists():  # it came too late, or nobody was told
            assert status == (-signal.SIGTERM if target == "group" else 0)
            break
        assert target != "nobody" and status == (-signal.SIGTERM if target == "group" else STOPPED)
        assert found is not None and found.name == f"step-{lines(folder):06d}"
    assert_same(whole, folder)


# What a launcher makes of the statuses of its ranks: theirs to change, and told in docs/guides/troubleshooting.md.
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--no_python"],
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", "--no-python"],
    "mpirun": ["mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "--oversubscribe", "-np", "2"],
}
# Around a rank: its own status into a file.
TELL = """
trap : INT TERM
"$@"
status=$?
echo $status > "$STATUS_OF_RANKS/${RANK:-$OMPI_COMM_WORLD_RANK}"
exit $status
"""


def interrupt(started: Started) -> None:
    os.killpg(started.process.pid, signal.SIGINT)  # as a terminal does


def stop_one(started: Started) -> None:
    started.ranks()[1].terminate()


def stop_launcher(started: Started) -> None:
    started.process.terminate()


ENDS: dict[str, tuple[dict[str, object], Callable[[Started], None] | None]] = {
    "done": ({"steps": 1}, None),
    "bad input": ({"steps": 1, "batch_size": 7}, None),
    "error": ({"steps": 9, "max_skipped": 1}, None),
    "SIGTERM to one rank": ({"steps": 100_000}, stop_one),
    "SIGTERM to one rank while loading": ({"steps": 100_000}, stop_one),
    "SIGTERM to the launcher": ({"steps": 100_000}, stop_launcher),
    "Ctrl-C": ({"steps": 100_000}, interrupt),
}
EXPECTED = {"done": 0, "bad input": 2, "error": 1, "SIGTERM to one rank": STOPPED}  # of each rank


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_statuses(launcher: str, end: str, world: World, tmp_path: Path) -> None:
    folder, own = tmp_path / "run", tmp_path / "statuses"
    own.mkdir()
    train, strike = ENDS[end]
    lr = 1e30 if end == "error" else 1e-3
    config = world.write(tmp_path / "run.yaml", folder, train=train, optimizer={"lr": lr, "schedule": "constant"})
    port = ["--master_port", str(free_port())] if launcher == "deepspeed" else []
    wrapped = [*LAUNCHERS[launcher], *port, "bash", "-c", TELL, "-", sys.executable, "-m", "pipeline.train"]
    started = Started(config, launcher=wrapped, STATUS_OF_RANKS=str(own))
    if end.endswith("loading"):
        started.wait_for(lambda: len(started.ranks()) == 2)
        time.sleep(3)
    elif strike is not None:
        started.wait_for_lines(folder, 2)
    began = time.monotonic()
    if strike is not None:
        strike(started)
    if launcher == "deepspeed" and strike == stop_launcher:  # it does not tell them: docs/guides/resume.md
        status, before = started.process.wait(20), lines(folder)
        deadline = time.monotonic() + 60
        while lines(folder) < before + 3:
            assert time.monotonic() < deadline, "its ranks have stopped"
        started.kill()
        print(f"| {launcher} | {end} | {status} | its ranks go on")
        return
    status, stderr = started.ended()
    found = {int(file.name): int(file.read_text()) for file in own.iterdir()}
    saved = newest(folder)
    messages = [line for line in stderr.splitlines() if line.startswith(("error", "rank ", "stopped"))]
    seconds = time.monotonic() - began
    print(f"| {launcher} | {end} | {status} | ranks {found} | {seconds:.0f} s | {saved and saved.name} | {messages}")
    if end in EXPECTED:
        is_failure = end in ("error", "bad input")  # after one rank's, launchers kill the other before it says its own
        assert set(found.values()) - ({KILLED} if is_failure else set()) == {EXPECTED[end]}
        assert len(found) == 2 or is_failure
    assert (status == 0) == (end == "done")
    if end.endswith("loading"):
        assert not folder.exists()
    if end == "SIGTERM to one rank":
        assert saved is not None and saved.name == f"step-{lines(folder):06d}"
    assert not list(folder.glob(f"checkpoints/*/.{MARKER}"))
