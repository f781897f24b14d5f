"""A checkpoint of two ranks goes on, on one rank, on three and on two, as if nothing had happened: stage by stage.

The toy has tied, frozen, one-element and untouched tensors; what it ends with is compared with the plain loop, or in
bf16, which the plain loop rounds otherwise, with the state before and after.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.zero.optimizer_state import Fragment
from pipeline.zero.reshard import copy_fragments
from tests import toy
from tests.distributed import run_distributed
from tests.pipeline.synthesis.literature import NEW
from tests.toy import Case

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16: dict[str, Any] = {"dtype": "bfloat16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}}
DECAY: dict[str, Any] = {"weight_decay": 5.0, "lr": 0.01}  # two groups of tensors: half a weight is gone in 14 steps
FP16: dict[str, Any] = {  # the scale is 512 when it is saved, and grows on
    "dtype": "float16",
    "config": {
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"initial_scale_power": 8, "loss_scale_window": 2},
    },
}
CASES = {
    "stage1-gru": Case(zero={"stage": 1}, rule="gru", scope="global"),
    "stage2-gru": Case(zero={"stage": 2}, rule="gru", scope="module"),
    "stage3-gru": Case(zero={"stage": 3, "stage3_param_persistence_threshold": 0}, rule="gru", scope="global"),
    "stage3-subgroups": Case(zero={"stage": 3, "sub_group_size": 40}),  # of elements: many groups, others on each count
    "stage3-offload": Case(zero={"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}}),
    "stage3-sgd": Case(zero={"stage": 3}, optimizer="sgd", lr=0.1),
    "stage2-decay": Case(zero={"stage": 2}, **DECAY),
    "stage3-decay": Case(zero={"stage": 3, "sub_group_size": 40}, **DECAY),
    "stage3-metric": Case(zero={"stage": 3, "sub_group_size": 40}, rule="pcgrad", scope="global", metric="adam"),
    "stage3-confined": Case(zero={"stage": 3, "sub_group_size": 40}, confine=(0.3, "forget_mean_square")),
    "adapters": Case(model="adapters", zero={"stage": 3}),
    "stage2-adapters": Case(model="adapters", zero={"stage": 2}),
    "stage3-bf16": Case(zero={"stage": 3}, **BF16),
    "stage3-fp16-gru": Case(zero={"stage": 3}, rule="gru", scope="global", **FP16),
}
MORE = {  # slow
    "stage0": Case(zero={"stage": 0}),
    "stage2-offload": Case(zero={"stage": 2, **OFFLOAD}),
    "stage1-bf16-decay": Case(zero={"stage": 1}, **BF16, **DECAY),
    "stage2-offload-decay": Case(zero={"stage": 2, **OFFLOAD}, **DECAY),
    "stage3-sgd-decay": Case(zero={"stage": 3}, optimizer="sgd", **{**DECAY, "lr": 0.1}),
    "stage2-sgd": Case(zero={"stage": 2}, optimizer="sgd", lr=0.1),
    "stage1-bf16": Case(zero={"stage": 1}, **BF16),
    "stage2-bf16": Case(zero={"stage": 2}, **BF16),
    "stage0-bf16": Case(zero={"stage": 0}, dtype="bfloat16"),
    "stage0-adapters": Case(model="adapters", zero={"stage": 0}),
    "stage1-bf16-gru": Case(zero={"stage": 1}, rule="gru", scope="global", **BF16),
    "stage2-bf16-gru": Case(zero={"stage": 2}, rule="gru", scope="global", **BF16),
    "stage2-bloop": Case(zero={"stage": 2}, rule="bloop", scope="module"),
    "stage3-gradvac": Case(zero={"stage": 3, "sub_group_size": 40}, rule="gradvac", scope="module"),
    "stage2-gradvac": Case(zero={"stage": 2, "round_robin_gradients": True}, rule="gradvac", scope="layer"),
    "stage3-graddrop": Case(zero={"stage": 3}, rule="graddrop", scope="element"),
    "stage2-graddrop": Case(zero={"stage": 2}, rule="graddrop", scope="element"),
    "stage2-metric": Case(zero={"stage": 2}, rule="pcgrad", scope="global", metric="adam", **DECAY),
    "stage3-fp16-metric": Case(zero={"stage": 3}, rule="pcgrad", scope="global", metric="adam", **FP16),
    "stage2-confined": Case(zero={"stage": 2}, confine=(0.3, "forget_mean_square")),
    "stage2-fp16-gru": Case(zero={"stage": 2}, rule="gru", scope="global", **FP16),
}
ALL = {name: dataclasses.replace(case, steps=6, eps=1e-6) for name, case in {**CASES, **MORE}.items()}
SAVED = 3  # steps before the checkpoint
IDENTITY = {"toy": 1}


class Schedule:
    """Stands for a torch schedule: counts."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, **arguments: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def master(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights by name, whole, by DeepSpeed's own public function. (Adam's moments show in what follows.)

    Under round_robin_gradients that function mixes parameters up: there the model's own weights, which must be fp32.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    if not engine.zero_optimization_stage():
        return {}
    if getattr(engine.optimizer, "round_robin_gradients", False):
        assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.float32}
        return toy.weights_of(engine.module)
    found = {
        name: safe_get_full_fp32_param(parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def start_ranks() -> None:
    from deepspeed.accelerator import get_accelerator

    from pipeline.distributed import process_group as ranks

    ranks.start()
    get_accelerator().is_fp16_supported = lambda: True  # slowly, on a CPU  # pyright: ignore


def frozen_in(checkpoint: Path, engine: Any) -> list[str]:
    """The frozen tensors that DeepSpeed's files of a checkpoint hold, by name."""
    frozen = {name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
    assert frozen
    found: list[str] = []
    for file in checkpoint.glob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        found += [name for name in (*state["module"], *(state["frozen_param_fragments"] or ())) if name in frozen]
    return found


def train_and_save(folder: str, names: list[str]) -> None:
    from pipeline.zero import checkpoint

    start_ranks()
    for name in names:
        records: dict[str, Any] = {}

        def start(engine: Any, combiner: Any) -> None:
            engine.lr_scheduler = Schedule()

        def save(engine: Any, combiner: Any, step: int) -> None:
            if step == SAVED:
                records["master"] = master(engine)  # noqa: B023
                checkpoint.save(engine, combiner, Path(folder, name), step, keep=1, identity=IDENTITY)  # noqa: B023
                saved = checkpoint.newest(Path(folder, name))  # noqa: B023
                assert saved is not None
                records["frozen"] = frozen_in(saved, engine)  # noqa: B023

        made = toy.train_on_engine(ALL[name], start, save)
        torch.save({"weights": made["weights"], **records}, Path(folder, f"{name}.pt"))


def load_and_train(folder: str, names: list[str]) -> None:
    import torch.distributed as dist

    from pipeline.zero import checkpoint

    start_ranks()
    opened: list[tuple[str, Any, Any]] = []
    plainly = torch.load

    def watched(file: Any, *arguments: Any, **named: Any) -> Any:
        opened.append((Path(file).name, named.get("mmap"), named.get("map_location")))
        return plainly(file, *arguments, **named)

    for name in names:
        records: dict[str, Any] = {}

        def load(engine: Any, combiner: Any) -> None:
            engine.lr_scheduler = Schedule()
            newest = checkpoint.newest(Path(folder, name))  # noqa: B023
            opened.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "load", watched)
                assert newest is not None and checkpoint.load(engine, combiner, newest, IDENTITY) == SAVED
            records["opened"] = [one for one in opened if one[0].startswith("own-")]  # noqa: B023
            records["scale"] = getattr(engine.optimizer, "cur_scale", None)  # noqa: B023
            assert engine.lr_scheduler.steps == SAVED and engine.global_steps == SAVED
            records["master"] = master(engine)  # noqa: B023

        made = toy.train_on_engine(ALL[name], load, first=SAVED)
        if dist.get_rank() == 0:
            torch.save({"weights": made["weights"], **records}, Path(folder, f"{name}-{dist.get_world_size()}.pt"))


def make(factory: pytest.TempPathFactory, names: list[str]) -> Path:
    folder = factory.mktemp("reshard")
    run_distributed(train_and_save, 2, str(folder), names)
    for world in (1, 2, 3):
        run_distributed(load_and_train, world, str(folder), names)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory, list(CASES))


@pytest.fixture(scope="module")
def made_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory, list(MORE))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_goes_on_as_if_nothing_had_happened(name: str, world: int, made: Path) -> None:
    check(name, world, made)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", MORE)
