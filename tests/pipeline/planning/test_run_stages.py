"""Bytes and seconds of the stages around the steps, counted by hand: 10 G elements in bf16 on two machines of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.planning.memory import Cluster, Zero
from pipeline.planning.meta_trace import ModelShape
from pipeline.planning.run_stages import Stage, stage_table, stages
from pipeline.zero.sizes import disk_use
from tests.pipeline.planning.base import configuration_of

READ, ONE_TENSOR, SAVE, RESUME, EXPORT = (
    *("start: read the weights", "start: one tensor of the trained weights"),
    *("checkpoint", "resume, after the start", "export"),
)


def stages_of(disk: float | None, sizes: list[int], trained: int, stage: int, **sections: Any) -> dict[str, Stage]:
    """By name; `trained`: how many of the last tensors."""
    keys = {name: sections.pop(name) for name in ("offload_optimizer",) if name in sections}
    config = configuration_of(Path("unused"), **sections)
    shape = ModelShape(sizes, [place >= len(sizes) - trained for place in range(len(sizes))], 2, (10, 10), True, True)
    zero = Zero.of({"zero_optimization": {"stage": stage, **keys}}, shape)
    written = disk_use(config, stage, shape.elements, shape.trained, 2, 1)
    return {one.name: one for one in stages(shape, zero, config, Cluster(2, 2, 80, 50, 400, disk), written)}


WHOLE = [2_500_000_000] * 4


def test_a_disk_of_2_gigabytes_a_second() -> None:
    """20 GB of weights; 12 bytes an element in a checkpoint, half a machine; 4 files of an export, half a machine."""
    found = stages_of(2.0, WHOLE, 4, 3)
    assert {name: (stage.bytes, stage.seconds) for name, stage in found.items()} == {
        READ: (20e9, 10),
        ONE_TENSOR: (10e9, None),  # of the two ranks of a machine, in its memory: no rate is known
        SAVE: (60e9, 30),
        RESUME: (60e9, 30),
        EXPORT: (10e9, 5),
    }


def test_what_the_first_rank_writes_alone() -> None:
    """Below ZeRO-3 the weights; in bf16 under ZeRO-1, where ranks have whole gradients, an average of them as well."""
    assert stages_of(1.0, WHOLE, 4, 2)[SAVE].bytes == 20e9 + 60e9
    gru = {"synthesis": {"rule": "gru"}}
    assert stages_of(1.0, WHOLE, 4, 1, **gru)[SAVE].bytes == 20e9 + 40e9 + 60e9
    assert stages_of(1.0, WHOLE, 4, 2, **gru)[SAVE].bytes == 20e9 + 80e9
    assert stages_of(1.0, WHOLE, 4, 0)[SAVE].bytes == 20e9 + 120e9


def test_files_of_an_export_by_machine() -> None:
    """Six files of 5 GB on four ranks: the first machine writes 0, 1, 4 and 5."""
    assert stages_of(1.0, [2_500_000_000] * 6, 6, 3)[EXPORT].bytes == 20e9
    assert stages_of(1.0, [1_000_000_000], 1, 3)[EXPORT].bytes == 2e9


def test_adapters() -> None:
    """They begin as random numbers, so only the frozen weights are read; their one file is the first rank's."""
    found = stages_of(1.0, [*WHOLE, 1_000_000_000], 1, 3, model={"lora": {"r": 8}})
    assert [found[name].bytes for name in (READ, ONE_TENSOR, SAVE, EXPORT)] == [20e9, 1e9, 6e9, 2e9]


def test_no_checkpoint_of_an_optimizer_on_nvme() -> None:
    found = stages_of(1.0, WHOLE, 4, 3, offload_optimizer={"device": "nvme"})
    assert list(found) == [READ, ONE_TENSOR, EXPORT]


@pytest.mark.parametrize(
    ("disk", "seconds"), [(None, "not measured (give --disk-bandwidth)"), (2.0, "at least 10")], ids=["none", "2"]
)
def test_seconds_come_from_the_rate_that_was_given_or_were_not_measured(disk: float | None, seconds: str) -> None:
    lines = stage_table(list(stages_of(disk, WHOLE, 4, 3).values()), Cluster(2, 2, 80, 50, 400, disk))
    assert f"| {READ} | 20 GB of disk | {seconds} |" in lines
    assert f"| {ONE_TENSOR} | 10 GB of main memory | not measured |" in lines
    assert ("at 2 GB/s" in lines[0]) == (disk is not None)
