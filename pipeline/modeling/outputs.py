"""What one forward pass returns: token losses without logits, hidden states without the blocks above them, or logits.

`install_outputs(engine)` prepares an engine once, before training. After that, `forward(engine, batch, output)` is the
one way to run its model, and the type of `output` states what it returns.

`install_outputs` replaces the `forward` of the model and of its output layer, because the work must happen inside the
modules' own calls: ZeRO-3 gathers the weights of a module in hooks around its call, and releases them afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.objectives import Term
from pipeline.data.batches import Batch, stack
from pipeline.modeling.decoder import base_of, blocks_of
from pipeline.modeling.token_losses import OutputLayer, token_losses, token_scores
from pipeline.zero.engine import Engine, Forward
from pipeline.zero.joint import Divert
from pipeline.zero.prefetch import separate_prefetch_traces

ModelForward = Forward[PreTrainedModel]
ModelEngine = Engine[PreTrainedModel]


@dataclass(frozen=True)
class TokenLosses:
    """[B, T] cross-entropy of each prediction in fp32, or its `term`; see `token_losses` for the fields."""

    teacher_logits: Tensor | None = None  # [B, T, V]
    logit_penalty: float = 0.0
    term: Term | None = None


@dataclass(frozen=True)
class HiddenStates:
    """[B, T, H] after decoder block `layer` (0-based), in the model's dtype; no block above it runs."""

    layer: int


@dataclass(frozen=True)
class TokenScores:
    """[3, B, T] in fp32, without gradient; of each prediction: its loss, whether it has the largest logit, what has."""


@dataclass(frozen=True)
class Logits:
    """[B, T, V] in the model's dtype."""


@dataclass(frozen=True)
class JointLosses:
    """Of two batches in one forward pass, what each field returns of its own batch."""

    forget: TokenLosses
    retain: TokenLosses
    divert: Divert | None  # gets the output layer's forget gradient; None: autograd adds it to the retain gradient


Labels = Tensor | tuple[Tensor, Tensor]  # of a batch, or of the two of a joint pass
PerToken = TokenLosses | TokenScores  # computed from the last hidden states without all logits at one time
Output = TokenLosses | TokenScores | HiddenStates | Logits


def forward(engine: ModelForward, batch: Batch, output: Output) -> Tensor:
    """One forward pass of `batch`; the shape and dtype of what it returns are those that the type of `output` states.

    Every rank must call, with the same type of `output`. Gradients flow if autograd is on.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return engine(**inputs, labels=batch.labels, output=output)


def forward_jointly(engine: ModelForward, forget: Batch, retain: Batch, output: JointLosses) -> tuple[Tensor, Tensor]:
    """One forward pass of both batches. Every rank must call.

    Returns:
        ([B, T], [B', T']) losses of the forget batch and of the retain batch, each padded as its own batch is.
    """
    input_ids, attention_mask = stack([forget, retain])
    labels = forget.labels, retain.labels
    return engine(input_ids=input_ids, attention_mask=attention_mask, labels=labels, output=output)


def install_outputs(engine: ModelForward) -> None:
    """Prepare the model of `engine` for `forward`. Every rank must call, once, before the first step."""
    model = engine.module
    base, head = base_of(model), model.get_output_embeddings()
    assert head is not None, "a causal language model has an output layer"
    fused = has_plain_head(engine, base, head)
    model_forward, head_forward = model.forward, head.forward

    def head_output(
        hidden: Tensor, labels: Labels | None = None, output: PerToken | JointLosses | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if labels is None or output is None:  # a call by the model's own code
            return head_forward(hidden)
        return per_token(hidden, labels, output, OutputLayer(head.weight, head.bias))

    def model_output(
        input_ids: Tensor, attention_mask: Tensor, labels: Labels, output: Output | JointLosses
    ) -> Tensor | tuple[Tensor, Tensor]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if isinstance(output, HiddenStates):
            return hidden_after(base, output.layer, inputs)
        if isinstance(output, PerToken | JointLosses) and fused:
            return head(base(**inputs).last_hidden_state, labels, output=output)
        logits = model_forward(**inputs).logits
        return per_token(logits, labels, output) if isinstance(output, PerToken | JointLosses) else logits

    head.forward, model.forward = head_output, model_output
    separate_prefetch_traces(engine, modules_called)


@contextmanager
def temporary_outputs(engine: ModelForward) -> Iterator[None]:
    """`install_outputs` for the time of a block: the model is then as it was, for callers that know nothing of it."""
    head = engine.module.get_output_embeddings()
    assert head is not None, "a causal model has an output layer"
    changed = (engine.module, head)
    before = [vars(module).get("forward") for module in changed]
    install_outputs(engine)
    try:
        yield
    finally:
        for module, forward_before in zip(changed, before, strict=True):
            del module.forward
            if forward_before is not None:  # it was replaced before, as DeepSpeed does
                module.forward = forward_before


def per_token(
    states: Tensor, labels: Labels, output: PerToken | JointLosses, layer: OutputLayer | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`output` from logits [B, T, V] or, with the output layer, from hidden states [B, T, H]."""
    if isinstance(output, JointLosses):
        assert isinstance(labels, tuple)
        layers = (layer if layer is None else replace(layer, divert=output.divert)), layer
        forget, retain = (
            token_losses(rows[:, : own.shape[1]], own, layer=its_layer, **vars(losses))  # no padding of the other batch
            for rows, own, its_layer, losses in zip(
                states.split([len(own) for own in labels]), labels, layers, (output.forget, output.retain), strict=True
            )
        )
        return forget, retain
    assert isinstance(labels, Tensor)
    if isinstance(output, TokenScores):
        return token_scores(states, labels, layer)
    return token_losses(states, labels, layer=layer, **vars(output))


def modules_called(options: dict[str, object]) -> Hashable:
    """Equal for the keyword arguments of two forward passes that call the same modules in the same order."""
    output = options["output"]
    return type(output), output.layer if isinstance(output, HiddenStates) else None


def has_plain_head(engine: ModelForward, base: PreTrainedModel, head: nn.Module) -> bool:
    """Whether the model's logits are the product of its output layer with the last hidden state, and nothing else.

    Some models cap or scale their logits (Gemma 2, Granite, Cohere): for them `forward` runs the model's own code. The
    check compares two small forward passes.
    """
    if type(head) is not nn.Linear:  # an adapter on the output layer, for example
        return False
    model, tokens = engine.module, torch.arange(8, device=engine.device).unsqueeze(0)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    model_forward = model.forward
    engine.eval()
    with torch.no_grad():
        logits = engine(**inputs).logits
        model.forward = lambda **inputs: head(base(**inputs).last_hidden_state)
        product = engine(**inputs)
    model.forward = model_forward
    engine.train()
    return torch.equal(product.to(logits.dtype), logits)


def hidden_after(base: PreTrainedModel, layer: int, inputs: Mapping[str, object]) -> Tensor:
    """[B, T, H] after block `layer` (0-based). The model is without the blocks above it while it runs."""
    blocks = blocks_of(base)
    owner, name = next(
        (module, name) for module in base.modules() for name, child in module.named_children() if child is blocks
    )
    found: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[object, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    hook = blocks[layer].register_forward_hook(record)
    setattr(owner, name, blocks[: layer + 1])
    try:
        base(**inputs)
    finally:
        setattr(owner, name, blocks)
        hook.remove()
    return found[0]
