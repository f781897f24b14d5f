"""Every way DeepSpeed stores a gradient gives the plain loop's weights: real engines, one process group per rank count.

The toy of `tests/toy.py` has tensors that only one task, one step or one micro-batch touches; `tests/oracle.py` is the
reference of the program's own runs. What DeepSpeed cannot do without an accelerator fails with DeepSpeed's own message.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.stages import (
    CONFIGURATIONS,
    OF_OPTIONS,
    RULES,
    SGD,
    STORES,
    WAYS,
    assert_equal_to_plain,
    bound,
    parts,
    train,
)
from tests.pipeline.zero.test_sharded import train_cases as train_program
from tests.toy import (
    Case,
)


# -- the table ---------------------------------------------------------------------------------------------------------
def rules_of(name: str, world_size: int) -> tuple[str, ...]:
    """Two ranks: on each way a gradient is stored, each way a rule uses it; all rules on two of them; two rules on each
    option. Three, on each stage: a rule without sums over ranks, one with, one with a state. One: on a few ways."""
    if world_size == 1:
        return ("sago", "gru") if name in ("0", "2", "3", "3-offload-small") else ()
    if world_size == 3:
        return ("sago", "pcgrad-global", "gru") if name in ("0", "1", "2", "3") else ()
    if name in ("2", "3"):
        return tuple(RULES)
    return (*WAYS, "gru") if name in STORES else OF_OPTIONS


@pytest.mark.parametrize(
    ("world_size", "micro", "more"),
    [
        *((1, 4, False), (2, 2, False), (3, 1, False)),
        *(pytest.param(ranks, 4 // ranks, True, marks=pytest.mark.slow) for ranks in (2, 3)),
    ],
)
def test_weights_equal_the_plain_loop(world_size: int, micro: int, more: bool, tmp_path: Path) -> None:
    """`python -m pytest tests/pipeline/zero/test_stages.py -rP -k plain_loop` prints the errors as a table.

    more: two or three ranks, every rule on every option that has not been tried by then.
    """
    cases = {
        f"{name} {rule}": Case(zero=zero, micro=micro, **options)
        for name, zero in CONFIGURATIONS.items()
        for rule, options in RULES.items()
        if (rule in rules_of(name, world_size)) != more
    }
    if world_size == 3:  # `early` belongs to the samples of the first half: one micro-batch would give it to all
        cases = {name: replace(case, micro=4) for name, case in cases.items()}
    made = train(cases, world_size, tmp_path)
    assert_equal_to_plain(made, cases, world_size)
    if more:
        return
    touched = {name for record in made["3 sago"]["records"] for name in record["changed"]}
    assert {"early", "even", "forget_only"} <= touched and not {"never", "frozen.weight"} & touched


PROGRAM = ("zero1", "zero2", "zero3_offload")


@parts
def test_shipped_configurations_through_the_program(more: bool, world: World, tmp_path: Path) -> None:
    (tmp_path / "zero0.json").write_text("{}")
    files = {"zero0": str(tmp_path / "zero0.json"), **{name: f"ds_configs/{name}.json" for name in PROGRAM}}
    rules = [*WAYS, "blur", "gru"]  # the other scopes and `zero_forget` through the program: test_sharded.py
    few = {(file, "sago") for file in PROGRAM}
    few |= {("zero3_offload", "sum"), ("zero3_offload", "pcgrad-module"), ("zero0", "pcgrad-global")}
    few |= {("zero2", "pcgrad-global"), ("zero2", "blur"), ("zero1", "gru")}
    wanted = {(file, rule) for file in PROGRAM for rule in rules} - few if more else few
    settings = {
        (file, rule): world.configuration(
            tmp_path / f"{file}-{rule}", synthesis=RULES[rule], train={"deepspeed": files[file]}
        )
        for file, rule in sorted(wanted)
    }
    run_distributed(train_program, 2, list(settings.values()), timeout=900)
    initial = load_file(world.folder / "model" / "model.safetensors")
    for rule in sorted({rule for _, rule in wanted}):
        weights, records = oracle.train(next(config for (_, other), config in settings.items() if other == rule))
        for (file, other), config in settings.items():
            if other == rule:
                final = load_file(Path(config["output"]) / "final" / "model.safetensors")
                error = oracle.weight_change_error(final, weights, initial)
                print(f"program, {file} {rule}: relative error of the weight change {error:.1e}")
                assert error < bound(rule), (file, rule)
                lines = (Path(config["output"]) / "metrics.jsonl").read_text().splitlines()
                norms = [json.loads(line)["grad_norm"] for line in lines]
                assert norms == pytest.approx([record["grad_norm"] for record in records], rel=1e-4)


# -- models with adapters and experts ----------------------------------------------------------------------------------
@parts
def test_adapters_and_experts(more: bool, tmp_path: Path) -> None:
    moe: dict[str, Any] = {"model": "moe", "micro": 4}  # 1 or 2 tokens a micro-batch, 8 experts: most are not routed to
    cases = {}
    for rule, options in WAYS.items():
        for name in STORES:
            if (rule == "pcgrad-global" or name == "3") == more:
                continue
            leaves = ("MixtralSparseMoeBlock",) if name.startswith("3") else ()
            cases[f"adapters {name} {rule}"] = Case(model="adapters", zero=CONFIGURATIONS[name], **SGD, **options)
            cases[f"moe {name} {rule}"] = Case(zero=CONFIGURATIONS[name], leaves=leaves, **moe, **SGD, **options)
    made = train(cases, 2, tmp_path)
    assert_equal_to_plain(made, cases, 2)
    for name in [name for name in cases if name.startswith("adapters")]:
        touched = {changed for record in made[name]["records"] for changed in record["changed"]}
        assert touched and all("lora_" in changed for changed in touched), name
