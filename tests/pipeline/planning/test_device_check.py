"""`launch/gpu_check.sh` in its small mode, and a step that is not exact."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from pipeline.config.schema import REPOSITORY
from pipeline.synthesis.combine import Synthesis
from tests.distributed import run_distributed


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_script_finds_every_step_exact_and_writes_its_rows(ranks: int, tmp_path: Path) -> None:
    environment = {**os.environ, "SMALL": str(ranks), "DS_ACCELERATOR": "cpu"}
    line = ["bash", "launch/gpu_check.sh", str(tmp_path)]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    for one in found["exact"]:
        assert not one["failed"] and one["resumed"] and max(one["rules"].values()) < 2e-5, one
    assert found["exact"][0]["gradients"] < 2e-6 and found["exact"][0]["joint"] < 2e-6  # of ZeRO-2 in fp32
    costs = {(cost["rule"], cost["schedule"]): cost for cost in found["steps"]["costs"]}
    assert set(costs) == {(rule, way) for rule in ("sum", "sago", "pcgrad") for way in ("sequential", "joint")}
    assert all(cost["seconds"] and min(cost["seconds"]) > 0 and cost["kernels"] for cost in costs.values())
    assert set(found["combination"]) == {"10", "100"}
    rows = (tmp_path / "benchmarks.md").read_text()
    assert "Exact on 2 of 2" in rows and rows.count("| joint |") == 3


def check_with_errors(names: list[str], folder: str) -> None:
    """On one rank: of each, a step that is wrong by a hundredth is found, and nothing else.

    The right steps are the same each time, and made once.
    """
    from pipeline.distributed import process_group
    from pipeline.planning import device_check
    from pipeline.planning.identities import Way, dense_gradients, resumes, step

    process_group.start()
    made: dict[str, list[Tensor]] = {}
    device_check.dense_gradients = cache(dense_gradients)
    device_check.resumes = cache(resumes)
    for name in names:

        def wrong(
            way: Way, synthesis: Synthesis | None, tasks: tuple[str, ...] = ("forget", "retain"), joint: bool = False
        ) -> list[Tensor]:
            key = repr((synthesis, tasks, joint))
            if key not in made:
                made[key] = step(way, synthesis, tasks, joint)
            rule = "joint" if joint else "gradients" if synthesis is None else f"{synthesis.rule} {synthesis.scope}"
            return [1.01 * part for part in made[key]] if rule == name else made[key]  # noqa: B023

        device_check.step = wrong
        found = device_check.check(Way(1), Path(folder), small=True)
        assert name in found.failed and found.resumed
        assert found.failed == [name] or name == "gradients"  # rules of wrong gradients are other steps


def test_a_step_that_is_wrong_is_named(tmp_path: Path) -> None:
    run_distributed(check_with_errors, 1, ["gradients", "pcgrad layer", "joint"], str(tmp_path))