def test_more_ways_to_hold_the_state(name: str, world: int, made_more: Path) -> None:
    check(name, world, made_more)


def check(name: str, world: int, made: Path) -> None:
    case = ALL[name]
    whole, resumed = (torch.load(made / file) for file in (f"{name}.pt", f"{name}-{world}.pt"))
    assert not whole["frozen"]
    files = ["own-0.pt"] if world == 2 else ["own-0.pt", "own-1.pt"]  # as the first rank opened them: its own part only
    assert resumed["opened"] == [(file, True, "cpu") for file in files]
    assert case.dtype != "float16" or resumed["scale"] == 512
    assert set(resumed["master"]) == set(whole["master"])
    assert all(torch.equal(tensor, resumed["master"][key]) for key, tensor in whole["master"].items())
    if world == 2:
        assert all(torch.equal(tensor, resumed["weights"][key]) for key, tensor in whole["weights"].items())
    elif case.dtype == "float32":
        # The plain loop has no formulas for the rules of the literature, which test_rules.py compares with others.
        plain = whole["weights"] if case.rule in NEW else toy.train_plainly(case)[0]
        assert toy.error_of(case, resumed, plain) < 2e-5


def check_layouts(cases: dict[str, Case]) -> None:
    """Before the first step the flat fp32 tensors hold the weights themselves, rounded nowhere."""
    from pipeline.zero.optimizer_state import optimizer_layout

    start_ranks()
    for name, case in cases.items():
        engine = toy.engine_of(case, toy.model_of(case))
        flats = [group["params"][0] for group in engine.optimizer.optimizer.param_groups]
        weights, seen = toy.weights_of(engine.module), 0
        for flat, fragments in zip(flats, optimizer_layout(engine), strict=True):
            for one in fragments:
                of_model = weights[one.name].flatten()[one.param_offset :][: one.numel]
                assert torch.equal(flat[one.flat_offset :][: one.numel].cpu(), of_model), (name, one)
                seen += one.numel
        assert sum(flat.numel() for flat in flats) - 8 < seen <= sum(flat.numel() for flat in flats), name  # padding
        engine.destroy()


