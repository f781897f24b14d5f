"""Sharded equals dense for objectives with terms of their own, on two ranks; a dual weight is resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.cases import SGD, SUM
from tests.pipeline.zero.test_checkpoint import run_and_resume
from tests.pipeline.zero.test_sharded import agree_with_the_plain_loop, pairs, train_cases

PCGRAD = {"rule": "pcgrad"}
TARGET = "kara vi"
CASES: dict[str, dict[str, Any]] = {
    "ce_u": {"objective": {"forget": "ce_u"}, "synthesis": PCGRAD},
    "satimp": {"objective": {"forget": "satimp", "beta1": 0.3, "beta2": 0.5}, "synthesis": PCGRAD},
    # As for kl (test_sharded.py): where model and reference agree, the gradient of jsd is rounding.
    "jensun": {"objective": {"forget": "jensun", "retain": "jsd", "target": TARGET}, "synthesis": SUM, **SGD},
    "altpo": {"objective": {"forget": "altpo", "beta": 0.05}, "synthesis": SUM},
    **{f"flat-{kind}": {"objective": {"forget": "flat", "divergence": kind}} for kind in ("tv", "kl", "pearson")},
}
PDU = {"forget": "pdu", "retain": "jsd", "retain_loss_eps": 0.005, "dual_step_size": 20.0}


def assert_equal_to_the_plain_loop(made: Path, weights: dict[str, torch.Tensor], world: World, case: str) -> None:
    final, initial = (load_file(path / "model.safetensors") for path in (made, world.folder / "model"))
    error = oracle.weight_change_error(final, weights, initial)
    print(f"{case}: relative error of the weight change {error:.1e}")
    assert error < 2e-5


def test_pdu_with_jsd_equals_the_plain_loop_and_resumes(world: World, tmp_path: Path) -> None:
    """Its dual weight moves, alike on both ranks, and comes back from a checkpoint."""
    settings = {"objective": PDU, "synthesis": {**SUM, "alpha": 20.0}, **SGD}
    config = world.configuration(tmp_path / "run", train={"steps": 4, "checkpoint_every": 2}, **settings)
    run_distributed(run_and_resume, 2, [config])
    expected = oracle.train(config)
    run, weights = tmp_path / "run", [record["dual_weight"] for record in expected[1]]
    assert weights[0] == 1.0 and len({round(weight, 2) for weight in weights}) == 4
    assert_equal_to_the_plain_loop(run / "whole", expected[0], world, "pdu-jsd")
    agree_with_the_plain_loop("pdu-jsd", run, {"pdu-jsd": expected})  # steps 3 and 4 are those of the resumed run
    one, other = (load_file(run / name / "model.safetensors") for name in ("whole", "final"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_other_objectives_equal_the_plain_loop(world: World, tmp_path: Path) -> None:
    made = {}
    for name, case in CASES.items():
        sections = {"optimizer": {"eps": 1e-6}, "synthesis": SUM, **case}  # eps: see test_sharded.configurations
        if name.startswith(("altpo", "flat")):
            (tmp_path / name).mkdir()
            data = {**world.configuration("")["data"], "max_length": 48, "forget": pairs(world, case)}
            sections["data"] = data
        made[name] = world.configuration(tmp_path / name / "run", **sections)
    run_distributed(train_cases, 2, list(made.values()), timeout=900)
    for name, config in made.items():
        expected = oracle.train(config)
        assert_equal_to_the_plain_loop(tmp_path / name / "run" / "final", expected[0], world, name)
        agree_with_the_plain_loop(name, tmp_path / name / "run", {name: expected})
