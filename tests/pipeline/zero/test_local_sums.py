"""One reduction a task where little trains: the plain loop's weights, no worse in bf16, and as few bytes as planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.zero.sizes import sums_locally
from tests import oracle, toy
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.planning.measure import measure
from tests.pipeline.planning.test_memory import assert_sent, planned
from tests.pipeline.zero.stages import CONFIGURATIONS, FP32_WIRE, RULES, SGD, assert_equal_to_plain, parts, train
from tests.pipeline.zero.test_joint import NOT_KEPT, final_weights, initial_weights
from tests.toy import Case, error_of, train_plainly

STORES = ("2", "2-offload", "3", "3-offload-small")
OTHERS = ("2-overlap-small", "2-scattered", "2-round-robin", "3-no-overlap", "3-scattered", "3-allreduce")


@pytest.mark.parametrize(
    ("trained", "elements", "bucket", "micro_batches", "expected"),
    [
        (10, 80, 10, 2, True),
        (10, 80, 10, 1, False),  # nothing to add up
        (10, 79, 10, 2, False),  # not small beside the model
        (10, 80, 9, 2, False),  # nor beside DeepSpeed's bucket
    ],
)
def test_only_small_sets_of_several_micro_batches_are_summed(
    trained: int, elements: int, bucket: int, micro_batches: int, expected: bool
) -> None:
    assert sums_locally(trained, elements, bucket, micro_batches) == expected


# -- the combiner ------------------------------------------------------------------------------------------------------
def train_summed(cases: dict[str, Case], file: str) -> None:
    """`toy.train_cases`, with one reduction a task."""
    plain = toy.train_on_engine
    toy.train_on_engine = lambda case: plain(case, watch=lambda engine, combiner: combiner.store.sum_locally())
    toy.train_cases(cases, file)


@parts
def test_the_weights_of_the_plain_loop(more: bool, tmp_path: Path) -> None:
    """Also where ranks, tasks, steps and micro-batches touch different tensors."""
    few = {"2": ("sum", "sago"), "3": ("sago", "pcgrad-module"), "3-offload-small": ("pcgrad-global",)}
    cases = {
        f"{name} {rule}": Case(zero=CONFIGURATIONS[name], micro=3, **options)
        for name in (*STORES, *OTHERS)
        for rule, options in RULES.items()
        if (rule in few.get(name, ())) != more
    }
    assert_equal_to_plain(train(cases, 2, tmp_path, train_summed), cases, 2)


@pytest.mark.slow
def test_three_ranks(tmp_path: Path) -> None:
    cases = {f"{name} sago": Case(zero=CONFIGURATIONS[name], micro=2) for name in STORES}
    assert_equal_to_plain(train(cases, 3, tmp_path, train_summed), cases, 3)


def test_a_sum_in_bf16_is_no_worse(tmp_path: Path) -> None:
    """The plain loop rounds the gradient of each micro-batch and rank to bf16, and nothing after that. Reduced apart
    each is rounded a second time, on the wire; their sum crosses it in fp32.
    """
    case = Case(dtype="bfloat16", micro=4, config={"data_types": FP32_WIRE["data_types"]}, **SGD)
    cases = {
        f"{name} {rule}": replace(case, zero=CONFIGURATIONS[name], **RULES[rule])
        for name in ("2", "3")
        for rule in ("sum", "pcgrad-module")
    }
    summed, apart = train(cases, 2, tmp_path, train_summed), train(cases, 2, tmp_path)
    for name, one in cases.items():
        weights, _ = train_plainly(one, 2)
        error, other = (error_of(one, made[name], weights) for made in (summed, apart))
        print(f"bf16, {name}: relative error of the weight change {error:.1e}, reduced by micro-batches {other:.1e}")
        assert error < 2e-5 < other


@pytest.mark.slow
def test_overflow_in_fp16_is_noticed(tmp_path: Path) -> None:
    fp16 = {"initial_scale_power": 8, "loss_scale_window": 100, "hysteresis": 1}
    cases = {
        f"{name} {task}": Case(
            zero=CONFIGURATIONS[name],
            dtype="float16",
            config={**FP32_WIRE, "fp16": fp16},
            poison=(1, task, float("inf")),
            **SGD,
            **RULES["pcgrad-module"],
        )
        for name in STORES
        for task in ("forget", "retain")
    }
    made = train(cases, 2, tmp_path, train_summed_in_fp16)
    assert_equal_to_plain(made, cases, 2, lambda name: 2e-4)
    for name in cases:
        assert [record["scale"] for record in made[name]["records"]] == [256, 128, 128, 128], name


def train_summed_in_fp16(cases: dict[str, Case], file: str) -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # pyright: ignore
    train_summed(cases, file)


# -- the program -------------------------------------------------------------------------------------------------------
ADAPTERS = {"lora": {"r": 1, "alpha": 2, "targets": ["q_proj", "down_proj"]}}


def runs_of(world: World, folder: Path, ways: list[tuple[int, str, str]], **model: Any) -> dict[str, dict[str, Any]]:
    """Runs of three micro-batches a task, step and rank that train adapters, by stage, schedule and rule."""
    made = {}
    for stage, schedule, rule in ways:
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0, **NOT_KEPT} if stage == 3 else {})}
        (file := folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
        name = f"{stage} {schedule} {rule}"
        made[name] = world.configuration(
            folder / name,
            model={**ADAPTERS, **model},
            synthesis={"rule": rule},
            optimizer={"name": "sgd", "lr": 1.0},
            train={"deepspeed": str(file), "schedule": schedule, "steps": 3},
        )
    return made


def assert_right_and_reduced_once(runs: dict[str, dict[str, Any]], folder: Path) -> None:
    run_distributed(measure, 2, runs, str(folder / "measured.json"))
    found = json.loads((folder / "measured.json").read_text())
    for name, keys in runs.items():
        stage, _, rule = name.split()
        weights, _ = oracle.train(keys)
        error = oracle.weight_change_error(final_weights(keys), weights, initial_weights(keys))
        print(f"{name}: relative error of the weight change {error:.1e}")
        assert error < 2e-5, name
        sent = found[name]["sent"]
        trained, gradients = sum(tensor.numel() for tensor in weights.values()), 1 if rule == "sum" else 2
        reduced = sent["reduce_scatter"] if stage == "3" else sent["all_reduce"]
        assert gradients * 4 * trained <= reduced < 1.2 * gradients * 4 * trained + 100 * len(weights)
        assert_sent(name, sent, planned(keys)[1])


def test_a_run_of_adapters_reduces_once_a_task(world: World, tmp_path: Path) -> None:
    ways = [(3, "sequential", "pcgrad"), (3, "joint", "pcgrad"), (2, "joint", "pcgrad")]
    assert_right_and_reduced_once(runs_of(world, tmp_path, ways), tmp_path)


@pytest.mark.slow
def test_the_other_runs_of_adapters(world: World, tmp_path: Path) -> None:
    schedules, rules = ("sequential", "joint"), ("sum", "pcgrad")
    ways = [(stage, schedule, rule) for stage in (1, 2, 3) for schedule in schedules for rule in rules]
    assert_right_and_reduced_once(runs_of(world, tmp_path, ways), tmp_path)
