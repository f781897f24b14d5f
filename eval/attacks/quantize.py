"""Round weights to few bits, as quantisation for deployment does: suppressed knowledge may return.

Zhang et al. 2024, "Catastrophic Failure of LLM Unlearning via Quantization": unlearning with a small learning rate
changes the weights little, and the change vanishes in the rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


COLUMNS = {8: None, 4: 128}  # bits -> inputs that share a scale; None: all inputs of an output


def rounded(weight: Tensor, bits: int, columns: int | None) -> Tensor:
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


def round_linear_layers(model: PreTrainedModel, bits: int) -> float:
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
            new = rounded(weight.T if across else weight, bits, COLUMNS[bits])
            weight.copy_(new.T if across else new)
            count += weight.numel()
    return count / sum(parameter.numel() for parameter in model.parameters())
