"""Whole gradients of one rank, and their mean over ranks: for what is not reduced in DeepSpeed's own backward pass.

ZeRO-2 and 3 reduce the gradient of every micro-batch, so that no rank ever has a whole one. Where few elements train
(adapters, some tensors of a large model) a whole gradient is small: then each rank adds up its micro-batches in a
`LocalSum`, and there is one reduction a task. `sizes.sums_locally` decides where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
from torch import Tensor, nn

from pipeline.zero.engine import Engine, PartitionedParameter

if TYPE_CHECKING:
    from pipeline.zero.store import GradientStore

Places = Mapping[nn.Parameter, tuple[int, Tensor]]  # the first element of this rank's share, and the share


def places_of(store: GradientStore, slices: Sequence[Tensor]) -> Places:
    """Where this rank's share of each parameter lies in `slices`, which are laid out as those of `store`."""
    rows = zip(store.layout, store.starts, slices, strict=True)
    return {store.parameters[row]: (start, share) for (row, _), start, share in rows}


@torch.no_grad()
def add_mean_over_ranks(
    engine: Engine, parameters: Sequence[nn.Parameter], gradients: list[Tensor], places: Places
) -> None:
    """Add the mean over ranks of whole gradients to this rank's shares of them.

    Every rank must call, with the same parameters in the same order.

    Args:
        gradients: of `parameters`, in the dtype in which they cross the network; overwritten.
        places: where the shares lie. A parameter that is not in it has none on this rank.
    """
    partitioned = engine.zero_optimization_stage() == 3
    if partitioned:
        shared: Sequence[PartitionedParameter] = parameters  # pyright: ignore[reportAssignmentType]
        # DeepSpeed types the group by a class of its own.
        means = reduce_scatter_coalesced(gradients, shared[0].ds_process_group)  # pyright: ignore[reportArgumentType]
    else:
        flat = torch.cat([gradient.view(-1) for gradient in gradients]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        means = flat.split([gradient.numel() for gradient in gradients])
    for parameter, mean in zip(parameters, means, strict=True):
        if parameter in places:
            start, share = places[parameter]
            part = mean if partitioned else mean[start : start + share.numel()]
            share[: part.numel()].add_(part.to(share.device))


class LocalSum:
    """The gradient of one task on this rank, whole, until its mean over ranks is taken.

    In float32, and so it crosses the network: a sum of micro-batches that is rounded to bf16 there would lose more than
    each of them does.
    """

    def __init__(self, engine: Engine, parameters: Sequence[nn.Parameter]) -> None:
        self.engine = engine
        sizes = [int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=engine.device)
        self.parts = dict(zip(parameters, self.flat.split(sizes), strict=True))

    def clear(self) -> None:
        self.flat.zero_()

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """gradient: of one micro-batch on this rank, of any float dtype, in the parameter's shape."""
        self.parts[parameter].view(gradient.shape).add_(gradient)

    def move_to(self, places: Places) -> None:
        """Add the mean over ranks to this rank's shares, and clear. Every rank must call."""
        add_mean_over_ranks(self.engine, list(self.parts), list(self.parts.values()), places)
        self.clear()
