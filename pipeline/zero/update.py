"""The update that a step made, beside the retain gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.synthesis.combine import GG, GR
from pipeline.synthesis.metric import update_products
from pipeline.zero.combiner import GradientCombiner
from pipeline.zero.optimizers import is_plain_sgd


def update_sums(combiner: GradientCombiner) -> Tensor | None:
    """What the last `engine.step()`, which must have been applied, did along the retain gradient of the step.

    Nothing is copied before the step or gathered after it. Adam's update is computed from its state, weight decay
    with it; that of SGD without momentum and weight decay is the clipped combination.

    Returns:
        [parameters, 2] float64, to be summed over ranks: ⟨r, Δθ⟩ and ‖Δθ‖², with Δθ the new weights less the old.
        None without two gradients or `measure_update`, and where the update is not known so: other optimizers,
        offload to nvme, ZeRO-1 in bf16 with fp32 accumulation (the rank does not have all that belongs together).
    """
    if combiner.stash is None or combiner.table is None or not combiner.measures_update:
        return None
    if (states := combiner.store.adam(combiner.rates)) is not None:
        # Without padding: DeepSpeed does not initialise that of the weights.
        sizes = [fragment.numel for fragment in combiner.average_layout()]
        parts = zip(combiner.store.layout, combiner.stash_slices(), sizes, strict=True)
        own = [(row, r[:size]) for (row, _), r, size in parts]
        cut = [state.first_elements(size) for state, size in zip(states, sizes, strict=True)]
        sums = update_products(own, cut, len(combiner.sizes)).cpu()
        # How many ranks have the same element.
        ranks = dist.get_world_size() // combiner.group if combiner.store.replicated else 1
        times = ranks * torch.tensor(combiner.copies, dtype=torch.float64)
        return sums / torch.stack([combiner.scale * times, times], 1)
    norm, limit = combiner.engine.get_global_grad_norm(), combiner.engine.gradient_clipping()
    if norm is None or not is_plain_sgd(combiner.store.inner):
        return None
    step = combiner.rates[0] / (max(1.0, (float(norm) + 1e-6) / limit) if limit else 1.0)  # as DeepSpeed clips
    along, square = combiner.table[:, GR] / combiner.scale**2, combiner.table[:, GG] / combiner.scale**2
    return torch.stack([-step * along, step**2 * square], 1) / dist.get_world_size()
