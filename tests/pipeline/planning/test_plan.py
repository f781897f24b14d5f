"""The command: what it chooses and prints, and that docs/results/plan.md is what it prints."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import plan
from pipeline.errors import InputError
from pipeline.planning import memory as budget_memory
from pipeline.planning import traffic
from pipeline.planning.meta_trace import Linear, ModelShape, Pass
from tests.conftest import World
from tests.pipeline.planning.base import configuration_of
from tests.pipeline.planning.test_memory import SHAPES, write_shape, write_zero


def test_the_slower_link_decides() -> None:
    """4 machines of 2: 8 GB gathered are 6 GB across at 10 GB/s, 7 GB inside at NVLink's speed."""
    machines = budget_memory.Cluster(2, 4, 80, 10, 400)
    assert traffic.CommVolume("all_gather", 8e9).seconds(machines) == pytest.approx(0.6)
    assert traffic.CommVolume("all_reduce", 8e9).seconds(machines) == pytest.approx(1.2)
    assert traffic.CommVolume("all_gather", 8e9, within_machine=True).seconds(machines) == pytest.approx(
        4e9 / traffic.NVLINK
    )
    assert traffic.CommVolume("all_gather", 8e9).seconds(budget_memory.Cluster(8, 1, 80, 0, 400)) == pytest.approx(
        7e9 / traffic.NVLINK
    )


def test_the_largest_micro_batch_that_fits(world: World) -> None:
    """With memory for everything the whole share of the batch; with less, less; with too little, by how much."""
    config = configuration_of(world.folder / "model", train={"batch_size": 32})

    def row(memory: float) -> plan.Row:
        rows = plan.make_plan(config, budget_memory.Cluster(2, 1, memory, 0, 400)).rows
        return next(row for row in rows if row.deepspeed == "ds_configs/zero1.json")

    roomy = row(80)
    assert (roomy.fits, roomy.micro_batch_size, roomy.lacks) == (True, 16, 0)
    tight = row((roomy.total - 1) / 2**30)
    assert (tight.fits, tight.micro_batch_size) == (True, 8)
    least = row(1)
    assert (least.fits, least.micro_batch_size) == (False, 1)
    assert row((least.total + 1) / 2**30).fits and least.lacks == pytest.approx(least.total - 2**30)


def test_main_memory_while_the_model_is_read_and_written() -> None:
    """A model of 20 GB in bf16 on one machine of 4, counted by hand: 2.5 G elements a tensor, and a rank."""
    config = configuration_of(Path("unused"), train={"batch_size": 32})

    def needs(exported: float = 20e9, trains: bool = True, gpu_memory: float = 80, **keys: Any) -> float:
        machines = budget_memory.Cluster(4, 1, gpu_memory, 0, 400)
        shape = ModelShape([2_500_000_000] * 4, [trains] * 4, 2, (10, 10), True, True)
        zero = budget_memory.Zero.of({"zero_optimization": keys}, shape)
        memory = budget_memory.states(shape, zero, config, machines)
        return budget_memory.main_memory(shape, zero, memory, machines, exported)

    # An export: 4 files of 5 GB at a time. A checkpoint: a sub-group in fp32, of 1 or 2 G elements, on 4 ranks.
    assert needs(stage=3) == 4 * 5e9
    assert needs(stage=3, sub_group_size=2e9) == 4 * 2e9 * 4
    # An adapter is no more than that.
    assert needs(stage=3, trains=False, exported=1e9) == 1e9
    # DeepSpeed takes what trains through main memory, to make one tensor of it.
    assert needs(stage=3, sub_group_size=1e6, exported=1e9) == 20e9
    # Below ZeRO-3 every rank reads the whole model, and where the GPU has no room for two it has two in main memory.
    assert needs(stage=2) == 4 * 20e9
    assert needs(stage=2, gpu_memory=40) == 4 * 40e9
    # What the first rank alone writes of a checkpoint, the weights, is beside what is offloaded: gradient twice, ...
    offloaded = 4 * 2.5e9 * (2 + 4 + 4 + 12)
    assert needs(stage=2, offload_optimizer={"device": "cpu"}, exported=1e9) == offloaded + 20e9
    # What is offloaded, the gradient twice, stash, master weights and moments, stays while a model is exported.
    assert needs(stage=3, offload_optimizer={"device": "cpu"}) == 4 * 2.5e9 * (2 + 4 + 2 + 12) + 4 * 5e9


