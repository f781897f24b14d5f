"""What a forward pass answers: token losses without logits, hidden states without the layers above them, or logits.

`install_outputs(engine)` is called once; from then on `engine(input_ids=…, attention_mask=…, …)` takes

- `labels=` [B, T] (and `soft=` [B, T, V], `lower=`): returns token losses [B, T], see `objectives.token_losses`;
- `layer=`: returns the hidden states [B, T, H] after that decoder block, and runs no block beyond it;
- neither: returns the logits [B, T, V].

All of it happens inside the modules' own calls, so that ZeRO-3 gathers each weight when, and only when, it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.modeling.decoder import base_of, blocks_of
from pipeline.modeling.token_losses import token_losses
from pipeline.zero.prefetch import separate_prefetch_traces


def install_outputs(engine: Any) -> None:
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
    separate_prefetch_traces(engine)


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
