"""`launch/ranks.sh`: what a script starts, where the machine has GPUs and where it has none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.config.schema import REPOSITORY

SCRIPT = '. launch/ranks.sh; choose_device; choose_launcher {}; printf "%s|" "${{DS_ACCELERATOR:-}}" "${{launcher[@]}}"'


def chosen(tmp_path: Path, arguments: str, visible: str | None, gpus: int) -> tuple[int, list[str], str]:
    """Exit status, the accelerator and the words of the launcher but for the free port, and what is on stderr."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import torch\ntorch.cuda.device_count = lambda: {gpus}\ntorch.cuda.is_available = lambda: {gpus > 0}\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
    done = subprocess.run(
        ["bash", "-euc", SCRIPT.format(arguments)],
        cwd=REPOSITORY,
        env={**kept, "PYTHONPATH": str(tmp_path), **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        return done.returncode, [], done.stderr
    accelerator, program, option, port, *words = done.stdout.removesuffix("|").split("|")
    assert option == "--master_port" and port.isdecimal()
    return 0, [accelerator, program, *words], done.stderr


@pytest.mark.parametrize(
    ("visible", "gpus", "ranks", "expected"),
    [
        (None, 0, "", ["cpu", "deepspeed", "-q", "--num_gpus", "2"]),
        (None, 0, "1", ["cpu", "deepspeed", "-q", "--num_gpus", "1"]),
        ("6,4", 2, "1", ["", "deepspeed", "-q", "--include", "localhost:6"]),
        ("GPU-5f1c,GPU-77aa", 2, "", ["", "torchrun", "--nproc_per_node", "2"]),
    ],
)
def test_scripts_start_ranks_on_the_visible_gpus(
    visible: str | None, gpus: int, ranks: str, expected: list[str], tmp_path: Path
) -> None:
    """DeepSpeed's `--num_gpus 1` would take GPU 0 whatever is visible, and knows GPUs by their numbers alone."""
    assert chosen(tmp_path, ranks, visible, gpus) == (0, expected, "")


def test_a_script_ends_where_there_are_fewer_gpus_than_ranks(tmp_path: Path) -> None:
    status, _, error = chosen(tmp_path, "3", "5", 1)
    assert status == 1 and error.startswith("error: ") and "CUDA_VISIBLE_DEVICES=5" in error
