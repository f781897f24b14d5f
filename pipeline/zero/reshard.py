"""A checkpoint of N ranks for M: the same numbers, dealt out anew.

DeepSpeed's universal checkpoint is not used. In 0.19.8 it lets the sub-groups of ZeRO-3 share one counter of Adam's,
which then runs too fast; it cannot convert SGD; and of a rule's moving average it knows nothing (docs/log.md). Here
each new rank reads, from the memory-mapped files of the old ones, the stretches that are now its own, and gives
DeepSpeed the state that it would have saved itself on M ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.zero.optimizer_state import Fragment, optimizer_layout

Flat = tuple[list[Fragment], Tensor]  # a 1-D tensor, and what lies in it


def copy_fragments(old: Iterable[Flat], new: Flat) -> None:
    """Fill `new` with what `old`, all ranks' together, have of the same parameters. Padding is left as it is.

    Raises:
        ValueError: `old` lacks some of it.
    """
    found: dict[str, list[tuple[Fragment, Tensor]]] = defaultdict(list)
    for stretches, tensor in old:
        for stretch in stretches:
            found[stretch.name].append((stretch, tensor))
    for into in new[0]:
        missing, end = into.numel, into.start + into.numel
        for stretch, tensor in sorted(found[into.name], key=lambda one: one[0].start):
            low, high = max(end - missing, stretch.start), min(end, stretch.start + stretch.numel)
            if low == end - missing and low < high:
                source = tensor[stretch.at + low - stretch.start :][: high - low]
                new[1][into.at + low - into.start :][: high - low].copy_(source)
                missing = end - high
        if missing:
            raise ValueError(f"{missing} of {into.numel} elements of {into.name} are in no file")


@torch.no_grad()
def load_optimizer(engine: Any, checkpoint: Path, layouts: list[list[list[Fragment]]]) -> None:
    """Weights, and the optimizer's state, from the files of all old ranks. Every rank must call.

    Args:
        layouts: `optimizer_layout` of each old rank.

    Raises:
        ValueError: they lack a part of what trains.
    """
    old = []
    for rank in range(len(layouts)):
        (file,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        old.append(torch.load(file, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"])
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()  # as engine.load_checkpoint does around its loading
    mine = engine.optimizer.state_dict()  # its tensors are the optimizer's own
    held = [_parts(state) for state in old]

    def everywhere(key: str | None) -> list[Flat]:
        """The master weights (None) or a state of the optimizer, of all old ranks and groups."""
        return [
            (stretches, weights[group] if key is None else states[group][key])
            for layout, (weights, states) in zip(layouts, held, strict=True)
            for group, stretches in enumerate(layout)
            if stretches
        ]

    weights, states = _parts(mine)
    if engine.zero_optimization_stage() < 3:  # where it saves them without the padding at their end
        weights = [group["params"][0] for group in engine.optimizer.optimizer.param_groups]
    kinds = next(iter(held[0][1].values()), {})  # of state; none for plain SGD
    for group, stretches in enumerate(optimizer_layout(engine)):
        copy_fragments(everywhere(None), (stretches, weights[group]))
        if kinds:
            states[group] = {}
        for key, value in kinds.items():
            if torch.is_tensor(value) and value.dim():
                states[group][key] = torch.zeros_like(weights[group])
                copy_fragments(everywhere(key), (stretches, states[group][key]))
            else:  # Adam's counter of steps: each group counts by itself
                states[group][key] = value.clone() if torch.is_tensor(value) else value
    for now, then in zip(_base(mine)["param_groups"], _base(old[0])["param_groups"], strict=True):
        now.update({key: value for key, value in then.items() if key != "params"})  # the learning rate
    mine |= {key: old[0][key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in old[0]}
    engine.optimizer.load_state_dict(
        [mine] * dist.get_world_size(), load_optimizer_states=True, load_from_fp32_weights=True
    )
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_epilogue()
    else:
        engine.optimizer.update_lp_params()  # the weights that the model computes with


def _base(state: dict[str, Any]) -> dict[str, Any]:
    """torch's part of DeepSpeed's optimizer state: under ZeRO-3 it has another name than below."""
    return state["optimizer_state_dict" if "fp32_flat_groups" in state else "base_optimizer_state"]


def _parts(state: dict[str, Any]) -> tuple[list[Tensor], dict[int, dict[str, Any]]]:
    """(flat fp32 weights, what the optimizer keeps about each) by group."""
    weights = state["fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"]
    return weights, _base(state)["state"]
