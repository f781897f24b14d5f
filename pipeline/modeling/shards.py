"""The files of an export, planned from names and shapes; and the tensors of one of them, gathered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightTransform,
    apply_converters,
    dot_natural_key,
    revert_weight_conversion,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from pipeline.modeling.lora import merged_weight
from pipeline.zero.parameters import whole_shape
from pipeline.zero.sizes import EXPORT_FILE


@dataclass(frozen=True)
class Part:
    """Tensors of the model that become tensors of a file together: one, or those that a conversion takes at once.

    transformers keeps the experts of a block in one tensor, for example, and a file has a tensor for each of them.
    """

    sources: tuple[str, ...]  # as `exported_tensors` names them
    targets: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class File:
    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def exported_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of the model without adapters, sharded or not; a tied one has its first name."""
    saved = model.state_dict().keys()
    tensors: dict[str, Tensor] = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    tensors |= dict(model.named_parameters())
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    names = {name: name.replace(".base_layer.", ".") for name in tensors if ".lora_" not in name}
    return {plain: tensors[name] for name, plain in names.items() if plain not in ignored}


@dataclass(frozen=True)
class Shards:
    """A model as the files of an export."""

    model: PreTrainedModel
    tensors: dict[str, Tensor]  # see `exported_tensors`
    files: list[File]

    @staticmethod
    def of(model: PreTrainedModel, max_bytes: int = EXPORT_FILE) -> Shards:
        """The files as `save_pretrained` would name them and their tensors. No weight is read.

        Args:
            model: as `load_model` returns it, which records how its names and tensors differ from those of its files.
        """
        tensors, parts = exported_tensors(model), {}
        meta = {name: torch.empty(whole_shape(t), dtype=t.dtype, device="meta") for name, t in tensors.items()}
        for sources in _converted_together(model, list(meta)):
            targets = revert_weight_conversion(model, {name: meta[name] for name in sources})
            size = sum(tensor.numel() * tensor.element_size() for tensor in targets.values())
            parts[min(targets, key=dot_natural_key)] = Part(sources, tuple(targets), size)
        # The hub's rule for where a file ends, on parts in place of tensors, because a part is gathered once.
        stand_ins = {name: torch.empty(part.bytes, dtype=torch.uint8, device="meta") for name, part in parts.items()}
        split = split_torch_state_dict_into_shards(stand_ins, max_shard_size=max_bytes).filename_to_tensors
        return Shards(model, tensors, [File(name, tuple(parts[one] for one in names)) for name, names in split.items()])

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def gather(self, file: File, *, wanted: bool) -> dict[str, Tensor]:
        """The tensors of `file` on the CPU of the ranks that want them (elsewhere none). Every rank must call.

        The device has one tensor of the model at a time. An adapted weight is merged there, W + alpha/r B A in fp32.
        """
        adapted, made = _adapted(self.model), {}
        for part in file.parts:
            whole: dict[str, Tensor] = {}
            for name in part.sources:
                layer, tensor = adapted.get(name), self.tensors[name]
                adapter = [] if layer is None else [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
                with deepspeed.zero.GatheredParameters([tensor, *adapter]):
                    if wanted:
                        weight = tensor if layer is None else merged_weight(tensor, layer)
                        whole[name] = weight.detach().to("cpu", copy=True)
            if wanted:
                made |= revert_weight_conversion(self.model, whole)
        return {name: tensor.contiguous() for name, tensor in made.items()}

    def write_index(self, folder: Path) -> None:
        """`model.safetensors.index.json`, which maps each tensor to its file, if there is more than one file."""
        if len(self.files) < 2:
            return
        parameters = [tensor for tensor in self.tensors.values() if isinstance(tensor, torch.nn.Parameter)]
        total = {"total_parameters": sum(whole_shape(p).numel() for p in parameters), "total_size": self.bytes}
        places = {name: file.name for file in self.files for part in file.parts for name in part.targets}
        text = json.dumps({"metadata": total, "weight_map": places}, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _converted_together(model: PreTrainedModel, names: list[str]) -> list[tuple[str, ...]]:
    """The names in groups, each of which `revert_weight_conversion` converts without the others."""
    conversions: list[WeightTransform] = getattr(model, "_weight_conversions", None) or []
    reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = apply_converters(name, converters)
        groups.setdefault((renamed, pattern is not None), []).append(name)
    return [tuple(group) for group in groups.values()]


def _adapted(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers, by the name of their weight without adapters."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
