"""Which GPUs a sweep trains on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.eval.pretender import GRID, Pretender


def test_a_sweep_trains_on_visible_gpus(
    machine: Callable[..., None],
    pretender: Pretender,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine("3,5")
    assert command(*GRID, "--ranks", 3) == 2 and pretender.lines == []
    assert "--ranks 3" in capsys.readouterr().err
    assert command(*GRID) == 0 and "--include localhost:3,5 --module pipeline.train" in " ".join(pretender.lines[0])
