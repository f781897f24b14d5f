"""The text decoder of a model: its blocks and its parameters, also in a model that reads images or sound too."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import InputError


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its output layer: the child that contains the input embedding (and other towers, if any)."""
    embedding = model.get_input_embeddings()
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return next(part for part in parts if any(module is embedding for module in part.modules()))


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the text decoder, in order, of a model or of its base.

    Raises:
        InputError: no list of modules is as long as the number of blocks in `config.json`.
    """
    depth, decoder = model.config.get_text_config().num_hidden_layers, model.get_decoder()
    foreign = {module for tower in _towers(decoder) for module in tower.modules()}
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and module not in foreign]
    blocks = next((found for found in lists if len(found) == depth), None)
    if blocks is None:
        raise InputError(
            f"model.path: {type(model).__name__} has no list of its {depth} decoder blocks, so that "
            "this program cannot find them; use a model of another architecture"
        )
    return blocks


def _towers(decoder: nn.Module) -> list[PreTrainedModel]:
    """Models inside the text decoder that read something else, such as images (GIT, Phi-4)."""
    parts = [module for module in decoder.modules() if isinstance(module, PreTrainedModel) and module is not decoder]
    return [part for part in parts if "text" not in part.input_modalities]


def text_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of the text decoder, of embedding and output layer: all, where there are no other towers.

    Excluded are the modules beside the decoder in the base model, such as a tower for images and its projector, and a
    tower inside the decoder, together with the modules around it that no text passes through.
    """
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    foreign = set(base_of(model).parameters()) - set(decoder.parameters()) - set(embedding.parameters())
    for tower in _towers(decoder):
        text = {*blocks_of(model).parameters(), *embedding.parameters()}
        around = [module for module in decoder.modules() if tower in module.modules()]  # from outside to inside
        foreign |= set(next(module for module in around if not text & set(module.parameters())).parameters())
    return {name for name, parameter in model.named_parameters() if parameter not in foreign}


def has_trainable_params_up_to(model: PreTrainedModel, layer: int) -> bool:
    """Whether the hidden states after block `layer` depend on a trained tensor."""
    modules = [model.get_input_embeddings(), *blocks_of(model)[: layer + 1]]
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
