"""What the tests of this folder look at from several sides."""

from __future__ import annotations

import csv
import json
import shutil
from typing import Any

import pytest

from pipeline.config.schema import REPOSITORY
from tests.conftest import World
from tests.pipeline.monitoring.base import STEPS, train


@pytest.fixture(scope="session")
def told(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run, cut back to its checkpoint after 2 of 4 steps and resumed with --quiet: its folder, and what each wrote.

    DeepSpeed's csv_monitor and tensorboard are on in it; log.txt is that of the first, whole run.
    """
    folder = tmp_path_factory.mktemp("a board")  # with a space: what is printed is pasted into a shell
    monitors = {name: {"enabled": True, "output_path": str(folder / name)} for name in ("csv_monitor", "tensorboard")}
    zero = {**json.loads((REPOSITORY / "ds_configs/cpu.json").read_text()), **monitors}
    (folder / "zero.json").write_text(json.dumps(zero))
    config = world.write(
        folder / "run.yaml",
        folder / "runs" / "one",
        train={"steps": STEPS, "checkpoint_every": 2, "deepspeed": str(folder / "zero.json")},
        synthesis={"layer_geometry_every": 1, "gamma": 0.5},
        method="ga_sago",
    )
    first, run = train(config), folder / "runs" / "one"
    assert first.returncode == 0, first.stderr[-3000:]
    log = (run / "log.txt").read_text()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    second = train(config, "--resume", "--quiet")
    assert second.returncode == 0, second.stderr[-3000:]
    files = {file.stem: list(csv.reader(file.open())) for file in (folder / "csv_monitor" / "one").iterdir()}
    theirs = folder / "tensorboard" / "one"
    return {"run": run, "first": first, "second": second, "csv": files, "theirs": theirs, "log": log}
