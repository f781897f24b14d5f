"""What the tests of the configuration share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import RunConfig
from pipeline.errors import InputError

Resolve = Callable[..., RunConfig]
METHODS = {
    "npo_pcgrad": {"objective": {"forget": "npo", "beta": 0.5}, "synthesis": {"rule": "pcgrad"}},
    "ga_sum": {"objective": {"forget": "ga"}, "synthesis": {"rule": "sum", "alpha": 0.1}},
    "empty": {},
}
STAGE3 = {"zero_optimization": {"stage": 3}}
NVME = {"device": "nvme", "nvme_path": "disk"}


def keys(folder: Path) -> dict[str, Any]:
    """The least that a run needs."""
    for task in ("forget", "retain"):
        (folder / f"{task}.jsonl").touch()
    return {
        "output": str(folder / "run"),
        "model": {"path": "some/model"},
        "data": {task: {"path": str(folder / f"{task}.jsonl")} for task in ("forget", "retain")},
    }


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        make()
    message = str(error.value)
    assert message and "\n" not in message and "\r" not in message
    return message
