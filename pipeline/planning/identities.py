"""Steps of a small untrained Llama on random tokens, on every way in which DeepSpeed keeps a gradient.

What must be equal there is in `device_check.py`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from pipeline.config.schema import RunConfig
from pipeline.files import Json

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.losses.task import Task
    from pipeline.modeling.outputs import ModelEngine
    from pipeline.synthesis.combine import Synthesis
    from pipeline.zero.joint import TaskRows

SHAPE: Json = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
TOKENS, MICRO_BATCH, ACCUMULATION = 32, 2, 2
LR = 2.0**10  # a power of two, and so large that nothing of the gradient is lost when a weight is rounded


@dataclass(frozen=True)
class Way:
    """One way in which DeepSpeed keeps a gradient."""

    stage: int
    dtype: str = "float32"
    offload: bool = False

    @property
    def name(self) -> str:
        return f"ZeRO-{self.stage} {self.dtype}{', CPU offload' * self.offload}"

    def deepspeed(self) -> Json:
        """The dictionary of a DeepSpeed file."""
        zero: Json = {"stage": self.stage}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        return {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


class Built(NamedTuple):
    engine: ModelEngine
    tasks: dict[str, Task]
    rows: TaskRows


def build(way: Way, optimizer: Json) -> Built:
    """An engine as the program makes it, with weights that are the same for every call, and `ga` and `nll`."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.modeling.outputs import install_outputs
    from pipeline.modeling.row_rules import install_rules
    from pipeline.optim import make_optimizer, make_schedule
    from pipeline.planning.random_tasks import random_tasks
    from pipeline.zero.joint import TaskRows

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deepspeed.json"
        file.write_text(json.dumps(way.deepspeed()))
        config = RunConfig.model_validate(
            {
                "output": "unused",
                "model": {"path": "unused", "dtype": way.dtype},
                "data": {"max_length": TOKENS},
                "optimizer": {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, **optimizer},
                "train": {
                    "batch_size": MICRO_BATCH * ACCUMULATION * dist.get_world_size(),
                    "micro_batch_size": MICRO_BATCH,
                    "deepspeed": str(file),
                },
            }
        )
        zero = deepspeed_config(config)
    keep = HfDeepSpeedConfig(zero)  # while it lives, models are built partitioned
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), dtype=getattr(torch, way.dtype))
    del keep
    model.train()
    rows = TaskRows()
    install_rules(model, rows)  # outside a joint pass they change nothing
    made = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(config, model, zero),  # pyright: ignore[reportArgumentType]
        lr_scheduler=lambda one: make_schedule(config, one, 100),  # pyright: ignore[reportArgumentType]
        config=zero,
    )
    engine = cast("ModelEngine", made[0])
    install_outputs(engine)
    return Built(engine, {task.name: task for task in random_tasks(config, SHAPE["vocab_size"])}, rows)


def weights(engine: ModelEngine) -> list[Tensor]:
    """Every whole parameter as the optimizer has it, in float32 on the CPU. Every rank must call."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = []
    for parameter in engine.module.parameters():
        whole = safe_get_full_fp32_param(parameter)
        found.append((parameter if whole is None else whole).detach().float().cpu().clone())
    return found


def step(
    way: Way, synthesis: Synthesis | None, tasks: tuple[str, ...] = ("forget", "retain"), joint: bool = False
) -> list[Tensor]:
    """The gradient by which one step changes the weights, of a rule or of one task, on a new engine."""
    from pipeline.synthesis.combine import Synthesis
    from pipeline.trainer import TrainStep
    from pipeline.zero.combiner import GradientCombiner
    from pipeline.zero.joint import JointPass

    built = build(way, {"name": "sgd", "lr": LR})
    combiner = GradientCombiner(built.engine, synthesis or Synthesis("sum"), combine_tasks=synthesis is not None)
    before = weights(built.engine)
    pair = (built.tasks[name] if name in tasks else None for name in ("forget", "retain"))
    both = JointPass(combiner, built.rows) if joint else None
    TrainStep(built.engine, combiner, *pair, joint=both).train_step(0)
    after = weights(built.engine)
    built.engine.destroy()
    return [(old - new) / LR for old, new in zip(before, after, strict=True)]


def dense_gradients(way: Way) -> dict[str, list[Tensor]]:
    """The gradients of both tasks by torch alone, of a whole copy, over the batches of all ranks."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    built = build(way, {"name": "sgd", "lr": LR})
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(built.engine.device)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), built.engine.module.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([theirs]):
                mine.copy_(theirs)
    parameters, found = list(model.parameters()), {}
    for name, task in built.tasks.items():
        loss = torch.zeros((), device=built.engine.device)
        for batch in task.sampler.batches(0):
            labels = batch.labels.to(loss.device)
            logits = model(input_ids=batch.input_ids.to(loss.device)).logits[:, :-1]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        sign = -1 if name == "forget" else 1  # ga and nll
        gradients = torch.autograd.grad(sign * loss / task.loss_denominator(0), parameters)
        for gradient in gradients:
            dist.all_reduce(gradient)
        found[name] = [gradient.cpu() for gradient in gradients]
    built.engine.destroy()
    return found


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.double().square().sum()) for b in expected)
    return (difference / size) ** 0.5


def resumes(way: Way, folder: Path) -> bool:
    """Whether two steps of SAGO under AdamW, the second in an engine that resumed the first, make the same bits.

    Args:
        folder: an empty one, which all ranks see.
    """
    import torch

    from pipeline.synthesis.combine import Synthesis
    from pipeline.trainer import TrainStep
    from pipeline.zero import checkpoint
    from pipeline.zero.combiner import GradientCombiner

    made = []
    for resumed in (False, True):
        built = build(way, {"lr": 1e-3})
        combiner = GradientCombiner(built.engine, Synthesis("sago"), combine_tasks=True)
        one = TrainStep(built.engine, combiner, built.tasks["forget"], built.tasks["retain"])
        if resumed:
            newest = checkpoint.newest(folder)
            assert newest is not None, "save has just written it"
            checkpoint.load(built.engine, combiner, newest, {})
        else:
            one.train_step(0)
            checkpoint.save(built.engine, combiner, folder, 1, keep=1, identity={})
        one.train_step(1)
        made.append(weights(built.engine))
        built.engine.destroy()
    return all(torch.equal(*pair) for pair in zip(*made, strict=True))


def layers(way: Way) -> list[str]:
    """The layer of each parameter."""
    from pipeline.zero.combiner import layer_of

    built = build(way, {"name": "sgd", "lr": LR})
    found = [layer_of(name) for name, _ in built.engine.module.named_parameters()]
    built.engine.destroy()
    return found
