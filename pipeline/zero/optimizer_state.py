"""Which elements of which parameter lie where in the optimizer's flat tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from pipeline.zero.engine import Engine


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter in a flat tensor."""

    name: str  # of the parameter
    param_offset: int  # index of the first of them in the parameter
    numel: int
    flat_offset: int  # index of the first of them in the flat tensor


def optimizer_layout(engine: Engine) -> list[list[Fragment]]:
    """The fragments in each flat fp32 tensor that this rank's optimizer updates; empty without ZeRO."""
    if not engine.zero_optimization_stage():
        return []
    optimizer, layout = engine.optimizer, []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        for group in optimizer.fp16_groups:
            layout.append([])
            flat_offset = 0
            for parameter in group:
                share = parameter.partition_numel()
                start = dist.get_rank(group=parameter.ds_process_group) * share
                numel = max(min(share, parameter.ds_numel - start), 0)  # what is beyond the end is padding
                layout[-1].append(Fragment(names[id(parameter)], start, numel, flat_offset))
                flat_offset += share
        return layout
    for group in getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups:
        layout.append([])
        for parameter in group:
            if (found := parameter._hp_mapping) is not None:  # lp: the parameter; hp: the flat fp32 tensor
                low, high = found.lp_fragment_address, found.hp_fragment_address
                layout[-1].append(Fragment(names[id(parameter)], low.start, low.numel, high.start))
    return layout
