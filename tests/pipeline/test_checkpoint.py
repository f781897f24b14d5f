"""Killed, stopped, out of disk, and resumed: the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.checkpoint import MARKER, newest, tidy
from pipeline.config import REPOSITORY
from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.interrupted import SECTIONS, Started, assert_same, carry_out, complete, lines, numbers


def test_an_eventful_run_ends_bit_identical(whole: Path, world: World, tmp_path: Path) -> None:
    """The disk fills up; SIGTERM reaches one rank; then all are killed: each time it is resumed."""
    folder = tmp_path / "run"
    config = world.write(tmp_path / "cut.yaml", folder, **SECTIONS)

    started = Started(config)
    started.wait_for(lambda: newest(folder) is not None)
    for rank in started.ranks():
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))  # as a full disk: files end there
    status, stderr = started.ended()
    assert status == 1 and "error: cannot write" in stderr and "Make room and give --resume" in stderr
    assert "Traceback" not in stderr
    assert newest(folder) == folder / "checkpoints" / "step-000003"

    started = Started(config, "--resume")
    started.wait_for_lines(folder, 4)
    started.ranks()[1].send_signal(signal.SIGTERM)
    status, stderr = started.ended()
    found = newest(folder)
    assert status == 75 and "stopped by SIGTERM after step" in stderr and "Traceback" not in stderr
    assert found is not None and found.name == f"step-{lines(folder):06d}"

    started = Started(config, "--resume")
    started.wait_for_lines(folder, 8)
    started.kill()
    assert not (folder / "final").exists()
    complete(config, "--resume")
    assert_same(whole, folder)

    # A run that is done is left alone; another configuration is refused by the key that differs.
    before = (folder / "metrics.jsonl").read_bytes()
    alone = [sys.executable, "-m", "pipeline.train", "--config", str(config), "--resume"]
    other = subprocess.run(
        [*alone, "--optimizer.lr", "0.5"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert other.returncode == 2 and "optimizer.lr" in other.stderr and "Traceback" not in other.stderr
    complete(config, "--resume", ranks=1)
    assert (folder / "metrics.jsonl").read_bytes() == before


def without_end(whole: Path, folder: Path, world: World) -> Path:
    """The configuration of a copy of `whole` that stands at step 9. Its `config.yaml` names the folder it was in."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints" / "step-000012")
    return world.write(folder.with_suffix(".yaml"), folder, **SECTIONS)


@pytest.mark.parametrize("ranks", [1, 3])
def test_resumed_on_another_number_of_ranks(ranks: int, whole: Path, world: World, tmp_path: Path) -> None:
    config = without_end(whole, tmp_path / "run", world)
    complete(config, "--resume", ranks=ranks)
    first, second, initial = (
        load_file(path / "model.safetensors")
        for path in (whole / "final", tmp_path / "run/final", world.folder / "model")
    )
    assert oracle.weight_change_error(second, first, initial) < 2e-5
    for one, other in zip(numbers(whole), numbers(tmp_path / "run"), strict=True):
        assert one["step"] == other["step"] and one["lr"] == other["lr"]
        assert one["retain_loss"] == pytest.approx(other["retain_loss"], rel=1e-3)


def write_refusal(config: Path) -> None:
    from pipeline.config import InputError

    with pytest.raises(InputError) as caught:
        carry_out(["--config", str(config), "--resume"])
    config.with_suffix(".refusal").write_text(str(caught.value))


def refused(config: Path) -> str:
    """The one line with which `--resume` refuses, on one rank."""
    run_distributed(write_refusal, 1, config)
    line = config.with_suffix(".refusal").read_text()
    assert "\n" not in line
    return line


def test_a_damaged_or_foreign_checkpoint_is_named(whole: Path, world: World, tmp_path: Path) -> None:
    config = without_end(whole, tmp_path / "run", world)
    last = tmp_path / "run" / "checkpoints" / "step-000009"
    shard = next(last.glob("*pp_rank_1*optim_states.pt"))
    good = shard.read_bytes()
    for bad in (good[:-100], good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]):
        shard.write_bytes(bad)
        line = refused(config)
        assert str(last) in line and "damaged" in line and shard.name in line and "remove it" in line
    shard.unlink()
    assert shard.name in refused(config)
    shard.write_bytes(good)
    marker = json.loads((last / MARKER).read_text())
    marker["run"]["optimizer.lr"], marker["run"]["data.forget"] = 0.5, "another text"
    (last / MARKER).write_text(json.dumps(marker))
    line = refused(config)
    assert "another run" in line and "optimizer.lr" in line and "data.forget" in line and str(last) in line


def test_half_a_checkpoint_is_not_one_and_is_swept_away(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for name, done in (("02", True), ("04", True), ("05", False), ("06", True), ("08", False)):
        folder = tmp_path / "checkpoints" / f"step-0000{name}"
        folder.mkdir(parents=True)
        (folder / "shard.pt").touch()
        if done:
            (folder / MARKER).touch()
    (tmp_path / "exports" / ".step-000004.unfinished").mkdir(parents=True)
    found = newest(tmp_path)
    assert found is not None and found.name == "step-000006"
    tidy(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert not list((tmp_path / "exports").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Minutes: pytest -m slow


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_moment(seed: int, whole: Path, world: World, tmp_path: Path) -> None:
    """A third of the kills while a checkpoint is written, a third while a model is exported, the others anywhere."""
    dice = random.Random(seed)
    folder = tmp_path / "run"
    config = world.write(tmp_path / "cut.yaml", folder, **SECTIONS)
    step = dice.choice([3, 6, 9, 12] if seed % 3 == 0 else [4, 8, 12])
    if seed % 3 == 0:
        there = folder / "checkpoints" / f"step-{step:06d}"
    else:
        there = folder / "final" if step == 12 else folder / "exports" / f"step-{step:06d}"
    partial = there.with_name(f".{there.name}.unfinished")  # of an export, and gone in a moment
    started = Started(config)
    if seed % 3 == 2:
        started.wait_for_lines(folder, dice.randrange(12))
    else:
        started.wait_for(lambda: there.exists() or partial.exists())
    time.sleep(dice.random() * (0.1 if seed % 3 < 2 else 0.5))
    started.kill()
    state = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()) if folder.exists() else []
    )
    print(f"seed {seed}: killed at {lines(folder)} lines; {state}")
    complete(config, "--resume")
    assert_same(whole, folder)


@pytest.mark.slow
def test_one_rank_dies_hangs_or_all_are_interrupted(world: World, tmp_path: Path) -> None:
    """All end within a bound; what each says is printed."""
    faults: dict[str, Callable[[Started], None]] = {
        "killed": lambda started: started.ranks()[1].kill(),
        "hangs": lambda started: started.ranks()[1].suspend(),
        "Ctrl-C": lambda started: os.killpg(started.process.pid, signal.SIGINT),
    }
    for name, strike in faults.items():
        folder = tmp_path / name
        train = {"steps": 100_000, "timeout": 0.1}
        started = Started(world.write(tmp_path / f"{name}.yaml", folder, train=train))
        started.wait_for_lines(folder, 2)
        strike(started)
        start = time.monotonic()
        status, stderr = started.ended()
        tail = [line for line in stderr.splitlines() if line.startswith(("error", "rank "))]
        print(f"{name}: status {status} after {time.monotonic() - start:.0f} s; {tail}")
        assert status != 0
        assert any(
            {"killed": "another rank ended", "hangs": "train.timeout", "Ctrl-C": "interrupted"}[name] in t for t in tail
        )
