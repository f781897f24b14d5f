"""The plan against live engines: bytes by kind, bytes sent, and the memory of a forward and backward pass."""

from __future__ import annotations

import json
import re
import shlex
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import plan
from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.schema import RunConfig
from pipeline.planning import memory as budget_memory
from pipeline.planning import meta_trace as rehearsal
from pipeline.planning import traffic
from tests.conftest import World
from tests.distributed import run_distributed

# -- on engines --------------------------------------------------------------------------------------------------------


def storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the storages below `tensors`, those that hold something."""
    kept = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in kept if storage.nbytes()}


def measure(configurations: dict[str, dict[str, Any]], report: str) -> None:
    """Of each run's third step on rank 0: bytes by kind just before `engine.step()`, bytes asked of collectives."""
    import torch.distributed as dist

    sent: dict[str, int] = {}
    watching = False

    def watch(name: str) -> None:
        original = getattr(dist, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
            kind = name.removesuffix("_into_tensor").removesuffix("_tensor")
            if dist.get_world_size(options.get("group")) < dist.get_world_size():
                kind += " within"
            if watching:
                sent[kind] = sent.get(kind, 0) + max(x.numel() * x.element_size() for x in tensors)
            return original(*arguments, **options)

        setattr(dist, name, wrapper)

    for collective in REDUCTIONS.split():
        watch(collective)

    from deepspeed.utils import groups

    from pipeline import trainer as program

    step, found, run = program.train_step, {}, ""

    def watched_step(engine: Any, shards: Any, tasks: Any, number: int, monitor: Any) -> bool:
        nonlocal watching
        holder, finish = shards.holder, shards.holder.finish
        live: dict[str, dict[int, int]] = {}

        def count() -> list[Tensor]:
            """Called by take and, last, by combine: both gradients are there, and the optimizer's state of before."""
            parameters = list(engine.module.parameters())
            own = [getattr(parameter, key, None) for parameter in parameters for key in ("grad", "grad_accum")]
            before = storages(own)
            slices = finish()
            inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
            copies = [parameter for group in inner.param_groups for parameter in group["params"]]
            copies += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
            moments = [value for state in inner.state.values() for value in state.values()]
            shares = [getattr(parameter, key, None) for parameter in parameters for key in SHARES]
            live["parameters"] = storages([*parameters, *shares])
            after = storages([*slices, *(copy.grad for copy in copies)])
            live["gradients"] = max(before, after, key=lambda at: sum(at.values()))
            live["stash"] = storages([shards.stash, shards.average])
            held = storages([*copies, *moments])
            live["optimizer"] = {at: size for at, size in held.items() if at not in live["parameters"]}
            return slices

        if number == 2:
            holder.finish, watching = count, True
            sent.clear()
        applied = step(engine, shards, tasks, number, monitor)
        if number == 2:
            holder.finish, watching = finish, False
            sizes = {kind: sum(at.values()) for kind, at in live.items()}
            found[run] = {"memory": sizes, "sent": dict(sent)}
        return applied

    program.train_step = watched_step
    for run in configurations:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        config = RunConfig.model_validate(configurations[run])
        program.run(config, deepspeed_config(config))
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(found))


REDUCTIONS = "all_reduce broadcast reduce all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor"
SHARES = ("ds_tensor", "ds_secondary_tensor")
SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"num_key_value_heads": 4},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "experts": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}
RUNS = {  # shape, DeepSpeed file, other keys
    "untied zero3": ("untied", "zero3", {}),
    "tied zero2 bf16": ("tied", "zero2", {"model": {"dtype": "bfloat16"}}),
    "experts zero3 bf16 gru": ("experts", "zero3", {"model": {"dtype": "bfloat16"}, "synthesis": {"rule": "gru"}}),
}
MORE_RUNS = {
    "untied zero3_hpz": ("untied", "zero3_hpz", {}),
    "untied zero1": ("untied", "zero1", {"synthesis": {"rule": "sum"}}),
    "untied zero2": ("untied", "zero2", {}),
    "tied zero1": ("tied", "zero1", {}),
    "tied zero1 bf16": ("tied", "zero1", {"model": {"dtype": "bfloat16"}}),
    "tied zero3_offload bf16": ("tied", "zero3_offload", {"model": {"dtype": "bfloat16"}}),
    "lora zero3": ("untied", "zero3", {"model": {"lora": {"r": 8}}}),
    "lora zero2": ("untied", "zero2", {"model": {"lora": {"r": 8}}}),
    "recomputed zero3": ("untied", "zero3", {"model": {"gradient_checkpointing": True}}),
}


def write_shape(world: World, folder: Path, shape: dict[str, Any]) -> Path:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(world.folder / "model")
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    kind = "Mixtral" if "num_local_experts" in shape else "Llama"
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), bos_token_id=0, **sizes, **shape)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_zero(file: Path, name: str) -> str:
    """A shipped file, with buckets and thresholds for a small model."""
    zero = json.loads(Path(f"ds_configs/{name}.json").read_text())
    keys = {"reduce_bucket_size": 1000}
    if zero["zero_optimization"]["stage"] == 3:
        keys |= {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 1000}
        keys |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    zero["zero_optimization"] |= keys
    file.write_text(json.dumps(zero))
    return str(file)


