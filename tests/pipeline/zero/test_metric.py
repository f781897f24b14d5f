"""Adam's metric and the update that was made, on shards: real engines beside the plain loop on whole tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import oracle, toy
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.stages import CONFIGURATIONS, SGD, STORES, assert_equal_to_plain, parts, train
from tests.pipeline.zero.test_checkpoint import run_and_resume
from tests.pipeline.zero.test_sharded import agree_with_the_plain_loop
from tests.pipeline.zero.test_sharded import train_cases as train_program
from tests.toy import Case

DECAYED: dict[str, Any] = {"weight_decay": 0.3}  # two groups of tensors
FEW = {
    "0 pcgrad-global": Case(zero=CONFIGURATIONS["0"], rule="pcgrad", scope="global", metric="adam"),
    "1 pcgrad-global": Case(zero=CONFIGURATIONS["1"], rule="pcgrad", scope="global", metric="adam", **DECAYED),
    "2-offload pcgrad-module": Case(
        zero=CONFIGURATIONS["2-offload"], rule="pcgrad", scope="module", metric="adam", **DECAYED
    ),
    "3-small pcgrad-global": Case(
        zero=CONFIGURATIONS["3-small"], rule="pcgrad", scope="global", metric="adam", **DECAYED
    ),
    "3 gru": Case(zero=CONFIGURATIONS["3"], rule="gru", scope="global", metric="adam"),
    "3 sago": Case(zero=CONFIGURATIONS["3"], scope="element", metric="adam"),
    "2 sgd": Case(zero=CONFIGURATIONS["2"], rule="pcgrad", scope="global", metric="adam", **SGD),
}
MORE = {
    f"{name} {rule}-{scope}": Case(zero=CONFIGURATIONS[name], rule=rule, scope=scope, metric="adam", **DECAYED)
    for name in (*STORES, "2-round-robin", "3-offload-all")
    for rule, scope in (("pcgrad", "global"), ("pcgrad", "layer"), ("blur", "global"), ("gru", "module"))
}


def check(cases: dict[str, Case], ranks: int, folder: Path) -> None:
    made = train(cases, ranks, folder)
    assert_equal_to_plain(made, cases, ranks)
    for name, case in cases.items():
        seen: list[dict[str, float]] = []
        toy.train_plainly(case, ranks, seen)
        for record, want in zip(made[name]["records"], seen, strict=True):
            dot, square = record["update"]
            assert square == pytest.approx(want["square"], rel=1e-4), name
            scale = want["square"] ** 0.5 * want["retain_norm"]
            assert dot == pytest.approx(want["dot"], rel=1e-3, abs=1e-4 * scale), name


@parts
def test_the_weights_and_the_update_of_the_plain_loop(more: bool, tmp_path: Path) -> None:
    check(MORE if more else FEW, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_other_numbers_of_ranks(ranks: int, tmp_path: Path) -> None:
    check({name: case for name, case in FEW.items() if name != "0 pcgrad-global"}, ranks, tmp_path)


def test_the_metric_makes_a_difference() -> None:
    """Else the cases above would compare nothing."""
    case = FEW["3-small pcgrad-global"]
    there, _ = toy.train_plainly(case)
    euclidean, _ = toy.train_plainly(Case(**{**vars(case), "metric": "euclidean"}))
    start = {name: p.detach().float() for name, p in toy.model_of(case).named_parameters()}
    assert oracle.weight_change_error(there, euclidean, start) > 0.01


HALF = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def bf16(stage: str, **options: Any) -> Case:
    config = HALF if stage != "0" else {}
    return Case(zero=CONFIGURATIONS[stage], rule="pcgrad", scope="global", dtype="bfloat16", config=config, **options)


def test_in_bf16_each_stage_knows_its_update_or_says_that_it_does_not(tmp_path: Path) -> None:
    """In stage 1 a rank has the whole gradient and Adam's state of a share. Stage 0 has its own count of steps."""
    cases = {"0": bf16("0", metric="adam"), "1": bf16("1"), "1 refused": bf16("1", metric="adam")}
    cases["2"] = bf16("2", metric="adam")
    made = train(cases, 2, tmp_path)
    assert "ValueError: the metric adam and a confinement need Adam's state" in made.pop("1 refused")["error"]
    assert [record["update"] for record in made["1"]["records"]] == [None] * 4
    norms = {stage: [record["update"][1] for record in made[stage]["records"]] for stage in ("0", "2")}
    assert norms["0"] == pytest.approx(norms["2"], rel=0.5) and min(norms["0"]) > 0
    seen: list[dict[str, float]] = []
    toy.train_plainly(cases["2"], 2, seen)
    for record, want in zip(made["2"]["records"], seen, strict=True):
        assert record["update"] == pytest.approx([want["dot"], want["square"]], rel=1e-2)


# -- through the program -----------------------------------------------------------------------------------------------
ADAM = {"rule": "pcgrad", "scope": "global", "metric": "adam"}


def test_the_program_logs_the_update_and_resumes_the_metric(world: World, tmp_path: Path) -> None:
    """Steps 3 and 4 are those of the resumed run."""
    config = configuration(world, tmp_path / "run", train={"steps": 4, "checkpoint_every": 2})
    run_distributed(run_and_resume, 2, [config])
    check_run(tmp_path / "run", config, world)
    one, other = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("whole", "final"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_joint_passes_have_the_same_metric(world: World, tmp_path: Path) -> None:
    config = configuration(world, tmp_path / "run", train={"schedule": "joint"})
    run_distributed(train_program, 2, [config])
    check_run(tmp_path / "run", config, world)


def configuration(world: World, folder: Path, train: dict[str, Any]) -> dict[str, Any]:
    return world.configuration(folder, synthesis=ADAM, optimizer={"eps": 1e-6, "weight_decay": 0.3}, train=train)


def check_run(run: Path, config: dict[str, Any], world: World) -> None:
    weights, records = oracle.train(config)
    final, initial = (load_file(path / "model.safetensors") for path in (run / "final", world.folder / "model"))
    assert oracle.weight_change_error(final, weights, initial) < 2e-5
    agree_with_the_plain_loop("adam", run, {"adam": (weights, records)})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, record in zip(rows, records, strict=True):
        assert row["dot_update_retain"] == pytest.approx(record["dot_update_retain"], rel=1e-3, abs=1e-7)
        norms = row["update_norm"] * row["retain_norm"]
        assert row["cos_update_retain"] == pytest.approx(row["dot_update_retain"] / norms)
        assert not any(name.startswith("_") for name in row)
    layers = [name for name in rows[-1] if name.startswith("dot_update_retain/")]
    assert len(layers) > 3
    assert sum(rows[-1][name] for name in layers) == pytest.approx(rows[-1]["dot_update_retain"])
