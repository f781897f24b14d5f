"""`launch/ranks.sh`: which launcher a script calls for the GPUs of CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.config.schema import REPOSITORY


def called(tmp_path: Path, lines: str, **environment: str) -> list[str]:
    """The words with which a script of these lines calls a launcher, but for the free port."""
    for name in ("deepspeed", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%s|" {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    visible = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        ["bash", "-euc", lines],
        cwd=REPOSITORY,
        env={**visible, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.strip("|").split("|")
    port = words.index("--master_port")
    assert words[port + 1].isdecimal()
    return words[:port] + words[port + 2 :]


@pytest.mark.parametrize("visible", [None, "2,3", " 5 , 7", "GPU-5f1c,GPU-77aa", "MIG-5f1c", "1,GPU-77aa"])
def test_ranks_start_on_gpus_that_have_no_numbers(visible: str | None, tmp_path: Path) -> None:
    """DeepSpeed's launcher ends with a traceback at one that is no number; `--num_gpus` makes it ignore them."""
    more = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    start = '. launch/ranks.sh; choose_launcher {}; "${{launcher[@]}}" --module pipeline.train --seed 3'
    program = ["--module", "pipeline.train", "--seed", "3"]
    expected = ["torchrun", "--nproc_per_node", "gpu"] if visible and "-" in visible else ["deepspeed", "-q"]
    assert called(tmp_path, start.format(""), **more) == [*expected, *program]
    assert called(tmp_path, start.format("--num_gpus 2"), **more) == ["deepspeed", "-q", "--num_gpus", "2", *program]
