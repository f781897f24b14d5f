"""Every rule on a device that pretends: all that a step needs is there, and the host waits for it once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from pipeline.config.schema import REPOSITORY


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """By rule, scope, metric and place of the forget gradient. A process of its own, because torch gets a device."""
    line = [sys.executable, "-m", "tests.pipeline.synthesis.on_device"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_device_gives_the_bits_of_the_cpu(found: dict[str, Any]) -> None:
    assert len(found) > 100 and not [case for case, seen in found.items() if not seen["same"]]


def test_the_host_reads_the_table_and_waits_for_nothing_else(found: dict[str, Any]) -> None:
    """Also where the forget gradients are in pinned memory, in parts of which several make up a window."""
    for case, seen in found.items():
        (wait,) = seen["waits"]
        assert "(4, 1" in wait, (case, wait)  # [parameters, columns]
