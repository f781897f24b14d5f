"""Which GPUs a script, a sweep and an attack train on, by the launcher's own account."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.launcher import runner
from torch.distributed.run import config_from_args, parse_args

from pipeline.distributed.launcher import rank_launcher, startable
from pipeline.errors import InputError
from tests.conftest import GPUS


class Started(Exception):
    """In place of the processes that the launcher would start."""


def physical(options: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPUs on which DeepSpeed's launcher puts the ranks of `deepspeed OPTIONS`, on a machine with GPUS."""

    def start(command: list[str], **_: Any) -> None:
        raise Started(next(part for part in command if part.startswith("--world_info=")).partition("=")[2])

    accelerator = SimpleNamespace(visible_devices_envs=lambda: ["CUDA_VISIBLE_DEVICES"], device_count=lambda: GPUS)
    with monkeypatch.context() as patch:
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)  # the launcher deletes it
        patch.setattr(runner, "get_accelerator", lambda: accelerator)
        patch.setattr(runner.subprocess, "Popen", start)
        with pytest.raises(Started) as started:
            runner.main([*options, "--module", "pipeline.train"])
    return json.loads(base64.urlsafe_b64decode(str(started.value)))["localhost"]


@pytest.mark.parametrize(
    "visible, ranks, expected",
    [
        *(("2,3", 2, [2, 3]), ("6,4,5", 1, [6]), (" 5 , 7", 2, [5, 7]), (None, 2, [0, 1]), (None, 8, [*range(8)])),
        *(("6,4,5", None, [4, 5, 6]), (None, None, [*range(8)])),
    ],
)
def test_ranks_are_on_visible_gpus(
    visible: str | None,
    ranks: int | None,
    expected: list[int],
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(visible)
    launcher, *options = rank_launcher(ranks)
    assert launcher == "deepspeed" and physical(options, monkeypatch) == expected


def test_more_ranks_than_gpus_are_refused(machine: Callable[..., None]) -> None:
    """Rank 1 would ask for a device that is not there."""
    for visible, gpus, message in (("3", GPUS, "1 GPU"), ("3,5", GPUS, "2 GPUs"), (None, 1, "1 GPU")):
        machine(visible, gpus)
        with pytest.raises(InputError, match=f"--ranks 4: .* {message}.*; give --ranks {message[0]}"):
            rank_launcher(4)


@pytest.mark.parametrize("visible", ["GPU-5f1c", "GPU-5f1c, GPU-77aa", "MIG-5f1c", "MIG-GPU-5f1c/1/0", "1,GPU-77aa"])
def test_gpus_without_numbers_keep_their_names(
    visible: str, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's launcher, which knows numbers alone, is not called; torchrun passes the variable on as it is."""
    machine(visible)
    with pytest.raises(ValueError, match="invalid literal for int"):
        physical(["-q"], monkeypatch)
    ranks = len(visible.split(","))
    program, *options = startable(rank_launcher(ranks))
    assert Path(program).name == "torchrun" and options[0] == "--master_port"
    settings, command, arguments = config_from_args(
        parse_args([*options[2:], "--module", "pipeline.train", "--seed", "3"])
    )
    assert (settings.min_nodes, settings.nproc_per_node) == (1, ranks)
    assert isinstance(command, str) and arguments[-4:] == ["-m", "pipeline.train", "--seed", "3"]


def test_ranks_on_the_first_of_several_gpus_by_number_need_no_other_launcher(machine: Callable[..., None]) -> None:
    machine("6,GPU-77aa")
    assert rank_launcher(1) == ["deepspeed", "-q", "--include", "localhost:6"]


@pytest.mark.parametrize("visible", ["", "2,3"])
def test_a_cpu_has_as_many_ranks_as_are_named(
    visible: str, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the launcher's devices are the machine's sockets, of which numbers 2 and 3 may not exist."""
    machine(visible)
    if visible:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert rank_launcher(3) == ["deepspeed", "-q", "--num_gpus", "3"]
    assert rank_launcher(None) == ["deepspeed", "-q", "--num_gpus", "2"]
