"""What a run says that it will write, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.schema import RunConfig
from pipeline.zero.sizes import disk_use, in_units
from tests.conftest import World


@pytest.mark.parametrize(
    ("sections", "stage", "itemsize", "checkpoint", "export"),
    [
        ({}, 3, 2, 700 * (4 + 8), 1000 * 2),
        ({}, 2, 2, 700 * (4 + 8 + 2), 1000 * 2),
        ({}, 0, 4, 700 * (8 + 4), 1000 * 4),  # fp32 without ZeRO: the weights are the only copy
        ({"optimizer": {"name": "sgd"}}, 3, 2, 700 * 4, 1000 * 2),
        ({"synthesis": {"rule": "gru"}}, 3, 2, 700 * (4 + 8 + 4), 1000 * 2),
        ({"synthesis": {"rule": "bloop"}}, 3, 2, 700 * (4 + 8 + 4), 1000 * 2),  # averages the retain gradient as well
        ({"synthesis": {"confine": {"share": 0.2}}}, 3, 2, 700 * (4 + 8 + 4), 1000 * 2),  # the mean square
        ({"synthesis": {"confine": {"share": 0.2, "by": "forget"}}}, 3, 2, 700 * (4 + 8), 1000 * 2),
        ({"synthesis": {"rule": "gradvac"}}, 3, 2, 700 * (4 + 8), 1000 * 2),  # a number a unit
        ({"model": {"lora": {"r": 2}}}, 3, 2, 700 * 12, 700 * 2),
        ({"model": {"lora": {"r": 2, "merge": True}}}, 3, 2, 700 * 12, 300 * 2),
    ],
)
def test_bytes_of_a_checkpoint_and_an_export(
    sections: dict[str, Any], stage: int, itemsize: int, checkpoint: int, export: int, world: World
) -> None:
    config = RunConfig.model_validate(world.configuration("unused", **sections))
    use = disk_use(config, stage, elements=1000, trained=700, itemsize=itemsize, steps=10)
    assert (use.checkpoint, use.export) == (checkpoint, export)


def test_how_many_there_are_at_once(world: World) -> None:
    """One checkpoint more than stays, while it is written; every export, and `final`."""
    train = {"checkpoint_every": 2, "keep_checkpoints": 3, "export_every": 4}
    config = RunConfig.model_validate(world.configuration("unused", train=train))
    use = disk_use(config, 3, elements=10, trained=10, itemsize=2, steps=11)
    assert (use.checkpoints, use.exports) == (4, 3)
    assert use.peak == 4 * 120 + 3 * 20
    config = RunConfig.model_validate(world.configuration("unused", train={"checkpoint_every": 0}))
    use = disk_use(config, 3, elements=10, trained=10, itemsize=2, steps=11)
    assert (use.checkpoints, use.exports) == (1, 1)  # SIGTERM saves


def test_units() -> None:
    assert [in_units(x) for x in (847e9, 1.0581e12, 141_107_412_992, 5e5)] == ["847 GB", "1.06 TB", "141 GB", "0.5 MB"]
