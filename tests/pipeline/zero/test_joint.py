"""Both tasks in one pass: the weights of the plain loop and of the other schedule, and what is refused before training.

`tests/pipeline/modeling/test_row_rules.py` compares the two gradients themselves, on many architectures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.kinds import TEXT
from tests.pipeline.zero import test_sharded
from tests.toy import Case, engine_of

# By default ZeRO-2 and 3, and of 3 a bucket that is reduced several times in a backward pass.
ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "overlap_comm": True},
    "zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 10**6},
    "zero3-small": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000},
    "zero3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
PCGRAD = {"synthesis": {"rule": "pcgrad"}}
SGD = {"optimizer": {"name": "sgd", "lr": 1.0}}
OWN: dict[str, dict[str, Any]] = {
    "checkpointing": {"model": {"gradient_checkpointing": True}, **PCGRAD},
    "adapters": {"model": {"lora": {"r": 4, "alpha": 8}}, **PCGRAD, **SGD},
    "frozen": {"model": {"trainable": [r"layers\.1\.", "embed_tokens"]}, **PCGRAD},
}
SHARED = [  # of test_sharded: two tasks, and no hidden states
    name
    for name, case in test_sharded.CASES.items()
    if "none" not in case.get("objective", {}).values() and "layer" not in case.get("objective", {})
]
FEW = [
    *(("zero3", case) for case in ("sago", "npo-kl", "checkpointing")),
    *(("zero3-small", case) for case in ("tied", "adapters")),
    *(("zero2", case) for case in ("pcgrad-global", "frozen")),
]
MORE = [
    *(("zero3-small", case) for case in (*SHARED, *OWN)),
    *(
        (zero, case)
        for zero in ZERO
        for case in ("sum", "sago", "pcgrad-module", "pcgrad-global", "gru", "tied", "npo-kl")
    ),
    ("zero2", "adapters"),
]


def configurations(world: World, folder: Path, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Keys of a run for each (file of ZERO, case), under `joint`; two or three micro-batches a task, step and rank."""
    made = {}
    for zero, case in wanted:
        file = folder / f"{zero}.json"
        file.write_text(json.dumps({"zero_optimization": ZERO[zero]}))
        if case in OWN:
            sections = {"optimizer": {"eps": 1e-6}, **OWN[case]}
            keys = world.configuration(folder / zero / case, **sections)
        else:
            keys = test_sharded.configurations(world, folder / zero)[case]
        made[zero, case] = {**keys, "train": {**keys["train"], "deepspeed": str(file), "schedule": "joint"}}
    return made


