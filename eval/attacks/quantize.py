"""Round weights to few bits, as quantisation for deployment does: suppressed knowledge may return.

Zhang et al. 2024, "Catastrophic Failure of LLM Unlearning via Quantization": unlearning with a small learning rate
changes the weights little, and the change vanishes in the rounding.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

from pipeline.files import Json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


COLUMNS = {"int8": None, "int4": 128}  # inputs that share a scale; None: all inputs of an output
BITS = {"int8": 8, "int4": 4}
NF4_BLOCK = 64  # values that share a scale, as in QLoRA
ROUNDINGS: dict[str, Json] = {
    **{name: {"bits": bits, "columns": COLUMNS[name]} for name, bits in BITS.items()},
    "nf4": {"block": NF4_BLOCK},
}


def rounded(weight: Tensor, rounding: str) -> Tensor:
    """`weight` [out, in] rounded as one of `ROUNDINGS` does; same shape and dtype."""
    if rounding == "nf4":
        return rounded_to_normal_floats(weight, NF4_BLOCK)
    return rounded_to_integers(weight, BITS[rounding], COLUMNS[rounding])


@cache
def normal_floats() -> list[float]:
    """The 16 values of NF4 (Dettmers et al. 2023, QLoRA, section 3), rising from -1 to 1 with an exact 0.

    They are quantiles of the normal distribution, divided by the largest: 8 above 0 and 7 below at equal steps of
    probability, from the mean of 1/32 and 1/30 away from the end.
    """
    normal, end = NormalDist(), 1 - (1 / 32 + 1 / 30) / 2
    above, below = ([normal.inv_cdf(end + (0.5 - end) * step / number) for step in range(number)] for number in (8, 7))
    return [-value / above[0] for value in below] + [0.0] + [value / above[0] for value in reversed(above)]


def rounded_to_normal_floats(weight: Tensor, block: int) -> Tensor:
    """Each `block` of consecutive values has its largest absolute value as scale; the last block may be smaller.

    The scales stay in float32: QLoRA's second rounding, of the scales, is left out.
    """
    import torch

    values = torch.tensor(normal_floats(), device=weight.device)
    middles = (values[1:] + values[:-1]) / 2
    flat = weight.float().reshape(-1)
    whole = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = whole.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    near = values[torch.bucketize(whole / scale, middles)] * scale
    return near.view(-1)[: len(flat)].view(weight.shape).to(weight.dtype)


def rounded_to_integers(weight: Tensor, bits: int, columns: int | None) -> Tensor:
    """`weight` [out, in] rounded to the nearest of 2**bits - 1 values, symmetric about 0; same shape and dtype.

    Each row has a scale for every `columns` inputs (the last group may be smaller), which preserves the largest
    absolute value.
    """
    import torch

    largest = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(columns or weight.shape[1], dim=1):
        scale = part.abs().amax(dim=1) / largest
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros stays zero
        zero = torch.zeros_like(scale, dtype=torch.int32)
        parts.append(torch.fake_quantize_per_channel_affine(part, scale, zero, 0, -largest, largest))
    return torch.cat(parts, dim=1).to(weight.dtype)


def round_linear_layers(model: PreTrainedModel, rounding: str) -> float:
    """Round the weight of every linear layer in place; returns their share of the model's parameters.

    Embeddings and the output layer stay unchanged, as in GPTQ, AWQ and bitsandbytes; so do biases, norms, and experts
    that a model stores in one tensor, which is why the share is reported.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    output, count = model.get_output_embeddings(), 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output:
            weight: Tensor = module.weight.data
            across = isinstance(module, Conv1D)  # [in, out]
            new = rounded(weight.T if across else weight, rounding)
            weight.copy_(new.T if across else new)
            count += weight.numel()
    return count / sum(parameter.numel() for parameter in model.parameters())
