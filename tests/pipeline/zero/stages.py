"""Every way DeepSpeed stores a gradient, every rule, and the comparison of a run on them with the plain loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.toy import (
    Case,
    error_of,
    train_cases,
    train_plainly,
)

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SMALL = {"sub_group_size": 20, "reduce_bucket_size": 10, "stage3_param_persistence_threshold": 0}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "1-overlap": {"stage": 1, "overlap_comm": True},
    "1-scattered": {"stage": 1, "contiguous_gradients": False, "reduce_bucket_size": 10},
    "1-offload": {"stage": 1, **OFFLOAD},
    "1-offload-overlap": {"stage": 1, "overlap_comm": True, **OFFLOAD},
    "2": {"stage": 2},
    "2-overlap-small": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10},
    "2-scattered": {"stage": 2, "contiguous_gradients": False},
    "2-scattered-overlap": {"stage": 2, "contiguous_gradients": False, "overlap_comm": True},
    "2-allreduce": {"stage": 2, "reduce_scatter": False},
    "2-round-robin": {"stage": 2, "round_robin_gradients": True},
    "2-offload": {"stage": 2, **OFFLOAD},
    "2-offload-overlap-small": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10, **OFFLOAD},
    "3": {"stage": 3},
    "3-no-overlap": {"stage": 3, "overlap_comm": False},
    "3-small": {"stage": 3, **SMALL},
    "3-scattered": {"stage": 3, "contiguous_gradients": False},
    "3-allreduce": {"stage": 3, "reduce_scatter": False},
    "3-offload-small": {"stage": 3, **SMALL, **OFFLOAD},
    "3-offload-all": {"stage": 3, "offload_param": {"device": "cpu"}, **OFFLOAD},
}
STORES = ("0", "1", "1-offload", "2", "2-offload", "3", "3-offload-small")  # one configuration per way and place
RULES: dict[str, dict[str, Any]] = {
    "sum": {"rule": "sum"},
    "sago": {"rule": "sago"},
    "sago-retain": {"rule": "sago", "zero_forget": "retain"},
    "pcgrad-element": {"rule": "pcgrad", "scope": "element"},
    "pcgrad-module": {"rule": "pcgrad", "scope": "module"},
    "pcgrad-layer": {"rule": "pcgrad", "scope": "layer"},
    "pcgrad-global": {"rule": "pcgrad", "scope": "global"},
    "blur": {"rule": "blur", "scope": "global"},
    "gru": {"rule": "gru", "scope": "global"},
}


# One for each way a rule uses a store: no forget buffer, one pass, Gramians per tensor, Gramians over all ranks.
WAYS = {rule: RULES[rule] for rule in ("sum", "sago", "pcgrad-module", "pcgrad-global")}
OF_OPTIONS = ("sum", "pcgrad-module")  # no forget buffer, and Gramians in which an element at a wrong place shows


# A table's cells by default, and, marked slow, all its others: no cell is made twice.
parts = pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "more"])
FP32_WIRE = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.5}


def bound(rule: str) -> float:
    return 2e-4 if "sago" in rule else 2e-5


def train(cases: dict[str, Case], world_size: int, folder: Path, function: Any = train_cases) -> dict[str, Any]:
    run_distributed(function, world_size, cases, str(folder / "made.pt"), timeout=900)
    return torch.load(folder / "made.pt", weights_only=False)


def assert_equal_to_plain(made: dict[str, Any], cases: dict[str, Case], world_size: int, limits: Any = bound) -> None:
    """Every case has the weights and gradient norms of the plain loop, and skipped what it skipped."""
    plain: dict[str, Any] = {}
    wrong, table = [], {}
    for name, case in cases.items():
        assert "error" not in made[name], (name, made[name]["error"])
        key = repr(replace(case, zero={}, config={}, leaves=()))
        if key not in plain:
            plain[key] = train_plainly(case, world_size)
        weights, norms = plain[key]
        error = error_of(case, made[name], weights)
        print(f"{world_size} ranks, {name}: relative error of the weight change {error:.1e}")
        table[tuple(name.rsplit(" ", 1))] = error
        if error >= limits(name):
            wrong.append((name, error))
        skipped = [step for step, record in enumerate(made[name]["records"]) if not record["applied"]]
        assert skipped == ([case.poison[0]] if case.poison else []), name
        measured = [record["norm"] for record in made[name]["records"] if record["applied"]]
        assert measured == pytest.approx(norms, rel=max(1e-5, limits(name))), name
    if all(len(key) == 2 for key in table):
        print(markdown(table))
    assert not wrong


def markdown(errors: dict[tuple[str, ...], float]) -> str:
    """A row for each first key, a column for each second, the keys in order of appearance."""
    rows, columns = (list(dict.fromkeys(key[axis] for key in errors)) for axis in (0, 1))
    cells = [[f"{errors[row, column]:.0e}" if (row, column) in errors else "" for column in columns] for row in rows]
    lines = [
        ["ZeRO", *columns],
        ["---"] * (len(columns) + 1),
        *([row, *line] for row, line in zip(rows, cells, strict=True)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
