"""Steps of a small untrained Llama on random tokens, on every way in which DeepSpeed keeps a gradient.

What must be equal there is in `device_check.py`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import RunConfig
from pipeline.files import Json

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.modeling.outputs import ModelEngine
    from pipeline.planning.random_run import RandomRun
    from pipeline.synthesis.combine import Synthesis

SHAPE: Json = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
TOKENS, MICRO_BATCH, ACCUMULATION = 32, 2, 2
LR = 2.0**30  # a power of two, and so large that a weight vanishes beside its change, also where weights are bf16


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


def build(way: Way, optimizer: Json) -> RandomRun:
    """A run on a new engine."""
    import torch.distributed as dist

    from pipeline.planning.random_run import random_run

    world = dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deepspeed.json"
        file.write_text(json.dumps(way.deepspeed()))
        settings = {
            "output": "unused",
            "model": {"path": "unused", "dtype": way.dtype},
            "data": {"max_length": TOKENS},
            "optimizer": {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, **optimizer},
            "train": {
                "batch_size": MICRO_BATCH * ACCUMULATION * world,
                "micro_batch_size": MICRO_BATCH,
                "deepspeed": str(file),
            },
        }
        return random_run(RunConfig.model_validate(settings), SHAPE)


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
    pair = (task if task.name in tasks else None for task in (built.forget, built.retain))
    both = JointPass(combiner, built.rows, ACCUMULATION) if joint else None
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
    for task in (built.forget, built.retain):
        loss = torch.zeros((), device=built.engine.device)
        for batch in task.sampler.batches(0):
            labels = batch.labels.to(loss.device)
            logits = model(input_ids=batch.input_ids.to(loss.device)).logits[:, :-1]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        sign = -1 if task is built.forget else 1  # ga and nll
        gradients = torch.autograd.grad(sign * loss / task.loss_denominator(0), parameters)
        for gradient in gradients:
            dist.all_reduce(gradient)
        found[task.name] = [gradient.cpu() for gradient in gradients]
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
        one = TrainStep(built.engine, combiner, built.forget, built.retain)
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


def layers() -> list[str]:
    """The layer of each parameter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.zero.combiner import layer_of

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return [layer_of(name) for name, _ in model.named_parameters()]
