"""Which elements of which parameter lie where in the optimizer's flat tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Fragment:
    """Elements of a parameter in a flat tensor."""

    name: str
    start: int  # the first of them, in the parameter
    numel: int
    at: int  # where it lies in the flat tensor


def optimizer_layout(engine: Any) -> list[list[Fragment]]:
    """What lies in each flat fp32 tensor that this rank's optimizer updates. None without ZeRO: nothing is split."""
    if not engine.zero_optimization_stage():
        return []
    optimizer, layout = engine.optimizer, []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        for group in optimizer.fp16_groups:
            layout.append([])
            at = 0
            for parameter in group:
                share = parameter.partition_numel()
                start = dist.get_rank(group=parameter.ds_process_group) * share
                real = max(min(share, parameter.ds_numel - start), 0)  # what is beyond the end is padding
                layout[-1].append(Fragment(names[id(parameter)], start, real, at))
                at += share
        return layout
    for group in getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups:
        owned = [(parameter, parameter._hp_mapping) for parameter in group if parameter._hp_mapping is not None]
        layout.append(
            [
                Fragment(
                    names[id(p)],
                    found.lp_fragment_address.start,
                    found.lp_fragment_address.numel,
                    found.hp_fragment_address.start,
                )
                for p, found in owned
            ]
        )
    return layout
