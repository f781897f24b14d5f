"""Updates confined to a share of the weights, on shards: real engines beside the plain loop on whole tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.stages import CONFIGURATIONS, SGD, STORES, assert_equal_to_plain, parts, train
from tests.pipeline.zero.test_checkpoint import run_and_resume
from tests.toy import Case

GLOBAL: dict[str, Any] = {"rule": "pcgrad", "scope": "global"}
SQUARE: Any = (0.3, "forget_mean_square")
FEW = {
    "0 sago": Case(zero=CONFIGURATIONS["0"], confine=(0.3, "forget")),
    "2 pcgrad-global": Case(zero=CONFIGURATIONS["2"], confine=SQUARE, **GLOBAL),
    "3-offload-small sago": Case(zero=CONFIGURATIONS["3-offload-small"], confine=SQUARE),
    "3 pcgrad-global": Case(zero=CONFIGURATIONS["3"], confine=(0.3, "forget_over_retain"), metric="adam", **GLOBAL),
    "3 sgd": Case(zero=CONFIGURATIONS["3"], confine=SQUARE, **SGD),
}
MORE = {
    f"{name} {rule}-{by}": Case(zero=CONFIGURATIONS[name], rule=rule, scope=scope, confine=(0.2, by))
    for name in (*STORES, "2-round-robin", "3-small")
    for rule, scope in (("sago", "element"), ("pcgrad", "module"))
    for by in ("forget", "forget_mean_square", "forget_over_retain")
}


def check(cases: dict[str, Case], ranks: int, folder: Path) -> None:
    made = train(cases, ranks, folder)
    assert_equal_to_plain(made, cases, ranks)


@parts
def test_the_weights_of_the_plain_loop(more: bool, tmp_path: Path) -> None:
    check(MORE if more else FEW, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_other_numbers_of_ranks(ranks: int, tmp_path: Path) -> None:
    """Three ranks: `early` belongs to the first half of a batch, which more micro-batches keep apart."""
    cases = {name: Case(**{**vars(case), "micro": 4}) for name, case in FEW.items()}
    check(cases, ranks, tmp_path)


def test_what_a_rank_cannot_confine_is_refused(tmp_path: Path) -> None:
    half: dict[str, Any] = {"dtype": "bfloat16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}}
    cases = {
        "zero1": Case(zero={"stage": 1}, confine=SQUARE, **half),
        "decay": Case(zero={"stage": 3}, confine=SQUARE, weight_decay=0.1),
        "gru": Case(zero={"stage": 3}, confine=SQUARE, rule="gru", scope="global"),
    }
    made = train(cases, 2, tmp_path)
    for name, words in (("zero1", "use stage 2"), ("decay", "set both to 0"), ("gru", "does not average")):
        assert made[name]["error"].startswith("ValueError: ") and words in made[name]["error"]


def test_through_the_program_no_more_than_the_share_moves_and_it_resumes(world: World, tmp_path: Path) -> None:
    """Steps 3 and 4 are those of the resumed run. Two steps with Adam move at most twice the share."""
    confine = {"share": 0.1, "by": "forget_mean_square"}
    train_ = {"steps": 4, "checkpoint_every": 2, "export_every": 1}
    config = world.configuration(tmp_path / "run", synthesis={"rule": "sago", "confine": confine}, train=train_)
    run_distributed(run_and_resume, 2, [config])
    whole, final = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("whole", "final"))
    assert all(torch.equal(whole[name], final[name]) for name in whole)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before = load_file(world.folder / "model" / "model.safetensors")
    for step, row in enumerate(rows, 1):
        after = load_file(tmp_path / "run" / "exports" / f"step-{step:06d}" / "model.safetensors")
        moved = sum((after[name] != before[name]).sum().item() for name in after)
        share = moved / sum(tensor.numel() for tensor in after.values())
        assert 0.1 <= row["share_updated"] < 0.102
        assert 0.08 < share <= row["share_updated"], "an element of the share whose update is rounded off stands still"
        before = after
