"""Which elements of which parameter lie where in the optimizer's flat tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
    if (groups := getattr(optimizer, "bf16_groups", None)) is None:
        return [list(_in_partition(optimizer, group, names)) for group in range(len(optimizer.partition_size))]
    for group in groups:
        layout.append([])
        for parameter in group:
            if (found := parameter._hp_mapping) is not None:  # lp: the parameter; hp: the flat fp32 tensor
                low, high = found.lp_fragment_address, found.hp_fragment_address
                layout[-1].append(Fragment(names[id(parameter)], low.start, low.numel, high.start))
    return layout


def _in_partition(optimizer: Any, group: int, names: Mapping[int, str]) -> Iterator[Fragment]:
    """This rank's partition of a group under ZeRO-1 and 2.

    A parameter's `_hp_mapping` follows the order of the model, in which the partition is not under
    round_robin_gradients.
    """
    rank = dist.get_rank(group=optimizer.real_dp_process_group[group])
    starts, skips = optimizer.grad_partition_insertion_offset[group][rank], optimizer.grad_start_offset[group][rank]
    for parameter in optimizer.round_robin_bit16_groups[group]:
        if (key := optimizer.get_param_id(parameter)) in starts:
            start, skip = int(starts[key]), int(skips[key])
            numel = min(parameter.numel() - skip, optimizer.partition_size[group] - start)
            yield Fragment(names[id(parameter)], skip, numel, start)
