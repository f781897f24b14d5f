"""An undisturbed run to compare with, once for all tests that disturb one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import World
from tests.interrupted import SECTIONS, STARTED, complete


@pytest.fixture(scope="session")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    complete(world.write(folder / "whole.yaml", folder / "run", **SECTIONS))
    kept = sorted(path.name for path in (folder / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-000009", "step-000012"]
    return folder / "run"


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Whatever a test that fails has started."""
    yield
    while STARTED:
        with suppress(ProcessLookupError):
            os.killpg(STARTED.pop().process.pid, signal.SIGKILL)