def test_the_launch_line_is_a_run(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints resolves to the planned configuration, and the micro-batch divides the batch."""
    from pipeline.config.deepspeed import accumulation
    from pipeline.config.load import parse_command_line

    file = world.write(tmp_path / "run.yaml", tmp_path / "run", train={"batch_size": 32})
    where = ["--gpus", "2", "--nodes", "4", "--bandwidth", "25", "--gpu-memory", "80", "--disk-bandwidth", "2"]
    assert plan.main(["--config", str(file), *where, "--optimizer.lr", "1e-4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    launcher, _, arguments = answer["launch"].partition(" --module pipeline.train ")
    assert launcher == "deepspeed --hostfile hosts"
    config, *_ = parse_command_line(shlex.split(arguments))
    best = next(row for row in answer["configurations"] if row["deepspeed"] == answer["cheapest"])
    assert config.train.deepspeed == answer["cheapest"] and config.optimizer.lr == 1e-4
    assert best["fits"] and accumulation(config, 8) * best["micro_batch_size"] * 8 == 32
    assert (best["schedule"], answer["other_schedule"]["schedule"]) == ("sequential", "joint")
    assert all(stage["seconds"] == stage["bytes"] / 2e9 for stage in best["stages"] if stage["on_disk"])
    assert best["seconds"]["step"] == min(row["seconds"]["step"] for row in answer["configurations"] if row["fits"])


def test_auto_in_the_file_and_data_that_are_elsewhere_do_not_keep_from_planning(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`"auto"` plans what DeepSpeed's default plans, and the corpora are never opened."""
    keys = ("reduce_bucket_size", "stage3_param_persistence_threshold", "zero_hpz_partition_size", "overlap_comm")
    answers = []
    for name, zero in (("plain", {}), ("auto", {**dict.fromkeys(keys, "auto"), "offload_param": {"device": "auto"}})):
        content = {"zero_optimization": {"stage": 3, **zero}, "gradient_clipping": "auto", "data_types": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        missing = {"path": str(tmp_path / "elsewhere.jsonl")}
        asked = {**missing, "field": None, "prompt": "q", "response": "a", "refusals": str(tmp_path / "elsewhere.txt")}
        data = {"max_length": 24, "packing": "documents", "forget": asked, "retain": missing}
        train = {"deepspeed": str(tmp_path / f"{name}.json")}
        file = world.write(tmp_path / "run.yaml", tmp_path / "run", data=data, train=train, objective={"forget": "idk"})
        status = plan.main(["--config", str(file), "--gpus", "2", "--gpu-memory", "80", "--json"])
        out, err = capsys.readouterr()
        assert status == 0, err
        answers.append(json.loads(out)["configurations"][0])
    plain, auto = ({**row, "deepspeed": None} for row in answers)
    assert plain == auto and answers[1]["deepspeed"] == str(tmp_path / "auto.json")


WRONG = [
    (["--gpus", "0"], "--gpus must be above 0"),
    (["--gpus", "3"], "train.batch_size 12 does not divide over 9 GPUs; give a multiple, as --train.batch_size 18"),
    (["--nodes", "2", "--bandwidth", "nan"], "--bandwidth must be above 0"),
    (["--disk-bandwidth", "0"], "--disk-bandwidth must be above 0"),
    (["--model.path", "/nowhere/model"], "there is no folder /nowhere/model"),
    (["--model.trainable", "[nothing]"], "'nothing' matches no parameter"),
    (["--train.deepspeed", "missing.json"], f"there is no file {Path.cwd()}/missing.json"),
    (["--train.deepspeed", "{folder}/bad.json"], "bad.json: DeepSpeed refuses it: reduce_bucket: Extra inputs are not"),
    (["--optimiser.lr", "1"], "did you mean 'optimizer'?"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = world.write(tmp_path / "run.yaml", tmp_path / "run")
    (tmp_path / "bad.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket": 5}}')
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    given = {"--gpus": "2", "--gpu-memory": "80", "--nodes": "3", "--bandwidth": "50"}
    rest = [x for pair in given.items() if pair[0] not in arguments for x in pair]
    assert plan.main(["--config", str(file), *rest, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


DENSE: dict[str, dict[str, Any]] = {  # config.json of the models that docs/results/plan.md and README.md name
    "HuggingFaceH4/zephyr-7b-beta": {},
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "heads": 32},
    },
    "meta-llama/Llama-3.1-70B": {"hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "heads": 64},
    "meta-llama/Llama-3.1-405B": {"hidden_size": 16384, "intermediate_size": 53248, "layers": 126, "heads": 128},
}
PAGE = Path("docs/results/plan.md")


def run_documented(command: str, folder: Path) -> tuple[str, list[str]]:
    """(what `command` prints, cells of docs/guides/cluster.md), the hub's model replaced by one of its shape."""
    from transformers import LlamaConfig, MistralConfig

    config, machines, _, given = plan.parse(shlex.split(command)[3:])
    name = config.model.path
    sizes = dict(DENSE[name])
    if not sizes:
        shape: Any = MistralConfig(vocab_size=32000, num_key_value_heads=8)
    else:
        sizes |= {"num_hidden_layers": sizes.pop("layers"), "num_attention_heads": sizes.pop("heads")}
        shape = LlamaConfig(vocab_size=128256, num_key_value_heads=8, **sizes)
    shape.save_pretrained(folder / name)
    model = config.model.model_copy(update={"path": str(folder / name)})
    made = plan.make_plan(config.model_copy(update={"model": model}), machines)
    best = made.cheapest
    assert best is not None
    kind = name.rpartition("/")[2] + (", adapters" if config.model.lora else "")
    kind += " on 4 bits" if config.model.load_in_4bit else ""
    where = f"{machines.nodes} × {machines.gpus}"
    where += "" if machines.gpu_memory == 80 else f" of {machines.gpu_memory:g} GiB"
    cells = [kind, where, f"`{Path(best.deepspeed).stem}`", str(best.micro_batch_size)]
    return plan.report(made, machines, given), [*cells, f"{best.total / 2**30:.0f}", f"{best.seconds.step:.1f}"]


BLOCK = re.compile(r"```bash\n(python -m pipeline\.plan[^`]*?)\n```\n(?:\n```text\n(.*?)\n```\n)?", re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text())


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, len(BLOCKS)))]
)
def test_the_documentation_is_what_the_command_prints(number: int, tmp_path: Path) -> None:
    """`python -m tests.pipeline.planning.test_plan` writes the page anew."""
    command, printed = BLOCKS[number]
    found, cells = run_documented(command, tmp_path)
    assert printed == found
    assert f"| {' | '.join(cells)} |" in Path("docs/guides/cluster.md").read_text(), cells


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        rows = []

        def anew(block: re.Match[str]) -> str:
            printed, cells = run_documented(block[1], Path(scratch))
            rows.append(f"| {' | '.join(cells)} |")
            return f"```bash\n{block[1]}\n```\n\n```text\n{printed}\n```\n"

        PAGE.write_text(BLOCK.sub(anew, PAGE.read_text()))
    sys.stdout.write("\n".join([*rows, ""]))  # for docs/guides/cluster.md


