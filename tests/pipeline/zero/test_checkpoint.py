"""Killed, stopped, out of disk, and resumed: the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.schema import REPOSITORY
from pipeline.zero.checkpoint import MARKER, newest, tidy
from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.interrupted import SECTIONS, Copied, Started, assert_same, complete, lines, numbers, run_in_process
from tests.pipeline.zero.stages import parts


def test_an_eventful_run_ends_bit_identical(whole: Path, world: World, tmp_path: Path) -> None:
    """The disk fills up; SIGTERM reaches one rank; then all are killed: each time it is resumed."""
    folder = tmp_path / "run"
    config = world.write(tmp_path / "cut.yaml", folder, **SECTIONS)

    started = Copied(config)
    started.wait_for(lambda: newest(folder) is not None)
    for rank in started.ranks():
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))  # as a full disk: files end there
    statuses, stderr = started.ended()
    assert statuses == {1} and "error: cannot write" in stderr and "Make room and give --resume" in stderr
    assert "Traceback" not in stderr
    assert newest(folder) == folder / "checkpoints" / "step-000003"

    started = Copied(config, "--resume")
    started.wait_for_lines(folder, 4)
    started.ranks()[1].send_signal(signal.SIGTERM)
    statuses, stderr = started.ended()
    found = newest(folder)
    assert statuses == {75} and "stopped by SIGTERM after step" in stderr and "Traceback" not in stderr
    assert found is not None and found.name == f"step-{lines(folder):06d}"

    started = Copied(config, "--resume")
    started.wait_for_lines(folder, 8)
    started.kill()
    assert not (folder / "final").exists()
    complete(config, "--resume")
    assert_same(whole, folder)

    # A run that is done is left alone; another configuration is refused by the key that differs.
    before = (folder / "metrics.jsonl").read_bytes()
    assert "optimizer.lr" in refused(config, "--optimizer.lr", "0.5")
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


def test_resumed_with_all_that_the_weights_do_not_depend_on_changed(whole: Path, world: World, tmp_path: Path) -> None:
    """Model, corpora and DeepSpeed file have moved; other intervals; activations are recomputed: bit-identical."""
    without_end(whole, tmp_path / "run", world)
    for name in ("model", "forget.jsonl", "retain.jsonl"):
        source = world.folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    shutil.copy(REPOSITORY / "ds_configs" / "cpu.json", tmp_path / "other.json")
    data = {task: {"path": str(tmp_path / f"{task}.jsonl")} for task in ("forget", "retain")}
    base = world.configuration("unused")
    changed: dict[str, Any] = {
        **SECTIONS,
        "model": {"path": str(tmp_path / "model"), "gradient_checkpointing": True},
        "data": {**base["data"], **data},
        "synthesis": {"rule": "gru", "layer_geometry_every": 1},
        "train": {**SECTIONS["train"], "export_every": 5, "max_skipped": 3, "deepspeed": str(tmp_path / "other.json")},
    }
    config = world.write(tmp_path / "changed.yaml", tmp_path / "run", **changed)
    complete(config, "--resume")
    first, second = (load_file(path / "final" / "model.safetensors") for path in (whole, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "run" / "exports" / "step-000010").exists()

    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "forget.jsonl").write_text((tmp_path / "forget.jsonl").read_text() + '{"text": "kara lovi"}\n')
    assert "data.forget differ" in refused(config)


def run_and_resume(configurations: list[dict[str, Any]]) -> None:
    """On every rank: each run, to `whole`; then again from its checkpoint in the middle, to `final`."""
    import torch.distributed as dist

    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.trainer import run as train

    for keys in configurations:
        config, folder = RunConfig.model_validate(keys), Path(keys["output"])
        train(config, deepspeed_config(config))
        if dist.get_rank() == 0:
            (folder / "final").rename(folder / "whole")
            shutil.rmtree(folder / "checkpoints" / "step-000004")
        dist.barrier()
        train(config, deepspeed_config(config), resume=True)


HALF: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "objective": {"forget": "npo"}, "synthesis": {"rule": "gru"}}
FEW: dict[str, Any] = {"forget": "rmu", "layer": 1, "steering_coeff": 2.0}
LORA: dict[str, Any] = {"lora": {"r": 2, "alpha": 4, "merge": True}}
RESUMED: dict[str, dict[str, Any]] = {
    **{f"bf16-{stage}": {"stage": stage, **HALF} for stage in (1, 2, 3)},
    **{f"lora-{stage}": {"stage": stage, "model": LORA} for stage in (0, 2, 3)},
    "lora-2-tied": {"stage": 2, "model": LORA, "tied": True},
    **{f"rmu-{stage}": {"stage": stage, "model": {"trainable": [r"down_proj"]}, "objective": FEW} for stage in (1, 3)},
}


@parts
def test_resumed_in_bf16_and_with_frozen_weights_bit_for_bit(more: bool, world: World, tmp_path: Path) -> None:
    """Moving average, master weights and moments come back whole; frozen weights come from where the run began."""
    configurations = []
    chosen = {name: case for name, case in RESUMED.items() if (name in ("lora-0", "lora-2", "rmu-1")) == more}
    for name, case in chosen.items():
        sections = dict(case)
        model = {"path": str(world.folder / ("tied" if sections.pop("tied", False) else "model"))}
        sections["model"] = {**model, **sections["model"]}
        (tmp_path / f"{name}.json").write_text(json.dumps({"zero_optimization": {"stage": sections.pop("stage")}}))
        train = {"steps": 4, "checkpoint_every": 2, "deepspeed": str(tmp_path / f"{name}.json")}
        configurations.append(world.configuration(tmp_path / name, train=train, **sections))
    run_distributed(run_and_resume, 2, configurations, timeout=450)
    for number, name in enumerate(chosen):
        for file in (tmp_path / name / "whole").glob("*.safetensors"):
            one, other = load_file(file), load_file(tmp_path / name / "final" / file.name)
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
            initial = load_file(Path(configurations[number]["model"]["path"]) / "model.safetensors")
            assert any(not torch.equal(one[key], initial[key].to(one[key].dtype)) for key in one), name
        assert list((tmp_path / name / "whole").glob("*.safetensors")), name
        if not name.startswith("bf16"):
            for file in (tmp_path / name / "checkpoints" / "step-000002").glob("*model_states.pt"):
                saved = torch.load(file, weights_only=False)
                assert not [key for key in saved["module"] if "lora_" not in key and "down_proj" not in key], (
                    name,
                    file,
                )
                assert not saved["frozen_param_fragments"], name


def write_refusal(config: Path, *more: str) -> None:
    from pipeline.errors import InputError

    with pytest.raises(InputError) as caught:
        run_in_process(["--config", str(config), "--resume", *more])
    config.with_suffix(".refusal").write_text(str(caught.value))


def refused(config: Path, *more: str) -> str:
    """The one line with which `--resume` refuses, on one rank."""
    run_distributed(write_refusal, 1, config, *more)
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
    (tmp_path / "exports" / ".step-000004.1f.unfinished").mkdir(parents=True)
    (tmp_path / ".config.yaml.2e.unfinished").touch()
    found = newest(tmp_path)
    assert found is not None and found.name == "step-000006"
    tidy(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert not list((tmp_path / "exports").iterdir()) and not list(tmp_path.glob(".*"))


def note_the_disk(config: Path) -> None:
    """A run on this rank; writes the paths of its fsync and unlink calls and of its renames, in order, to a file."""
    made: list[list[str]] = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def noting_fsync(handle: int) -> None:
        made.append(["fsync", os.readlink(f"/proc/self/fd/{handle}")])
        fsync(handle)

    def noting_replace(source: Path, target: Path) -> None:
        made.append(["replace", str(target)])
        replace(source, target)

    def noting_rmtree(path: str | Path, *arguments: Any, **named: Any) -> None:
        made.append(["remove", str(path)] if Path(path).exists() else ["nothing", str(path)])
        rmtree(path, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noting_fsync)
        patch.setattr(os, "replace", noting_replace)
        patch.setattr(shutil, "rmtree", noting_rmtree)
        run_in_process(["--config", str(config)])
    config.with_suffix(".calls").write_text(json.dumps(made))


def test_a_checkpoint_is_on_the_disk_before_it_counts_and_before_another_goes(world: World, tmp_path: Path) -> None:
    """So that a power cut, which loses what the disk has not written, leaves a whole one."""
    train = {"steps": 2, "checkpoint_every": 1, "keep_checkpoints": 1}
    config = world.write(tmp_path / "run.yaml", tmp_path / "run", train=train)
    run_distributed(note_the_disk, 1, config)
    calls = json.loads(config.with_suffix(".calls").read_text())
    first, second = (tmp_path / "run" / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    marked, removed = calls.index(["replace", str(second / MARKER)]), calls.index(["remove", str(first)])
    on_disk = {path for call, path in calls[:marked] if call == "fsync"}
    files = [str(file) for file in second.iterdir() if file.name != MARKER]
    assert len(files) >= 3 and {*files, str(tmp_path / "run" / "metrics.jsonl")} <= on_disk
    then = {path for call, path in calls[marked:removed] if call == "fsync"}
    assert {str(second), str(second.parent)} <= then


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
    partial = f".{there.name}.*.unfinished"  # of an export, and gone in a moment
    started = Started(config)
    if seed % 3 == 2:
        started.wait_for_lines(folder, dice.randrange(12))
    else:
        started.wait_for(lambda: there.exists() or any(there.parent.glob(partial)))
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
        train = {"steps": 100_000, "timeout_minutes": 0.1}
        started = Started(world.write(tmp_path / f"{name}.yaml", folder, train=train))
        started.wait_for_lines(folder, 2)
        strike(started)
        start = time.monotonic()
        status, stderr = started.ended()
        tail = [line for line in stderr.splitlines() if line.startswith(("error", "rank "))]
        print(f"{name}: status {status} after {time.monotonic() - start:.0f} s; {tail}")
        assert status != 0
        assert any(
            {"killed": "another rank was killed", "hangs": "train.timeout_minutes", "Ctrl-C": "interrupted"}[name] in t
            for t in tail
        )
