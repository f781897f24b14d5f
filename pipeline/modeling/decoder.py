"""The text decoder of a model: its blocks and its parameters, also where there are other towers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import InputError


def base_of(model: Any) -> Any:
    """The model without its output layer: the part that has the input embedding (and towers for images, if any)."""
    embedding = model.get_input_embeddings()
    return next(part for part in model.children() if any(module is embedding for module in part.modules()))


def blocks_of(model: Any) -> nn.ModuleList:
    """The blocks of the text decoder, in order, of a model or of its base.

    Raises:
        InputError: it has no list of as many modules as `config.json` says that there are blocks.
    """
    depth, decoder = model.config.get_text_config().num_hidden_layers, model.get_decoder()
    foreign = {module for tower in _towers(decoder) for module in tower.modules()}
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and module not in foreign]
    blocks = next((found for found in lists if len(found) == depth), None)
    if blocks is None:
        raise InputError(f"model.path: {type(model).__name__} has no list of its {depth} decoder blocks")
    return blocks


def _towers(decoder: Any) -> list[Any]:
    """Models within the text decoder that read something else, as images (GIT, Phi-4)."""
    parts = [module for module in decoder.modules() if isinstance(module, PreTrainedModel) and module is not decoder]
    return [part for part in parts if "text" not in part.input_modalities]


def text_parameters(model: Any) -> set[str]:
    """Names of the parameters of the text decoder, of embedding and output layer: all, where there are no other towers.

    Not of it is what lies beside the decoder in the base model, as a tower for images and its projector, and a tower
    within the decoder, with as much around it as has no part in text.
    """
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    foreign = set(base_of(model).parameters()) - set(decoder.parameters()) - set(embedding.parameters())
    for tower in _towers(decoder):
        text = {*blocks_of(model).parameters(), *embedding.parameters()}
        around = [module for module in decoder.modules() if tower in module.modules()]  # from outside to inside
        foreign |= set(next(module for module in around if not text & set(module.parameters())).parameters())
    return {name for name, parameter in model.named_parameters() if parameter not in foreign}


def has_trainable_params_up_to(model: Any, layer: int) -> bool:
    """Whether a tensor trains that the hidden states after block `layer` depend on."""
    modules = [model.get_input_embeddings(), *blocks_of(model)[: layer + 1]]
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
