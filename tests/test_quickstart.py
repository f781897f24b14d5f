"""What `launch/quickstart.sh` shows while it runs, with commands that only pretend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretended import make_clone

DEEPSPEED = """#!/bin/bash
while [ $# -gt 0 ]; do [ "$1" != --output ] || output="$2"; shift; done
echo "some library's line"
echo "warning: look out" >&2
echo "step 1 of 4: forget 0.5" >&2
case "$output" in *"${FAILS:-nothing}"*) echo "error: it broke" >&2; exit 1 ;; esac
mkdir -p "$output/final"
"""
PYTHON = r"""#!/bin/bash
case "$*" in
"-m pipeline.distributed.launcher 2") printf "%s\n" deepspeed --master_port 29999 -q --num_gpus 2 ;;
*) while [ $# -gt 0 ]; do [ "$1" != --output ] || { mkdir -p "$(dirname "$2")"; : >"$2"; }; shift; done ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The script and what it sources, in an environment that is installed already and holds the pretenders."""
    return make_clone(tmp_path, ("launch/quickstart.sh",), python=PYTHON, deepspeed=DEEPSPEED)


def start(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "SEEDS"}
    line = ["bash", "launch/quickstart.sh"]
    environment = {**given, "PYTHON": sys.executable, **environment}
    return subprocess.run(line, cwd=clone, env=environment, capture_output=True, text=True, timeout=120)


def test_progress_number_of_runs_and_logs_are_shown(clone: Path) -> None:
    done = start(clone, SEEDS="0 7")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    trainings = [line for line in lines if "] training " in line]
    assert [re.findall(r"\((\d+) of 7", line) for line in trainings] == [[str(n)] for n in range(1, 8)]
    for line in trainings:
        log = line.rpartition("log: ")[2]
        text = (clone / log).read_text()
        assert "some library's line" in text and "step 1 of 4" in text
    assert all("min left" in line for line in trainings[2:]) and not any("min left" in line for line in trainings[:2])
    assert lines.count("step 1 of 4: forget 0.5") == lines.count("warning: look out") == 7
    assert "some library's line" not in lines and "takes a third" not in done.stdout
    again = start(clone, SEEDS="0 7")
    assert again.returncode == 0 and "training" not in again.stdout


def test_one_seed_is_offered_first(clone: Path) -> None:
    done = start(clone, FAILS="ga_sum-seed0")
    assert done.stdout.splitlines()[0].startswith("== three seeds") and "SEEDS=0" in done.stdout.splitlines()[0]
    assert done.returncode == 1 and "error: it broke" in done.stderr
    assert "the whole log is runs/quickstart/ga_sum-seed0.log" in done.stderr and "seed1" not in done.stdout
