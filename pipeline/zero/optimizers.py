"""What an optimizer does beside following the gradient, as far as a confinement or a measured update depends on it."""

from __future__ import annotations

import torch

from pipeline.synthesis.combine import Synthesis


def check_confined(synthesis: Synthesis, optimizer: torch.optim.Optimizer, combine_tasks: bool) -> None:
    """
    Raises:
        ValueError: see `GradientCombiner`.
    """
    if not combine_tasks or synthesis.averages_retain:
        raise ValueError("a confinement needs both gradients, and a rule that does not average the retain gradient")
    if any(group.get("weight_decay") or group.get("momentum") for group in optimizer.param_groups):
        raise ValueError("weight decay and SGD's momentum move weights outside of a confinement: set both to 0")


def is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each step is -lr times the gradient, with one lr."""
    groups = optimizer.param_groups
    plain = all(not group.get("momentum") and not group["weight_decay"] for group in groups)
    return isinstance(optimizer, torch.optim.SGD) and plain and len({group["lr"] for group in groups}) == 1
