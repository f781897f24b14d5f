"""The optimizer on a disk: the plain loop's weights, and CPU offload's bit for bit. A plain folder is the disk.

DeepSpeed's own way loses gradients whose place in memory a direct read refuses (docs/log.md).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]
from safetensors.torch import load_file

from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.stages import FP32_WIRE, OFFLOAD, RULES, SGD, assert_equal_to_plain, train
from tests.pipeline.zero.test_sharded import train_cases as train_program
from tests.toy import Case, engine_of, model_of, weights_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Minutes, where DeepSpeed has not compiled it before."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("this machine lacks libaio or a C++ compiler")
    AsyncIOBuilder().load(verbose=False)


def on(disk: Path, **more: Any) -> dict[str, Any]:
    disk.mkdir()
    return {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(disk), **more}}


def swapped(disk: Path, rank: int = 0) -> list[str]:
    """Names of what was swapped out: `FIRST_LAST` for the weights of a sub-group, `KIND-FIRST_LAST` for a state."""
    return sorted(file.name.split(".")[0] for file in disk.glob(f"zero_stage_3/optimizer/rank{rank}/*.swp"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_equal_cpu_offload_and_the_plain_loop(world_size: int, tmp_path: Path) -> None:
    """`wide`: one sub-group in which nothing is aligned; `even`: two sub-groups of whole blocks, the rest in memory."""
    cases = {}
    for rule in ("sum", "sago", "pcgrad-global"):
        for model, zero in (("wide", {}), ("even", {"sub_group_size": 1})):
            name = f"{model}-{rule}"
            cases[name] = Case(model=model, zero={**on(tmp_path / name), **zero}, lr=1e-3, steps=3, **RULES[rule])
    pipelined = on(tmp_path / "pipelined-sago", pipeline_read=True, pipeline_write=True, buffer_count=12)
    cases["pipelined-sago"] = replace(cases["wide-sago"], zero={**pipelined, "sub_group_size": 1})
    cases["bf16-sago"] = replace(
        cases["wide-sago"], zero=on(tmp_path / "bf16-sago"), dtype="bfloat16", config=FP32_WIRE
    )
    shipped = json.loads(Path("ds_configs/zero3_nvme.json").read_text())["zero_optimization"]
    shipped["offload_optimizer"].update(on(tmp_path / "shipped-sago")["offload_optimizer"])
    cases["shipped-sago"] = replace(cases["wide-sago"], zero=shipped)
    in_memory = {
        f"{name} cpu": replace(case, zero={**case.zero, **OFFLOAD}) for name, case in cases.items() if "sago" in name
    }
    made = train({**cases, **in_memory}, world_size, tmp_path)
    for name in cases:
        for rank in range(world_size):
            files = swapped(tmp_path / name, rank)
            groups = 2 if cases[name].zero.get("sub_group_size") == 1 else 1
            assert sum(file.startswith("exp_avg-") for file in files) == groups and len(files) == 3 * groups, files
        if f"{name} cpu" in made:
            cpu = made[f"{name} cpu"]
            assert all(torch.equal(cpu["weights"][key], value) for key, value in made[name]["weights"].items()), name
            assert [r["norm"] for r in cpu["records"]] == [r["norm"] for r in made[name]["records"]], name
    # SAGO turns on signs, and of 1.3 million elements some are zero but for rounding (bf16: more), offloaded or not.
    assert_equal_to_plain(made, cases, world_size, lambda name: 3e-3 if "sago" in name else 2e-5)


def train_alone(cases: dict[str, Case], file: str) -> None:
    """DeepSpeed alone: one backward per step, of the retain loss."""
    from pipeline.distributed import process_group as ranks

    ranks.start()
    made = {}
    for name, case in cases.items():
        model = model_of(case)
        engine = engine_of(case, model)
        for _ in range(case.steps):
            engine.backward(engine(torch.tensor([[0, 3], [4, 5]]), "retain", True, True))
            engine.step()
        made[name] = weights_of(model)
        engine.destroy()
    torch.save(made, file)


def test_deepspeed_alone_loses_gradients(tmp_path: Path) -> None:
    """The case above of one rank and no alignment, without our hand-over."""
    case = Case(model="wide", steps=2, **SGD)
    cases = {"cpu": replace(case, zero={"stage": 3, **OFFLOAD}), "nvme": replace(case, zero=on(tmp_path / "disk"))}
    made = train(cases, 1, tmp_path, train_alone)
    assert any("gradient" in name for name in swapped(tmp_path / "disk"))
    if all(torch.equal(made["cpu"][key], made["nvme"][key]) for key in made["cpu"]):
        pytest.skip("this disk reads to any address, and DeepSpeed alone is right")
    wrong = [key for key in made["cpu"] if not torch.allclose(made["cpu"][key], made["nvme"][key], atol=1e-4)]
    assert "down.weight" in wrong


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_through_the_program(schedule: str, world: World, tmp_path: Path) -> None:
    """A model large enough to be swapped, loaded in shares and exported."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig.from_pretrained(world.folder / "model", intermediate_size=3001)
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(world.folder / "model").save_pretrained(tmp_path / "model")
    settings = {}
    for name in ("nvme", "cpu"):
        zero = on(tmp_path / name)
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"zero_optimization": {**zero, **(OFFLOAD if name == "cpu" else {})}})
        )
        settings[name] = world.configuration(
            tmp_path / f"run-{name}",
            model={"path": str(tmp_path / "model")},
            synthesis={"rule": "pcgrad"},
            train={"deepspeed": str(tmp_path / f"{name}.json"), "schedule": schedule},
        )
    run_distributed(train_program, 2, list(settings.values()))
    assert len(swapped(tmp_path / "nvme", 1)) == 3
    nvme, cpu = (load_file(tmp_path / f"run-{name}" / "final" / "model.safetensors") for name in ("nvme", "cpu"))
    assert all(torch.equal(nvme[key], cpu[key]) for key in cpu)
    weights, _ = oracle.train(settings["nvme"])
    initial = load_file(tmp_path / "model" / "model.safetensors")
    assert oracle.weight_change_error(nvme, weights, initial) < 2e-5


def try_folders(missing: str, taken: str) -> None:
    from pipeline.distributed import process_group as ranks
    from pipeline.errors import InputError
    from pipeline.zero.nvme import check_nvme_path

    ranks.start()
    with pytest.raises(InputError, match=f"nvme_path {missing}: No such file or directory; name a folder"):
        check_nvme_path(Path(missing))
    check_nvme_path(Path(taken))
    with pytest.raises(InputError, match=f"nvme_path {taken} is in use by another run"):
        check_nvme_path(Path(taken))
    AsyncIOBuilder.is_compatible = lambda *_, **__: False  # pyright: ignore
    with pytest.raises(InputError, match="needs libaio"):
        check_nvme_path(Path(taken).parent)


def test_a_folder_that_cannot_serve_is_named(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    run_distributed(try_folders, 1, str(tmp_path / "missing"), str(tmp_path / "disk"))