def test_a_checkpoint_records_where_each_element_lies() -> None:
    """By the weights found there, and so whatever the order of a partition."""
    ways: dict[str, dict[str, Any]] = {
        "in the model's order": {"stage": 1},
        "round robin": {"stage": 2, "round_robin_gradients": True},
        "round robin in host memory": {"stage": 2, "round_robin_gradients": True, **OFFLOAD},
    }
    run_distributed(check_layouts, 2, {name: Case(zero=zero, **DECAY) for name, zero in ways.items()})


def test_deal_takes_every_element_from_where_it_is() -> None:
    """Ten elements of `a` and one of `b`, cut for three ranks with padding, dealt to two otherwise cut ones."""
    a, b, no = torch.arange(10.0), torch.tensor([100.0]), torch.full((1,), -1.0)
    old = [
        ([Fragment("a", 0, 4, 0), Fragment("b", 0, 1, 4)], torch.cat([a[:4], b])),
        ([Fragment("a", 4, 4, 0), Fragment("b", 1, 0, 4)], torch.cat([a[4:8], no])),
        ([Fragment("a", 8, 2, 0), Fragment("b", 2, 0, 4)], torch.cat([a[8:], no, no, no])),
    ]
    first, second = torch.full((7,), -5.0), torch.full((6,), -5.0)
    copy_fragments(old, ([Fragment("a", 0, 7, 0)], first))
    copy_fragments(old, ([Fragment("b", 0, 1, 1), Fragment("a", 7, 3, 2)], second))
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert second.tolist() == [-5, 100, 7, 8, 9, -5]
    with pytest.raises(ValueError, match="2 of 10 elements of a"):
        copy_fragments(old[:2], ([Fragment("a", 0, 10, 0)], torch.empty(10)))
