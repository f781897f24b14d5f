"""A second copy of the weights within a machine (ZeRO++, `zero_hpz_partition_size`): the plain loop's weights still.

DeepSpeed gathers from that copy until the optimizer steps; whoever changes weights in between must drop it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.config.deepspeed import deepspeed_config, refuse_uneven_groups
from pipeline.config.schema import RunConfig
from pipeline.errors import InputError
from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.cases import CASES
from tests.pipeline.zero.test_sharded import train_cases

OF_THRESHOLD = {0: ("sago", "npo-kl", "rmu-embed_diff"), 10**6: ("npo-kl",)}  # the frozen original in all but sago


def settings(world: World, folder: Path, file: str, cases: tuple[str, ...]) -> list[dict[str, Any]]:
    found = []
    for case in cases:
        keys = dict(CASES[case])
        keys["model"] = {**world.configuration("")["model"], **keys.get("model", {})}
        train = {"deepspeed": file, "micro_batch_size": 1}
        optimizer = {"eps": 1e-6, **keys.pop("optimizer", {})}
        found.append(world.configuration(folder / case, train=train, optimizer=optimizer, **keys))
    return found


def assert_equal_to_plain(runs: list[dict[str, Any]], world: World) -> None:
    initial = load_file(world.folder / "model" / "model.safetensors")
    for config in runs:
        weights, _ = oracle.train(config)
        final = load_file(Path(config["output"]) / "final" / "model.safetensors")
        error = oracle.weight_change_error(final, weights, initial)
        print(f"{config['output']}: relative error of the weight change {error:.1e}")
        assert error < 2e-4 if "sago" in config["output"] else error < 2e-5, config["output"]


@pytest.mark.slow  # test_sharded.py has two of these on two ranks, as one machine
def test_two_machines_of_two_ranks(world: World, tmp_path: Path) -> None:
    """With every tensor partitioned, and with every tensor persistent."""
    runs = []
    for threshold, cases in OF_THRESHOLD.items():
        zero = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": threshold}
        file = tmp_path / f"{threshold}.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        runs += settings(world, tmp_path / f"runs-{threshold}", str(file), cases)
    run_distributed(train_cases, 4, runs)
    assert_equal_to_plain(runs, world)


@pytest.mark.slow
def test_the_shipped_file_on_one_machine(world: World, tmp_path: Path) -> None:
    runs = settings(world, tmp_path, "ds_configs/zero3_hpz.json", ("sago",))
    run_distributed(train_cases, 2, runs)
    assert_equal_to_plain(runs, world)


@pytest.mark.parametrize(("ranks", "fits"), [(2, True), (8, True), (12, False), (16, True)])
def test_ranks_that_do_not_divide_into_groups_are_refused(ranks: int, fits: bool, world: World) -> None:
    config = RunConfig.model_validate(world.configuration("run", train={"deepspeed": "ds_configs/zero3_hpz.json"}))
    zero = deepspeed_config(config)
    if fits:
        refuse_uneven_groups(zero, ranks)
    else:
        with pytest.raises(InputError, match="zero_hpz_partition_size 8 does not divide 12 ranks; set it to"):
            refuse_uneven_groups(zero, ranks)
