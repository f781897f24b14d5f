"""`launch/gpu_check.sh` in its small mode, and a step that is not exact."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from torch import Tensor

from pipeline.config.schema import REPOSITORY
from pipeline.synthesis.combine import Synthesis
from tests.distributed import run_distributed


def test_the_script_finds_every_step_exact_and_writes_its_rows(tmp_path: Path) -> None:
    environment = {**os.environ, "SMALL": "1", "DS_ACCELERATOR": "cpu"}
    line = ["bash", "launch/gpu_check.sh", str(tmp_path)]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    for one in found["exact"]:
        assert not one["failed"] and one["resumed"] and max(one["rules"].values()) < 2e-5, one
    assert found["exact"][0]["gradients"] < 2e-6 and found["exact"][0]["joint"] < 2e-6  # of ZeRO-2 in fp32
    costs = {(cost["rule"], cost["schedule"]): cost for cost in found["steps"]["costs"]}
    assert set(costs) == {(rule, way) for rule in ("sum", "sago", "pcgrad") for way in ("sequential", "joint")}
    assert all(len(cost["seconds"]) == 2 and min(cost["seconds"]) > 0 and cost["kernels"] for cost in costs.values())
    assert set(found["combination"]) == {"10", "100"}
    rows = (tmp_path / "benchmarks.md").read_text()
    assert "Exact on 2 of 2" in rows and rows.count("| joint |") == 3


def check_with_an_error(name: str, folder: str) -> None:
    """On one rank: a step of `name` that is wrong by a hundredth is found, and nothing else."""
    from pipeline.distributed import process_group
    from pipeline.planning import device_check
    from pipeline.planning.identities import Way, step

    def wrong(
        way: Way, synthesis: Synthesis | None, tasks: tuple[str, ...] = ("forget", "retain"), joint: bool = False
    ) -> list[Tensor]:
        gradient = step(way, synthesis, tasks, joint)
        rule = "joint" if joint else "gradients" if synthesis is None else f"{synthesis.rule} {synthesis.scope}"
        return [1.01 * part for part in gradient] if rule == name else gradient

    process_group.start()
    device_check.step = wrong
    try:
        found = device_check.check(Way(1), Path(folder), small=True)
    finally:
        device_check.step = step
    assert name in found.failed and found.resumed
    assert found.failed == [name] or name == "gradients"  # rules of wrong gradients are other steps


@pytest.mark.parametrize("name", ["gradients", "pcgrad layer", "joint"])
def test_a_step_that_is_wrong_is_named(name: str, tmp_path: Path) -> None:
    run_distributed(check_with_an_error, 1, name, str(tmp_path))
