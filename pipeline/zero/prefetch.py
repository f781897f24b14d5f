"""One recorded order of modules for each kind of forward pass under ZeRO-3."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn


def separate_prefetch_traces(engine: Any) -> None:
    """One recorded order of modules for each kind of pass, where DeepSpeed (ZeRO-3) has one for all.

    It fetches weights ahead and keeps those soon used again by the order that it saw; a forward without a backward, or
    one that ends early, discards that order, and what was concluded from it about releasing weights stays cached.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    blank, coordinators = offload.param_coordinator, {}

    def select_coordinator(module: nn.Module, arguments: Any, asked: dict[str, Any]) -> None:
        kind = (torch.is_grad_enabled(), asked.get("layer"), "labels" in asked)
        if kind not in coordinators:
            coordinators[kind] = copy(blank)
            if not blank.is_invalid_trace():
                coordinators[kind]._invalidate_trace()
            coordinators[kind]._clear_trace_structures()
        offload.param_coordinator = coordinators[kind]

    engine.module.register_forward_pre_hook(
        select_coordinator, prepend=True, with_kwargs=True
    )  # before DeepSpeed's own
