"""A trained model as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.config.schema import Lora
from pipeline.files import whole
from pipeline.modeling.lora import merge_adapters, write_adapter


def gather_weights(model: torch.nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """All tensors of a sharded model on the CPU of rank 0 (elsewhere empty), one tensor at a time on the device."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.named_buffers() if name in model.state_dict()}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights if dist.get_rank() == 0 else {}


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    lora: Lora | None = None,
    card: str | None = None,
) -> None:
    """Write `folder` for `AutoModelForCausalLM.from_pretrained`: safetensors, tokenizer, model card.

    The safetensors are a model's, or with `lora` and without `lora.merge` an adapter's as peft writes it.
    The folder is complete or absent (`files.whole`). Every rank must call.
    """
    adapter_alone = lora is not None and not lora.merge
    weights = gather_weights(model, trained_only=adapter_alone)
    if dist.get_rank() == 0:
        with whole(folder) as unfinished:
            if adapter_alone:
                write_adapter(model, weights, unfinished)
            else:
                whole_model = weights if lora is None else merge_adapters(model, weights)
                model.save_pretrained(unfinished, state_dict=whole_model)
            tokenizer.save_pretrained(unfinished)
            if card is not None:
                (unfinished / "README.md").write_text(card, encoding="utf-8")
            written = unfinished / ("adapter_config.json" if adapter_alone else "config.json")
            for file in unfinished.iterdir():  # safetensors writes files for this user alone, Python follows the umask
                shutil.copymode(written, file)
            shutil.rmtree(folder, ignore_errors=True)  # an export of the run before it was resumed
    dist.barrier()