def test_a_model_that_a_joint_run_refuses_has_no_plan(world: World, tmp_path: Path) -> None:
    """One that `sum` trains in joint passes, which separates nothing, has."""
    folder = write_shape(world, tmp_path / "experts", SHAPES["experts"])

    def plan_of(rule: str) -> plan.Plan:
        keys = {"synthesis": {"rule": rule}, "train": {"batch_size": 32, "schedule": "joint"}}
        return plan.make_plan(configuration_of(folder, **keys), budget_memory.Cluster(2, 1, 80, 0, 400))

    with pytest.raises(InputError, match=r"train\.schedule: joint has no rule .*MixtralExperts"):
        plan_of("sago")
    assert plan_of("sum").cheapest is not None


def test_a_step_of_the_other_schedule_is_told_where_it_differs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the network decides, a joint pass gathers once for both tasks; the figure is that of a joint run's plan."""
    monkeypatch.setattr(plan, "SHIPPED", ())
    file = write_zero(tmp_path / "gathers.json", "zero3")

    def plan_of(bandwidth: float, **train: Any) -> plan.Plan:
        keys = {"batch_size": 32, "deepspeed": file, **train}
        config = configuration_of(world.folder / "model", train=keys)
        return plan.make_plan(config, budget_memory.Cluster(2, 2, 80, bandwidth, 400))

    slow, joint = plan_of(1e-5), plan_of(1e-5, schedule="joint")
    best, other = slow.cheapest, slow.other_schedule
    assert best is not None and other is not None and (best.schedule, other.schedule) == ("sequential", "joint")
    (same,) = joint.rows
    assert other == same
    # Once less, forward and backward: 2 bytes of each element of two blocks' and the vocabulary's matrices (those of
    # keys and values are small, and never sharded). Half of them come from the other machine, at 10 kB a second.
    vocabulary = json.loads((world.folder / "model" / "config.json").read_text())["vocab_size"]
    gathered = 2 * 2 * (2 * (2 * 32 * 32 + 3 * 64 * 32) + 2 * vocabulary * 32)
    assert best.seconds.step - other.seconds.step == pytest.approx(gathered / 2 / 1e4)
    times = f"{other.seconds.step:.1f} s in micro-batches of 8, not {best.seconds.step:.1f} s"
    assert plan.schedule_lines(best, other) == [f"under train.schedule: joint a step takes {times}"]
    fast = plan_of(100)  # both round to 0.0 s
    assert fast.cheapest is not None and plan.schedule_lines(fast.cheapest, fast.other_schedule) == []
    alone = configuration_of(world.folder / "model", train={"deepspeed": file}, objective={"retain": "none"})
    assert plan.make_plan(alone, budget_memory.Cluster(2, 2, 80, 100, 400)).other_schedule is None


def test_a_model_that_makes_its_logits_makes_those_of_both_tasks_at_once() -> None:
    """[4, tokens, 1000] logits of a task in fp32, four times (logits, two of a cap, gradient), of each of two tasks."""
    shape = ModelShape([10_000], [False], 4, (1000, 10), False, False)
    nothing = Linear(0.0, 0.0)
    one = Pass(nothing, nothing, nothing, nothing, [], [], [])
    for schedule, tasks in (("sequential", 1), ("joint", 2)):
        config = configuration_of(Path("unused"), train={"schedule": schedule})
        _, logits = budget_memory.working(config, shape, {"forget": one, "retain": one}, 4)
        assert logits == tasks * 4 * 4 * 4 * config.data.max_length * 1000
