"""Low-rank adapters: attach, merge, write."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from pipeline.config.schema import Lora
from pipeline.errors import InputError
from pipeline.modeling.decoder import text_parameters


def attach_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Attach an adapter to each targeted linear layer of the text decoder and freeze all other parameters.

    The model's outputs do not change, because an adapter's effect starts at zero. Adapters have the dtype of their
    layer: DeepSpeed has the fp32 copies that the optimizer needs, and would cast fp32 adapters of a half-precision
    model anyway.

    Raises:
        InputError: a target that matches no linear layer, or an output layer that cannot be merged.
    """
    text = text_parameters(model)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    output = [name for name, module in modules if module is model.get_output_embeddings()]
    linear = [
        name for name, _ in modules if f"{name}.weight" in text or name in output
    ]  # a tied output layer has the embedding's name
    targets: list[str] = []
    for target in lora.targets or []:
        found = [name for name in linear if re.fullmatch(rf"(.*\.)?({target})", name)]
        if not found:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f"model.lora.targets: {target!r} matches no linear layer of the text decoder; "
                f"their names end in: {endings}"
            )
        targets += found
    if lora.targets is None:  # peft's own "all-linear" would also adapt tensors of experts
        targets = [name for name in linear if name not in output]
    if lora.merge and model.config.get_text_config().tie_word_embeddings and set(output) & set(targets):
        raise InputError(
            f"model.lora.merge: {output[0]!r} shares its weights with the input embedding, which has no adapter; "
            "remove it from model.lora.targets, or export the adapter"
        )
    base = str(model.name_or_path)
    adapters = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (a float is right too)
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
    )
    inject_adapter_in_model(adapters, model)
    others = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)} ^ set(targets)
    if others:
        raise InputError(
            f"model.lora.targets: peft matches one of them with {min(others)!r}, which is not a linear layer of that "
            "name; name layers of the attention"
        )


def merged_weight(weight: Tensor, layer: LoraLayer) -> Tensor:
    """`weight` of an adapted layer with alpha/r B A added in fp32, in its own dtype and on its device.

    Args:
        weight: [out, in], but a Conv1D's is [in, out]. The layer's A, [r, in], and B, [out, r], must be gathered.
    """
    a, b = (cast(Tensor, side["default"].weight).detach().float() for side in (layer.lora_A, layer.lora_B))
    change = layer.scaling["default"] * (b @ a)
    change = change.T if isinstance(layer.get_base_layer(), Conv1D) else change
    return (weight.detach().float() + change).to(weight.dtype)


def write_adapter(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """`weights` of the adapters of `model`, in the files that peft reads, in a folder that exists."""
    adapter = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in adapter.items()}  # as in peft's own wrapper
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
