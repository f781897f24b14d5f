"""A file system of a few MB fills up while a run writes to it: one line, nothing lost, and `--resume` ends the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import errors as pipeline_disk
from pipeline import errors as ranks
from pipeline.config.schema import REPOSITORY
from pipeline.errors import InputError
from pipeline.zero.checkpoint import newest
from tests.conftest import World
from tests.distributed import run_distributed
from tests.interrupted import SECTIONS, Started, assert_same, complete, on_the_board

PAGE = 4096


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a file system is not allowed here: {done.stderr.strip()}")

    def leave(self, room: int) -> None:
        """Fill it until `room` bytes are free."""
        state = os.statvfs(self.folder)
        with (self.folder / "filler").open("ab") as filler:
            filler.write(bytes(max(state.f_bavail * state.f_frsize - room, 0)))

    def grow(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", "--lazy", str(made.folder)], check=True)


def allocated(folder: Path) -> int:
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in folder.rglob("*") if file.is_file())


def fill(started: Started, folder: Path, after: int, disk: Disk, room: int) -> None:
    """While the run stands still, some time after its line `after`."""
    started.wait_for_lines(folder, after)
    ours = started.ranks()
    for rank in ours:
        rank.suspend()
    disk.leave(room)
    for rank in ours:
        rank.resume()


def told(started: Started) -> str:
    """The one line with which it ends, with status 1."""
    status, stderr = started.ended()
    print(f"{time.time() - started.began:.0f} s:\n{stderr[-2000:]}")
    assert status == 1 and "Traceback" not in stderr and "frame #" not in stderr
    (line,) = re.findall(r"^error: .*$", stderr, re.MULTILINE)
    assert re.search(r"; its disk has 0\.\d MiB left\. Make room and give --resume: ", line)
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "after", "stands"),
    [
        ("checkpoints/step-000006", 5, "step-000003"),
        ("exports/step-000008", 7, "step-000006"),
        ("final", 11, "step-000012"),
        ("metrics.jsonl", 4, "step-000006 or step-000009"),  # it ends when a page of memory is full
        ("tensorboard", 4, "step-000003 or step-000006"),  # likewise: what fits into the page is on the board
    ],
)
def test_the_disk_fills_up(
    what: str, after: int, stands: str, whole: Path, world: World, disk: Disk, tmp_path: Path
) -> None:
    room = 100_000  # for a few lines, but for neither a checkpoint nor an export
    if what == "final":
        room = 100_000 + allocated(whole / "exports" / "step-000012") + allocated(whole / "checkpoints" / "step-000012")
    folder = disk.folder / "run"
    if what in ("metrics.jsonl", "tensorboard"):  # what is small is alone on the small disk
        folder, room = tmp_path / "run", 0
        folder.mkdir()
        (folder / what).symlink_to(disk.folder / what)
        if what == "tensorboard":
            (disk.folder / what).mkdir()
    config = world.write(tmp_path / "full.yaml", folder, **SECTIONS)
    started = Started(config, "--train.keep_checkpoints", "9")  # none is removed, which would make room on the way
    fill(started, folder, after, disk, room)
    assert f"cannot write {folder / what} (" in told(started)
    last = newest(folder)
    assert last is not None and last.name in stands
    if what == "tensorboard":
        assert len(on_the_board(folder)) >= int(last.name[-6:]), "no checkpoint is ahead of the board"
    assert not list(folder.rglob(".*.unfinished"))

    if what.startswith("checkpoints"):  # not even a configuration can be written now
        disk.leave(0)
        assert f"cannot write {folder / 'config.yaml'} (" in told(Started(config, "--resume"))
        assert newest(folder) == last
    disk.grow()
    complete(config, "--resume")
    assert_same(whole, folder)


def fail_to_write(config_file: str) -> None:
    """On every rank: the disk of the first is full when it takes the run folder, and when it writes its files."""
    import errno

    import torch.distributed as dist
    import yaml

    from pipeline import startup
    from pipeline.config.schema import RunConfig
    from pipeline.distributed import process_group
    from pipeline.distributed.run_lock import RunLock
    from pipeline.errors import FatalError

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    process_group.start()
    config = RunConfig.model_validate(yaml.safe_load(Path(config_file).read_text()))
    folder = Path(config.output)
    folder.mkdir(exist_ok=True)
    startup.write_whole = full
    lock = RunLock(folder)
    if dist.get_rank() == 0:
        lock.take = full  # pyright: ignore[reportAttributeAccessIssue]
    for write in (lambda: startup.take_folder(lock, config, False), lambda: startup.write_run_files(config, {}, {})):
        with pytest.raises(FatalError, match=r"config\.yaml .*Make room and give --resume"):
            write()


def test_a_disk_that_is_full_at_the_start_is_an_error_of_all_ranks(world: World, tmp_path: Path) -> None:
    """One that ended alone would leave the others waiting for it, and they would report a lost rank."""
    run_distributed(fail_to_write, 2, str(world.write(tmp_path / "full.yaml", tmp_path / "run")))


def fail_to_mark(config_file: str) -> None:
    """On every rank: the disk of the first is full when it marks the checkpoint as whole."""
    import errno

    import yaml

    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.errors import FatalError
    from pipeline.trainer import run
    from pipeline.zero import checkpoint

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.write_whole = full
    config = RunConfig.model_validate(yaml.safe_load(Path(config_file).read_text()))
    with pytest.raises(FatalError, match=r"step-000001 .*Make room and give --resume"):
        run(config, deepspeed_config(config))


def test_a_disk_that_is_full_at_a_checkpoints_end_is_an_error_of_all_ranks(world: World, tmp_path: Path) -> None:
    train = {**world.configuration("")["train"], "steps": 2, "checkpoint_every": 1}
    run_distributed(fail_to_mark, 2, str(world.write(tmp_path / "full.yaml", tmp_path / "run", train=train)))
    assert not (tmp_path / "run" / "checkpoints" / "step-000001").exists(), "what is unfinished is removed"


@pytest.mark.slow
def test_a_full_cache(world: World, disk: Disk, tmp_path: Path) -> None:
    """Without its token sequences a run cannot be; without the file of reference likelihoods it can."""
    alone = [sys.executable, "-m", "pipeline.train"]
    disk.leave(0)
    for name, folder in (("tokens", tmp_path / "first"), ("reference", tmp_path / "second")):
        cache = folder / "cache"
        cache.mkdir(parents=True)
        (disk.folder / name).mkdir()
        (cache / name).symlink_to(disk.folder / name)
        config = world.write(
            tmp_path / f"{name}.yaml", folder / "run", cache=str(cache), objective={"forget": "npo"}, train={"steps": 1}
        )
        started = Started(config, launcher=alone)
        if name == "tokens":
            assert f"cannot write {cache / 'tokens'} (" in told(started)
            assert not (folder / "run").exists()
        else:
            status, stderr = started.ended()
            assert status == 0 and "Traceback" not in stderr
            (line,) = [line for line in stderr.splitlines() if "cannot write the reference cache" in line]
            assert line.startswith("warning: ") and "No space left" in line and "a resumed run computes it" in line
            assert not list((disk.folder / name).iterdir())
    disk.grow()
    again = [*alone, "--config", str(tmp_path / "tokens.yaml"), "--resume"]
    assert subprocess.run(again, cwd=REPOSITORY, capture_output=True, timeout=300, check=False).returncode == 0


@pytest.mark.slow  # like the others that mount a disk: not everybody may
def test_torch_and_safetensors_on_a_full_disk_are_understood(disk: Disk) -> None:
    from safetensors.torch import save_file

    disk.leave(64 * PAGE)
    tensor, file = torch.zeros(200_000), disk.folder / "part" / "file"
    writers = {
        "zip": lambda: torch.save(tensor, file),
        "plain": lambda: torch.save(tensor, file, _use_new_zipfile_serialization=False),
        "safetensors": lambda: save_file({"": tensor}, file),
        "python": lambda: file.write_bytes(tensor.numpy().tobytes()),
    }
    pattern = r"^cannot write .*/part \(.*MiB left\. Make room and give --resume"
    for write in writers.values():
        file.parent.mkdir()
        with pytest.raises(ranks.FatalError, match=pattern), pipeline_disk.disk_errors(file.parent, file.parent):
            write()
        assert not file.parent.exists()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: out of memory"), ValueError("no such name"), ConnectionResetError(104, "reset by peer")],
)
def test_what_is_not_the_disk_is_not_told_as_if(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, pipeline_disk.disk_errors(tmp_path / "a"):
        raise error
    assert caught.value is error


def test_other_refusals_of_a_disk_ask_for_no_room(tmp_path: Path) -> None:
    pattern = r"Read-only.*\. Make it writable and give --resume"
    with pytest.raises(ranks.FatalError, match=pattern) as caught, pipeline_disk.disk_errors(tmp_path / "a"):
        raise OSError(30, "Read-only file system")
    assert "MiB" not in str(caught.value)


def test_bad_input_that_is_read_while_a_cache_is_written_stays_bad_input(tmp_path: Path) -> None:
    with pytest.raises(KeyError), pipeline_disk.disk_errors(tmp_path / "a"):
        try:
            try:
                (tmp_path / "missing").read_text()
            except OSError as error:
                raise InputError("there is no file") from error
        except InputError as error:
            raise KeyError("as a library wraps it") from error
