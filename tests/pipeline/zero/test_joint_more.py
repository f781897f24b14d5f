"""Joint passes in fp16, with a second copy of the weights in each machine (hpZ), and with objectives of other terms.

`test_joint.py` has the other stages and objectives, `test_nvme.py` the optimizer on a disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.cases import CASES as SHARDED
from tests.pipeline.zero.cases import SUM
from tests.pipeline.zero.test_joint import SGD, assert_equal_to_the_plain_loop, final_weights, initial_weights
from tests.pipeline.zero.test_more_objectives import CASES, PDU
from tests.pipeline.zero.test_sharded import train_cases

ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000},
    "zero3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "hpz": {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0},
}
OWN: dict[str, dict[str, Any]] = {
    "sago": SHARDED["sago"],
    "npo-kl": SHARDED["npo-kl"],
    "jensun": {**CASES["jensun"], "synthesis": SUM},
    "pdu": {"objective": PDU, "synthesis": {**SUM, "alpha": 20.0}, **SGD},
}


def file_of(folder: Path, zero: str, **more: Any) -> str:
    file = folder / f"{zero}.json"
    file.write_text(json.dumps({"zero_optimization": ZERO[zero], **more}))
    return str(file)


def joint_runs(world: World, folder: Path, wanted: list[tuple[str, str]], **train: Any) -> dict[Any, dict[str, Any]]:
    made = {}
    for zero, case in wanted:
        sections = {**OWN[case], "optimizer": {"eps": 1e-6, **OWN[case].get("optimizer", {})}}
        keys = world.configuration(folder / zero / case, **sections)
        other = {"schedule": "joint", "deepspeed": file_of(folder, zero), **train}
        made[zero, case] = {**keys, "train": {**keys["train"], **other}}
    return made


def test_objectives_that_weigh_and_hpz_give_the_weights_of_the_plain_loop(world: World, tmp_path: Path) -> None:
    """pdu weighs the retain loss by a number that moves with every step."""
    made = joint_runs(world, tmp_path, [("zero3", "pdu"), ("zero2", "jensun"), ("hpz", "sago")])
    run_distributed(train_cases, 2, list(made.values()))
    assert_equal_to_the_plain_loop(made)
    lines = (tmp_path / "zero3" / "pdu" / "metrics.jsonl").read_text().splitlines()
    assert len({json.loads(line)["dual_weight"] for line in lines}) == 4


@pytest.mark.slow
def test_the_same_on_the_other_stages(world: World, tmp_path: Path) -> None:
    wanted = [(zero, case) for zero in ("zero1", "zero2", "zero3", "zero3-offload") for case in ("pdu", "jensun")]
    made = joint_runs(world, tmp_path, wanted)
    run_distributed(train_cases, 2, list(made.values()), timeout=900)
    assert_equal_to_the_plain_loop(made)


@pytest.mark.slow
def test_hpz_on_two_machines_of_two_ranks(world: World, tmp_path: Path) -> None:
    made = joint_runs(world, tmp_path, [("hpz", "sago"), ("hpz", "npo-kl")], micro_batch_size=1)
    run_distributed(train_cases, 4, list(made.values()), timeout=900)
    assert_equal_to_the_plain_loop(made)


# -- fp16 --------------------------------------------------------------------------------------------------------------
def train_in_fp16(configurations: list[dict[str, Any]]) -> None:
    """DeepSpeed refuses fp16 on a CPU for lack of fast kernels; torch has slow ones, so the logic can be run."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # pyright: ignore
    train_cases(configurations)


def in_both_schedules(world: World, folder: Path, zero: str, power: int, steps: int) -> dict[str, dict[str, Any]]:
    fp16 = {"initial_scale_power": power, "loss_scale_window": 100, "hysteresis": 1}
    made = {}
    for schedule in ("sequential", "joint"):
        (folder / zero / schedule).mkdir(parents=True)
        made[schedule] = world.configuration(
            folder / zero / schedule / "run",
            model={"dtype": "float16"},
            synthesis={"rule": "pcgrad"},
            **SGD,
            train={"schedule": schedule, "steps": steps, "deepspeed": file_of(folder, zero, fp16=fp16)},
        )
    return made


def errors_of(runs: dict[str, dict[str, Any]], expected: dict[str, Any]) -> dict[str, float]:
    initial = initial_weights(runs["joint"])
    return {name: oracle.weight_change_error(final_weights(keys), expected, initial) for name, keys in runs.items()}


def skipped_steps(keys: dict[str, Any]) -> list[int]:
    lines = map(json.loads, (Path(keys["output"]) / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["skipped"]]


def assert_overflows_are_skipped_alike(world: World, folder: Path, zero: str) -> None:
    """At first scaled gradients are too large for fp16. A step with such a one is skipped, and halves the scale."""
    runs = in_both_schedules(world, folder, zero, power=21, steps=8)
    run_distributed(train_in_fp16, 2, list(runs.values()))
    skipped = {name: skipped_steps(keys) for name, keys in runs.items()}
    error = errors_of(runs, final_weights(runs["sequential"]))["joint"]
    print(f"fp16, {zero}: skipped {skipped}; joint beside sequential {error:.1e} of the weight change")
    assert skipped["joint"] == skipped["sequential"] and 1 in skipped["joint"] and 8 not in skipped["joint"]
    assert error < 8 * 4 * 2**-11  # see test_half_precision.py


@pytest.mark.slow
def test_an_overflow_in_fp16_is_skipped_as_in_two_passes(world: World, tmp_path: Path) -> None:
    assert_overflows_are_skipped_alike(world, tmp_path, "zero3")


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero2-offload", "zero3-offload"])
def test_an_overflow_in_fp16_on_the_other_stages(zero: str, world: World, tmp_path: Path) -> None:
    assert_overflows_are_skipped_alike(world, tmp_path, zero)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_fp16_is_as_far_from_the_plain_loop_as_in_two_passes(zero: str, world: World, tmp_path: Path) -> None:
    runs = in_both_schedules(world, tmp_path, zero, power=8, steps=4)
    run_distributed(train_in_fp16, 2, list(runs.values()))
    errors = errors_of(runs, oracle.train(runs["joint"])[0])
    print(f"fp16, {zero}: relative error of the weight change, beside a loop in fp32, {errors}")
    assert not any(skipped_steps(keys) for keys in runs.values())
    assert errors["joint"] < 1.2 * errors["sequential"] < 0.1
