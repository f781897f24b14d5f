"""The end of a run: whatever fails once the last step is made, its weights are on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from tests.conftest import World
from tests.distributed import run_distributed


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def denied(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "README.md")


def end(config_file: str, what: str) -> None:
    """On every rank: a run of which the first one cannot do `what` at the end."""
    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.errors import FatalError
    from pipeline.modeling import card
    from pipeline.monitoring.metrics import Monitor
    from pipeline.trainer import run

    config = RunConfig.model_validate(yaml.safe_load(Path(config_file).read_text()))
    flush = Monitor.flush

    def flush_and_break(metrics: Monitor, step: int) -> object:
        if step == config.train.steps and dist.get_rank() == 0:
            if what == "board":
                metrics.board.end = full  # pyright: ignore[reportAttributeAccessIssue]
            if what == "log":
                metrics.lines = SimpleNamespace(write=full)  # pyright: ignore[reportAttributeAccessIssue]
        return flush(metrics, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "flush", flush_and_break)
        if what == "card":
            patch.setattr(card, "licence", denied)
        if what in ("board", "log"):
            file = {"board": "tensorboard", "log": r"metrics\.jsonl"}[what]
            with pytest.raises(FatalError, match=rf"{file} .*Make room and give --resume"):
                run(config, deepspeed_config(config))
        else:
            run(config, deepspeed_config(config))


@pytest.mark.parametrize(("what", "folder"), [("card", "final"), ("board", "final"), ("log", "exports/step-000002")])
def test_the_weights_outlive_what_fails_after_the_last_step(
    what: str, folder: str, world: World, tmp_path: Path
) -> None:
    """`final` is the model of the last row of the log, so one whose row is missing is known by its own number."""
    train = {"steps": 2, "export_every": 0}
    for name in ("nothing", what):
        config = world.write(
            tmp_path / f"{name}.yaml", tmp_path / name, train={**world.configuration("")["train"], **train}
        )
        run_distributed(end, 2, str(config), name)
    expected = load_file(tmp_path / "nothing" / "final" / "model.safetensors")
    found = load_file(tmp_path / what / folder / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / what / "final").exists() == (folder == "final")
    assert (tmp_path / what / folder / "README.md").exists() == (what != "card")