@pytest.fixture(scope="module", params=[RUNS, pytest.param(MORE_RUNS, marks=pytest.mark.slow)], ids=["few", "more"])
def measured(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """name -> what was counted on two ranks (`measure`), and the configuration."""
    folder = tmp_path_factory.mktemp("plan")
    shapes = {name: write_shape(world, folder / name, shape) for name, shape in SHAPES.items()}
    configurations = {}
    for name, (shape, file, keys) in request.param.items():
        model = {"path": str(shapes[shape]), "dtype": "float32", **keys.get("model", {})}
        zero = write_zero(folder / f"{file}.json", file)
        train = {"steps": 3, "deepspeed": zero}
        configurations[name] = world.configuration(folder / name, **{**keys, "model": model, "train": train})
    run_distributed(measure, 2, configurations, str(folder / "measured.json"), timeout=900)
    found = json.loads((folder / "measured.json").read_text())
    return {name: {**found[name], "configuration": configurations[name]} for name in configurations}


def planned(
    configuration: dict[str, Any], gpus: int = 2, nodes: int = 1
) -> tuple[budget_memory.Memory, list[traffic.CommVolume]]:
    config = RunConfig.model_validate(configuration)
    machines = budget_memory.Cluster(gpus, nodes, 80, 50, 400)
    model = rehearsal.model_without_weights(config)
    shape = rehearsal.shape_of(model)
    zero = budget_memory.Zero.of(deepspeed_config(config), shape)
    passes = {task: rehearsal.rehearse(model, config.data.max_length, None) for task in config.tasks}
    sent = traffic.traffic(shape, zero, config, machines, passes, config.train.micro_batch_size)
    return budget_memory.states(shape, zero, config, machines), sent


def test_memory_of_states(measured: dict[str, Any]) -> None:
    for name, run in measured.items():
        memory, _ = planned(run["configuration"])
        for kind, size in run["memory"].items():
            expected = memory.gpu.get(kind, 0) + memory.host.get(kind, 0)
            error = (expected - size) / size if size else expected
            print(f"{name}: {kind} measured {size}, planned {expected:.0f}, {error:+.1%}")
            # below ZeRO-3 a tensor that straddles two ranks may be whole
            assert expected == pytest.approx(size, rel=0.06), (name, kind)


def assert_sent(name: str, counted: dict[str, int], sent: list[traffic.CommVolume]) -> None:
    total: dict[str, float] = {}
    for one in sent:
        kind = one.collective + " within" * one.within_machine
        total[kind] = total.get(kind, 0) + one.bytes
    for kind in total.keys() | counted.keys():
        print(f"{name}: {kind} counted {counted.get(kind, 0)}, planned {total.get(kind, 0):.0f}")
        assert total.get(kind, 0) == pytest.approx(counted.get(kind, 0), rel=0.01), (name, kind)


def test_bytes_sent(measured: dict[str, Any]) -> None:
    for name, run in measured.items():
        if "hpz" not in name:  # two ranks are no two machines
            assert_sent(name, run["sent"], planned(run["configuration"])[1])


@pytest.mark.slow
def test_bytes_sent_within_and_between_machines(world: World, tmp_path: Path) -> None:
    """Two machines of two ranks: all but a step's first gathers stay within; the original's swaps start anew."""
    path = write_shape(world, tmp_path / "model", SHAPES["tied"])
    write_zero(file := tmp_path / "hpz.json", "zero3_hpz")
    file.write_text(file.read_text().replace('"zero_hpz_partition_size": 8', '"zero_hpz_partition_size": 2'))
    model, train = {"path": str(path), "dtype": "float32"}, {"steps": 3, "deepspeed": str(file), "micro_batch_size": 1}
    configurations = {
        retain: world.configuration(
            tmp_path / retain, model=model, train=train, objective={"forget": "ga", "retain": retain}
        )
        for retain in ("nll", "kl")
    }
    run_distributed(measure, 4, configurations, str(tmp_path / "measured.json"))
    found = json.loads((tmp_path / "measured.json").read_text())
    for retain, configuration in configurations.items():
        assert_sent(retain, found[retain]["sent"], planned(configuration, gpus=2, nodes=2)[1])


# -- activations -------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Bytes of real storages alive, and at most alive, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                at = storage.data_ptr()
                if at and at not in before and at not in self.sizes:
                    self.sizes[at] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, at)
                    self.peak = max(self.peak, sum(self.sizes.values()))
        return out


