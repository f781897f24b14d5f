"""One recorded order of modules for each kind of forward pass under ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy
from typing import Any

import torch
from torch import nn


def separate_prefetch_traces(engine: Any, kind_of_pass: Callable[[dict[str, Any]], Hashable]) -> None:
    """One recorded order of modules for each kind of pass, where DeepSpeed (ZeRO-3) has one for all.

    It fetches weights ahead and keeps those soon used again by the order that it saw; a forward without a backward, or
    one that ends early, discards that order, and what was concluded from it about releasing weights stays cached.

    Args:
        kind_of_pass: equal for the keyword arguments of two forward passes that call the same modules.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    blank, coordinators = offload.param_coordinator, {}

    def select_coordinator(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        kind = (torch.is_grad_enabled(), kind_of_pass(options))
        if kind not in coordinators:
            coordinators[kind] = copy(blank)
            if not blank.is_invalid_trace():
                coordinators[kind]._invalidate_trace()
            coordinators[kind]._clear_trace_structures()
        offload.param_coordinator = coordinators[kind]

    engine.module.register_forward_pre_hook(
        select_coordinator, prepend=True, with_kwargs=True
    )  # before DeepSpeed's own
