"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from pipeline.config.deepspeed import DeepSpeedDict
from pipeline.config.schema import RunConfig

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import Trainer


def make_optimizer(config: RunConfig, model: torch.nn.Module, zero: DeepSpeedDict) -> torch.optim.Optimizer:
    """torch's own; DeepSpeed's vectorised Adam where a GPU machine keeps the optimizer in its main memory."""
    import torch

    wanted = config.optimizer
    assert wanted.lr is not None, "pipeline.startup.choose decides it"
    groups = parameter_groups(model, wanted.weight_decay)
    if wanted.name == "sgd":
        return torch.optim.SGD(groups, lr=wanted.lr)
    betas = (wanted.betas[0], wanted.betas[1])
    adam: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    offloaded = (zero["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"
    if offloaded and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        adam = DeepSpeedCPUAdam  # AdamW by default
    return adam(groups, lr=wanted.lr, betas=betas, eps=wanted.eps)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, for a torch optimizer: norms and biases do not decay, as in transformers' Trainer and by its rule.

    One group where nothing decays, or all that trains does (adapters); else two: what decays, then the rest.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decaying = set()
    if weight_decay:
        from transformers import Trainer

        decaying = set(Trainer.get_decay_parameter_names(cast("Trainer", None), model))  # it uses no trainer
    halves = [[p for name, p in named if (name in decaying) == decays] for decays in (True, False)]
    decays = (weight_decay, 0.0)
    return [{"params": half, "weight_decay": decay} for half, decay in zip(halves, decays, strict=True) if half]


def make_schedule(config: RunConfig, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The schedules as `transformers` defines them; with warm-up the first of several steps has learning rate 0."""
    from transformers import get_scheduler

    name = {"constant": "constant_with_warmup"}.get(config.optimizer.schedule, config.optimizer.schedule)
    warmup = min(math.ceil(config.optimizer.warmup_ratio * steps), steps - 1)  # a run of one step must train
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def fitting_lr(parameters: int, adapters: bool) -> float:
    """The learning rate of a run that names none, to one digit.

    Larger models need smaller steps. The power law goes through two values in use for full weights: 1e-5 at 7 to 8
    billion parameters (the paper's tables, in launch/recipes) and 5e-5 at 135 million. Low-rank adapters take ten times
    as much.
    """
    value = 1e-5 * (8e9 / parameters) ** 0.4 * (10 if adapters else 1)
    return float(f"{value:.0e}")