class Engine(torch.nn.Module):
    """A whole model behind the interface of an engine."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.device, self.optimizer = module, torch.device("cpu"), None

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


PASSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True},
    "adapters": {"lora": {"r": 4}},
    "last blocks": {"trainable": [r"layers\.[23]\."]},
    "eager": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("name", PASSES)
def test_activations_of_a_real_pass(name: str, tmp_path: Path, world: World) -> None:
    """Peak of forward and backward of 4 sequences on a CPU, beside weights, whole gradients taken away as ZeRO does."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pipeline.modeling.load import set_trainable_parameters
    from pipeline.modeling.outputs import install_outputs

    shape = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    shape.save_pretrained(tmp_path)
    data = {**world.configuration("")["data"], "max_length": 192}
    model = {"path": str(tmp_path), "dtype": "float32", **PASSES[name]}
    config = RunConfig.model_validate(world.configuration(tmp_path / "run", model=model, data=data))

    options = {"attn_implementation": config.model.attn_implementation} if name == "eager" else {}
    real = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, **options)
    set_trainable_parameters(real, config.model, 0)
    engine = Engine(real.train())
    install_outputs(engine)
    for parameter in real.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.randint(4096, (4, 192))
    mask = torch.ones_like(ids)
    mask[0, 100:] = 0  # as documents are padded
    watch = Watch()
    with watch:
        engine(input_ids=ids, attention_mask=mask, labels=ids).sum().backward()

    without = rehearsal.model_without_weights(config)
    sizes = rehearsal.shape_of(without)
    passes = {"retain": rehearsal.rehearse(without, 192, None)}
    activations, logits = budget_memory.working(config, sizes, passes, 4)
    print(
        f"{name}: peak measured {watch.peak / 2**20:.1f} MiB, planned {(activations + logits) / 2**20:.1f}: "
        f"{(activations + logits) / watch.peak - 1:+.1%}"
    )
    assert 0.9 < (activations + logits) / watch.peak < 1.25


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "times"), [({}, 6), ({"gradient_checkpointing": True}, 8), ({"lora": {"r": 1}}, 4)], ids=str
)
def test_operations_are_six_a_parameter_and_token(keys: dict[str, Any], times: int, tmp_path: Path) -> None:
    """8 with recomputation, 4 where weights are frozen; and attention's two products forward, five backward."""
    from transformers import MistralConfig

    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 700,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    MistralConfig(vocab_size=4096, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)
    config = configuration_of(tmp_path, model={"dtype": "bfloat16", **keys})
    tokens = 64
    one = rehearsal.rehearse(rehearsal.model_without_weights(config), tokens, None)
    linear = 3 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 700)
    attention = (2 + (2 if times == 8 else 0) + 5) * 2 * tokens * tokens * 256 * 3
    spared = 2 * 3 * 256 * 700 * tokens if times == 8 else 0  # a block's last product: nothing needs it again
    assert one.flops(3) == pytest.approx(3 * (times * linear * tokens + attention - spared), rel=0.04)


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


# -- the command -------------------------------------------------------------------------------------------------------


def configuration_of(path: Path, **sections: Any) -> RunConfig:
    corpus = {"path": "some/corpus"}
    base: dict[str, Any] = {"output": "unused", "data": {"forget": corpus, "retain": corpus}, **sections}
    base["model"] = {"path": str(path), **base.get("model", {})}
    return RunConfig.model_validate(base)


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


def test_the_launch_line_is_a_run(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints resolves to the planned configuration, and the micro-batch divides the batch."""
    from pipeline.config.deepspeed import accumulation
    from pipeline.config.load import parse_command_line

    file = world.write(tmp_path / "run.yaml", tmp_path / "run", train={"batch_size": 32})
    where = ["--gpus", "2", "--nodes", "4", "--bandwidth", "25", "--gpu-memory", "80"]
    assert plan.main(["--config", str(file), *where, "--optimizer.lr", "1e-4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    launcher, _, arguments = answer["launch"].partition(" --module pipeline.train ")
    assert launcher == "deepspeed --hostfile hosts"
    config, *_ = parse_command_line(shlex.split(arguments))
    best = next(row for row in answer["configurations"] if row["deepspeed"] == answer["cheapest"])
    assert config.train.deepspeed == answer["cheapest"] and config.optimizer.lr == 1e-4
    assert best["fits"] and accumulation(config, 8) * best["micro_batch_size"] * 8 == 32
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
    (["--model.path", "/nowhere/model"], "there is no folder /nowhere/model"),
    (["--model.trainable", "[nothing]"], "'nothing' is found in no tensor name"),
    (["--train.deepspeed", "missing.json"], "cannot read missing.json"),
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


# -- the documentation -------------------------------------------------------------------------------------------------

DENSE: dict[str, dict[str, Any]] = {  # config.json of the models that docs/plan.md and README.md name
    "HuggingFaceH4/zephyr-7b-beta": {},
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
    cells = [kind, f"{machines.nodes} × {machines.gpus}", f"`{Path(best.deepspeed).stem}`", str(best.micro_batch_size)]
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