def final_weights(keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of a run, by the names of the plain loop."""
    final = Path(keys["output"]) / "final"
    if keys["model"].get("lora") is None:
        return load_file(final / "model.safetensors")
    adapter = load_file(final / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter.items()}


def initial_weights(keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in oracle.model_of(keys).named_parameters()}


def assert_equal_to_the_plain_loop(made: dict[tuple[str, str], dict[str, Any]]) -> None:
    expected: dict[str, Any] = {}
    wrong = []
    for (zero, case), keys in made.items():
        if case not in expected:
            expected[case] = oracle.train(keys)
        error = oracle.weight_change_error(final_weights(keys), expected[case][0], initial_weights(keys))
        print(f"joint, {zero} {case}: relative error of the weight change {error:.1e}")
        if error >= (2e-4 if "sago" in case else 2e-5):
            wrong.append((zero, case, error))
        test_sharded.agree_with_the_plain_loop(case, Path(keys["output"]), expected)
    assert not wrong


def test_the_weights_and_metrics_of_the_plain_loop(world: World, tmp_path: Path) -> None:
    made = configurations(world, tmp_path, FEW)
    run_distributed(test_sharded.train_cases, 2, list(made.values()))
    assert_equal_to_the_plain_loop(made)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO)
def test_the_weights_and_metrics_of_the_plain_loop_in_the_other_cases(zero: str, world: World, tmp_path: Path) -> None:
    wanted = [one for one in dict.fromkeys(MORE) if one not in FEW and one[0] == zero]
    made = configurations(world, tmp_path, wanted)
    run_distributed(test_sharded.train_cases, 2, list(made.values()), timeout=900)
    assert_equal_to_the_plain_loop(made)


@pytest.mark.slow
def test_three_ranks(world: World, tmp_path: Path) -> None:
    made = configurations(
        world, tmp_path, [(zero, case) for zero in ("zero2", "zero3-small") for case in ("sago", "tied")]
    )
    run_distributed(test_sharded.train_cases, 3, list(made.values()))
    assert_equal_to_the_plain_loop(made)


# -- the other schedule ------------------------------------------------------------------------------------------------
def resume(keys: dict[str, Any]) -> None:
    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.trainer import run

    config = RunConfig.model_validate(keys)
    run(config, deepspeed_config(config), resume=True)


def in_both_schedules(world: World, folder: Path, **train: Any) -> dict[str, dict[str, Any]]:
    return {
        schedule: world.configuration(folder / schedule, **PCGRAD, **SGD, train={"schedule": schedule, **train})
        for schedule in ("sequential", "joint")
    }


def test_the_schedule_changes_nothing_not_even_within_a_run(world: World, tmp_path: Path) -> None:
    """Products of more rows may be added up in another order, and rows have more padding where the other task has the
    longer document: that is rounding. The third run begins under one schedule and is resumed under the other.
    """
    runs = in_both_schedules(world, tmp_path, checkpoint_every=2)
    run_distributed(test_sharded.train_cases, 2, list(runs.values()))
    runs["mixed"] = {**runs["joint"], "output": str(tmp_path / "mixed")}
    shutil.copytree(tmp_path / "sequential", tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "final")
    shutil.rmtree(tmp_path / "mixed" / "checkpoints" / "step-000004")
    run_distributed(resume, 2, runs["mixed"])

    final, initial = {name: final_weights(keys) for name, keys in runs.items()}, initial_weights(runs["joint"])
    for name in ("joint", "mixed"):
        error = oracle.weight_change_error(final[name], final["sequential"], initial)
        print(f"{name} beside sequential: relative difference of the weight change {error:.1e}")
        assert error < 1e-6, name
    lines = [json.loads(line) for line in (tmp_path / "mixed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zero2", "cpu"])  # ZeRO-2, ZeRO-3
def test_the_schedule_changes_no_bit_in_bf16_where_rows_are_of_one_length(
    file: str, world: World, tmp_path: Path
) -> None:
    """No row has padding, and no sum other terms: so a step under AdamW, which a sign can turn, is the same step.

    That is so for one micro-batch a rank. Of several, a joint pass adds the forget gradients up before it reduces them
    once, where sequential passes reduce each: a sum in another order.
    """
    base = world.configuration("")
    sections = {
        "model": {**base["model"], "dtype": "bfloat16"},
        "data": {**base["data"], "packing": "blocks", "long_documents": "truncate", "max_length": 16},
    }
    runs = {
        schedule: world.configuration(
            tmp_path / schedule,
            **PCGRAD,
            **sections,
            train={"schedule": schedule, "deepspeed": f"ds_configs/{file}.json", "batch_size": 4},
        )
        for schedule in ("sequential", "joint")
    }
    run_distributed(test_sharded.train_cases, 2, list(runs.values()))
    sequential, joint = (final_weights(runs[schedule]) for schedule in ("sequential", "joint"))
    initial = initial_weights(runs["joint"])
    for name, tensor in sequential.items():
        assert torch.equal(tensor, joint[name]), name
        assert not torch.equal(tensor, initial[name].bfloat16()), name


# -- traffic -----------------------------------------------------------------------------------------------------------
def count_gathers(keys: dict[str, dict[str, Any]], report: str) -> None:
    """Elements of all all-gathers and of all reductions of the third step of each run, as rank 0 saw them."""
    import torch.distributed as dist

    from pipeline.trainer import StepResult, TrainStep

    seen = {"all_gather_into_tensor": 0, "reduce_scatter_tensor": 0}
    step, plain = TrainStep.train_step, {name: getattr(dist, name) for name in seen}

    def watched(name: str) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            seen[name] += max(x.numel() for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor))
            return plain[name](*arguments, **options)

        return wrapper

    for name in seen:
        setattr(dist, name, watched(name))

    counts: dict[str, dict[str, int]] = {}

    def counted(self: TrainStep, number: int) -> StepResult:
        seen.update(dict.fromkeys(seen, 0))
        result = step(self, number)
        if number == 2:
            counts[name_of_run] = dict(seen)
        return result

    TrainStep.train_step = counted  # pyright: ignore[reportAttributeAccessIssue]
    for name_of_run, configuration in keys.items():  # noqa: B007  (`counted` reads it)
        test_sharded.train_cases([configuration])
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(counts))


def test_each_weight_is_gathered_once_for_both_tasks(world: World, tmp_path: Path) -> None:
    """And both gradients are reduced, as two passes reduce them: 2 tasks, each micro-batch, all elements."""
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {**ZERO["zero3-small"], **NOT_KEPT}}))
    runs = {}
    for schedule in ("sequential", "joint"):
        train = {"schedule": schedule, "steps": 3, "deepspeed": str(tmp_path / "zero3.json")}
        runs[schedule] = world.configuration(tmp_path / schedule, train=train)
    run_distributed(count_gathers, 2, runs, str(tmp_path / "counts.json"))
    counts = json.loads((tmp_path / "counts.json").read_text())
    print(counts)
    elements = sum(tensor.numel() for tensor in load_file(world.folder / "model" / "model.safetensors").values())
    micro_batches = 12 // (2 * 2)
    assert counts["joint"]["all_gather_into_tensor"] * 2 == counts["sequential"]["all_gather_into_tensor"]
    for schedule in runs:
        reduced = counts[schedule]["reduce_scatter_tensor"]
        assert 2 * micro_batches * elements <= reduced < 2.02 * micro_batches * elements, "with padding"


NOT_KEPT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


# -- refusals ----------------------------------------------------------------------------------------------------------
def refuse(problem: str, message: str) -> None:
    """A model in which no module is of an unknown kind, and all the same the rows of two tasks cannot be separated."""
    import transformers

    from pipeline.distributed import process_group
    from pipeline.errors import InputError
    from pipeline.losses.joint import check_separation
    from pipeline.modeling.outputs import install_outputs
    from pipeline.modeling.row_rules import install_rules
    from pipeline.synthesis.combine import Synthesis
    from pipeline.zero.combiner import GradientCombiner
    from pipeline.zero.joint import JointPass, TaskRows

    process_group.start()
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    mlp, borrowed = model.model.layers[0].mlp, model.model.layers[1].self_attn.o_proj
    plain = mlp.forward

    def only_some_tokens(x: torch.Tensor) -> torch.Tensor:
        """As a module for each expert: it gets the tokens that a router sends there, of one row after the other."""
        flat = x.flatten(0, 1)
        chosen = (flat[:, 0] > 0).nonzero().squeeze(1)
        return torch.zeros_like(flat).index_copy(0, chosen, plain(flat[chosen])).view_as(x)

    mlp.forward = {
        "rows are mixed": lambda x: plain(x) + plain(x).mean(0, keepdim=True),
        "parameters are read elsewhere": lambda x: plain(x) + x @ borrowed.weight,
        "tokens are routed": only_some_tokens,
        "rows are not first": lambda x: plain(x.transpose(0, 1)).transpose(0, 1),
        "nothing": plain,
    }[problem]
    rows = TaskRows()
    install_rules(model, rows)
    engine: Any = engine_of(Case(zero={"stage": 2}), model)
    install_outputs(engine)
    joint = JointPass(GradientCombiner(engine, Synthesis("sago"), combine_tasks=True), rows, 1)
    if message:
        with pytest.raises(InputError, match=message):
            check_separation(engine, joint)
    else:
        check_separation(engine, joint)
    engine.destroy()


REFUSED = {
    "rows are mixed": r"joint cannot separate the gradients .* in model\..*train\.schedule: sequential",
    "parameters are read elsewhere": r"in model\.layers\.1\.self_attn\.o_proj\.weight: the forget loss reaches both",
    "tokens are routed": r"cannot separate the (rows|gradients) .*train\.schedule: sequential",
    "rows are not first": r"cannot separate the rows .* model\.layers\.0\.mlp\.gate_proj \(Linear\).*sequential",
    "nothing": "",
}


def refuse_each() -> None:
    for problem, message in REFUSED.items():
        refuse(problem, message)


def test_rows_that_cannot_be_separated_are_refused_before_training() -> None:
    run_distributed(refuse_each, 2)
