"""Load a checkpoint of N ranks on M: the same numbers, sharded anew.

DeepSpeed's universal checkpoint is not used. In 0.19.8 it lets the sub-groups of ZeRO-3 share one counter of Adam's,
which then runs too fast; it cannot convert SGD; and it does not cover a rule's moving average (docs/log.md). Here each
new rank reads, from the memory-mapped files of the old ones, the fragments that are now its own, and gives DeepSpeed
the state that it would have saved itself on M ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.zero.engine import Engine
from pipeline.zero.optimizer_state import Fragment, optimizer_layout

SavedState = dict[str, Any]  # as torch.load reads what an optimizer saved: tensors, numbers, and more of these

Flat = tuple[list[Fragment], Tensor]  # a 1-D tensor, and the fragments in it


def copy_fragments(old: Iterable[Flat], new: Flat) -> None:
    """Fill `new` from `old`, the flat tensors of all old ranks. Padding is left as it is.

    Raises:
        ValueError: some elements of `new` are in none of `old`.
    """
    found: dict[str, list[tuple[Fragment, Tensor]]] = defaultdict(list)
    for fragments, tensor in old:
        for fragment in fragments:
            found[fragment.name].append((fragment, tensor))
    for into in new[0]:
        missing, end = into.numel, into.param_offset + into.numel
        for fragment, tensor in sorted(found[into.name], key=lambda one: one[0].param_offset):
            low = max(end - missing, fragment.param_offset)
            high = min(end, fragment.param_offset + fragment.numel)
            if low == end - missing and low < high:
                source = tensor[fragment.flat_offset + low - fragment.param_offset :][: high - low]
                new[1][into.flat_offset + low - into.param_offset :][: high - low].copy_(source)
                missing = end - high
        if missing:
            raise ValueError(f"{missing} of {into.numel} elements of {into.name} are in no file")


@torch.no_grad()
def load_optimizer(engine: Engine, checkpoint: Path, layouts: list[list[list[Fragment]]]) -> None:
    """Load the weights and the optimizer's state from the files of all old ranks. Every rank must call.

    Args:
        layouts: `optimizer_layout` of each old rank.

    Raises:
        ValueError: the files lack elements of a trainable parameter.
    """
    old = []
    for rank in range(len(layouts)):
        (file,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        old.append(torch.load(file, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"])
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()  # as engine.load_checkpoint does around its loading
    mine = engine.optimizer.state_dict()  # its tensors are the optimizer's own
    parts = [_parts(state) for state in old]

    def of_all_ranks(key: str | None) -> list[Flat]:
        """The master weights (None) or one state of the optimizer, of all old ranks and groups."""
        return [
            (fragments, weights[group] if key is None else states[group][key])
            for layout, (weights, states) in zip(layouts, parts, strict=True)
            for group, fragments in enumerate(layout)
            if fragments
        ]

    weights, states = _parts(mine)
    if engine.zero_optimization_stage() < 3:  # where it saves them without the padding at their end
        weights = [group["params"][0] for group in engine.optimizer.optimizer.param_groups]
    kinds = next(iter(parts[0].states.values()), {})  # of state; none for plain SGD
    for group, fragments in enumerate(optimizer_layout(engine)):
        copy_fragments(of_all_ranks(None), (fragments, weights[group]))
        if kinds:
            states[group] = {}
        for key, value in kinds.items():
            if torch.is_tensor(value) and value.dim():
                states[group][key] = torch.zeros_like(weights[group])
                copy_fragments(of_all_ranks(key), (fragments, states[group][key]))
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


def _base(state: SavedState) -> SavedState:
    """torch's part of DeepSpeed's optimizer state: under ZeRO-3 it has another name than below."""
    return state["optimizer_state_dict" if "fp32_flat_groups" in state else "base_optimizer_state"]


class Parts(NamedTuple):
    """Of one rank's saved optimizer, by group."""

    weights: list[Tensor]  # flat, fp32
    states: dict[int, SavedState]  # what torch's optimizer has about each of them


def _parts(state: SavedState) -> Parts:
    weights = state["fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"]
    return Parts(weights, _base(state)["state"])
