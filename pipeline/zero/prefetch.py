"""One recorded order of modules for each kind of forward pass under ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy

import torch
from torch import nn

from pipeline.zero.compat import require
from pipeline.zero.engine import Forward


def separate_prefetch_traces(engine: Forward, kind_of_pass: Callable[[dict[str, object]], Hashable]) -> None:
    """Record one order of modules for each kind of forward pass, where DeepSpeed (ZeRO-3) records one for all.

    DeepSpeed fetches weights ahead, and does not release those that it uses again soon, by the order it recorded. A
    forward without a backward, or one that ends early, discards that order, and what DeepSpeed concluded from it about
    releasing weights stays cached.

    Args:
        kind_of_pass: equal for the keyword arguments of two forward passes that call the same modules.

    Raises:
        RuntimeError: DeepSpeed lacks an attribute of `compat.INTERNALS`.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    require(offload, "parameter_offload of ZeRO 3")
    blank, coordinators = offload.param_coordinator, {}
    require(blank, "coordinator of ZeRO 3")

    def select_coordinator(module: nn.Module, inputs: tuple[object, ...], options: dict[str, object]) -> None:
        kind = (torch.is_grad_enabled(), kind_of_pass(options))
        if kind not in coordinators:
            coordinators[kind] = copy(blank)
            if not blank.is_invalid_trace():
                coordinators[kind]._invalidate_trace()
            coordinators[kind]._clear_trace_structures()
        offload.param_coordinator = coordinators[kind]

    # Before DeepSpeed's own hook.
    engine.module.register_forward_pre_hook(select_coordinator, prepend=True, with_kwargs=True)
