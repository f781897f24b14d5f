"""Weights rounded to few bits, as where a model is quantised for use: what was suppressed may come back.

Zhang et al. 2024, "Catastrophic Failure of LLM Unlearning via Quantization": a small change of the weights, which is
what unlearning with a small learning rate makes, vanishes in the rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


COLUMNS = {8: None, 4: 128}  # bits -> inputs that share a scale; None: all inputs of an output


def rounded(weight: Tensor, bits: int, columns: int | None) -> Tensor:
    """`weight` [out, in] rounded to the nearest of 2**bits - 1 values, symmetric about 0; same shape and dtype.

    Each row has a scale for every `columns` inputs (the last group may be smaller): its largest absolute value is kept.
    """
    import torch

    largest = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(columns or weight.shape[1], dim=1):
        scale = part.abs().amax(dim=1) / largest
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros stays what it is
        zero = torch.zeros_like(scale, dtype=torch.int32)
        parts.append(torch.fake_quantize_per_channel_affine(part, scale, zero, 0, -largest, largest))
    return torch.cat(parts, dim=1).to(weight.dtype)


def round_linear_layers(model: PreTrainedModel, bits: int) -> float:
    """Round the weight of every linear layer in place; returns the share of the model's parameters that this is.

    Embeddings and the output layer stay as they are, as in GPTQ, AWQ and bitsandbytes; so do biases, norms, and experts
    that a model keeps in one tensor, which is why the share is told.
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
