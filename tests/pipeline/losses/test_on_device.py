"""Every objective on a device that pretends: all that it needs is there."""

from __future__ import annotations

import json
import subprocess
import sys

from pipeline.config.schema import REPOSITORY
from pipeline.losses.objectives import OBJECTIVES


def test_the_device_gives_the_bits_of_the_cpu_and_the_host_waits_at_most_for_the_number_of_predictions() -> None:
    """From logits it waits for nothing. A process of its own, because torch gets a device."""
    line = [sys.executable, "-m", "tests.pipeline.losses.on_device"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {case.split()[0] for case in found} == set(OBJECTIVES)
    for case, seen in found.items():
        name, way = case.split()
        assert seen["same"], case
        reads_states = way == "logits" or OBJECTIVES[name].hidden
        assert seen["waits"] == ([] if reads_states else ["aten::nonzero"]), case
