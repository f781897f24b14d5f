"""What a forward pass answers: token losses without logits, hidden states without the layers above them, or logits.

`answer_for_objectives(engine)` is called once; from then on `engine(input_ids=…, attention_mask=…, …)` takes

- `labels=` [B, T] (and `soft=` [B, T, V], `lower=`): returns token losses [B, T], see `objectives.token_losses`;
- `layer=`: returns the hidden states [B, T, H] after that decoder block, and runs no block beyond it;
- neither: returns the logits [B, T, V].

All of it happens inside the modules' own calls, so that ZeRO-3 gathers each weight when, and only when, it is used.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config import InputError
from pipeline.objectives import token_losses


def answer_for_objectives(engine: Any) -> None:
    """Teach the engine's model the calls above. Every rank must call, before training."""
    model = engine.module
    base, head = base_of(model), model.get_output_embeddings()
    fused = has_plain_head(engine, base, head)
    causal_forward, head_forward = model.forward, head.forward

    def answer_head(hidden: Tensor, labels: Tensor | None = None, **target: Any) -> Tensor:
        if labels is None:
            return head_forward(hidden)
        return token_losses(hidden, labels, weight=head.weight, bias=head.bias, **target)

    def answer(
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        layer: int | None = None,
        **target: Any,  # soft, lower
    ) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if layer is not None:
            return hidden_after(base, layer, inputs)
        if labels is not None and fused:
            return head(base(**inputs).last_hidden_state, labels, **target)
        logits = causal_forward(**inputs).logits
        return logits if labels is None else token_losses(logits, labels, **target)

    head.forward, model.forward = answer_head, answer
    keep_orders_apart(engine)


def keep_orders_apart(engine: Any) -> None:
    """One recorded order of modules for each kind of pass, where DeepSpeed (ZeRO-3) has one for all.

    It fetches weights ahead and keeps those soon used again by the order that it saw; a forward without a backward, or
    one that ends early, discards that order, and what was concluded from it about releasing weights stays cached.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    blank, coordinators = offload.param_coordinator, {}

    def choose(module: nn.Module, arguments: Any, asked: dict[str, Any]) -> None:
        kind = (torch.is_grad_enabled(), asked.get("layer"), "labels" in asked)
        if kind not in coordinators:
            coordinators[kind] = copy(blank)
            if not blank.is_invalid_trace():
                coordinators[kind]._invalidate_trace()
            coordinators[kind]._clear_trace_structures()
        offload.param_coordinator = coordinators[kind]

    engine.module.register_forward_pre_hook(choose, prepend=True, with_kwargs=True)  # before DeepSpeed's own


def has_plain_head(engine: Any, base: nn.Module, head: nn.Module) -> bool:
    """Whether the model's logits are its output layer's product with the last hidden state, and nothing else.

    Some models cap or scale (Gemma 2, Granite, Cohere): theirs are computed by their own code. Two small forwards.
    """
    if type(head) is not nn.Linear:  # adapters on the output layer, for one
        return False
    model, tokens = engine.module, torch.arange(8, device=engine.device).unsqueeze(0)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    causal_forward = model.forward
    engine.eval()
    with torch.no_grad():
        logits = engine(**inputs).logits
        model.forward = lambda **inputs: head(base(**inputs).last_hidden_state)
        product = engine(**inputs)
    model.forward = causal_forward
    engine.train()
    return torch.equal(product.to(logits.dtype), logits)


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


def reaches(model: Any, layer: int) -> bool:
    """Whether a tensor trains that the hidden states after block `layer` depend on."""
    modules = [model.get_input_embeddings(), *blocks_of(model)[: layer + 1]]
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def hidden_after(base: nn.Module, layer: int, inputs: dict[str, Any]) -> Tensor:
    """[B, T, H] after block `layer` (0-based). The blocks above it are out of the model while it runs."""
    blocks = blocks_of(base)
    owner, name = next(
        (module, name) for module in base.modules() for name, child in module.named_children() if child is blocks
    )
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    hook = blocks[layer].register_forward_hook(keep)
    setattr(owner, name, blocks[: layer + 1])
    try:
        base(**inputs)
    finally:
        setattr(owner, name, blocks)
        hook.remove()
    return seen[0]
