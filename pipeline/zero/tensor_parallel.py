"""Tensor parallelism by DeepSpeed (AutoTP): which tensors are cut over a group of ranks, and which each rank has whole.

A sum over all ranks counts a part of a cut tensor once, and a tensor that each rank of a group has whole as often as
the group has ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.zero.engine import Engine


def group_size(engine: Engine) -> int:
    """Ranks that share a tensor; 1 without tensor parallelism."""
    return max(engine.autotp_size(), 1)


def copies(engine: Engine, parameters: Sequence[nn.Parameter]) -> list[int]:
    """Of each parameter: how many ranks of a group have the same elements of it."""
    size = group_size(engine)
    return [1 if getattr(parameter, "tensor_model_parallel", False) else size for parameter in parameters]
