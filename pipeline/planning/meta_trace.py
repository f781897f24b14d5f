"""Memory, operations and module calls of a forward and backward pass, traced without the model's weights.

The pass runs on the meta device, where tensors have shapes and no contents; a dispatch mode records every operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from pipeline.config.schema import RunConfig
from pipeline.errors import InputError
from pipeline.modeling.checks import check_router_loss, load_model_config
from pipeline.modeling.decoder import base_of
from pipeline.modeling.dropout import set_dropout
from pipeline.modeling.load import set_trainable_parameters
from pipeline.modeling.outputs import hidden_after


@dataclass(frozen=True)
class Linear:
    """a + b * (sequences of a micro-batch)"""

    a: float
    b: float

    def __call__(self, sequences: int) -> float:
        return self.a + self.b * sequences


@dataclass(frozen=True)
class Pass:
    """Forward and backward of one task's micro-batch on one GPU, up to the hidden states that the loss reads."""

    saved: Linear  # bytes alive between forward and backward
    peak: Linear  # most bytes alive at a time, with those of backward and one tensor's whole gradient
    flops: Linear  # of both
    forward_flops: Linear
    used: list[int]  # parameters (rows of `ModelShape.sizes`) of each module that forward calls, at each call
    backward_gathers: list[int]  # and of those that backward goes through or recomputes
    reached: list[int]  # parameters that get a gradient


@dataclass(frozen=True)
class ModelShape:
    sizes: list[int]  # elements of each parameter; tied ones count once
    trains: list[bool]
    itemsize: int  # bytes of an element
    head: tuple[int, int]  # vocabulary, width
    head_trains: bool
    plain_head: bool  # logits are the product with its weight, and are never stored whole
    packed: tuple[int, ...] = ()  # elements of each weight that is in 4 bits

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def trained(self) -> int:
        return sum(size for size, trains in zip(self.sizes, self.trains, strict=True) if trains)


def model_without_weights(config: RunConfig) -> PreTrainedModel:
    """The model on the meta device, in `model.dtype`, with the trainable parameters of a run.

    Raises:
        InputError: the model cannot be built without weights; see also `modeling.load_model_config`,
            `check_router_loss` and `set_trainable_parameters`.
    """
    logging.set_verbosity_error()
    wanted = config.model.attn_implementation
    padded = config.data.packing != "blocks" and wanted in (None, "sdpa")
    AttentionInterface.register("rehearsed", partial(_attention, padded=padded))
    shape = load_model_config(config.model)
    if "retain" in config.tasks:
        check_router_loss(config.model)
    if config.model.dropout is not None:  # backward needs the mask of each dropout
        shape = set_dropout(shape, config.model.dropout)
    options = {"attn_implementation": "eager" if wanted == "eager" else "rehearsed"}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.model.dtype), **options)
            set_trainable_parameters(model, config.model, config.seed)
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model.path: {config.model.path!r} cannot be built without weights: {reason}") from None
    return model.train()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    *,
    padded: bool,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention with the memory of a GPU's fused kernel: inputs, output and one float per row; with padding also a mask
    and repeated keys.

    query: [B, heads, T, D]; key, value: [B, kv heads, T, D]. Returns ([B, T, heads, D], None).
    """
    aten = torch.ops.aten
    if not padded and query.dtype != torch.float32:
        found = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)
    else:
        size, length = query.shape[0], query.shape[2]
        bias = query.new_empty(size, 1, length, length).expand(-1, query.shape[1], -1, -1) if padded else None
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        kernel = aten._scaled_dot_product_efficient_attention
        found = kernel(query, key, value, bias, True, 0.0, not padded, scale=scaling)
    return found[0].transpose(1, 2).contiguous(), None


def shape_of(model: PreTrainedModel, four_bits: bool = False) -> ModelShape:
    """The model's shape; with `four_bits` its linear layers but adapters and output layer are packed (QLoRA)."""
    head = model.get_output_embeddings()
    assert head is not None  # every causal language model has one
    parameters = list(model.parameters())
    text = model.config.get_text_config()
    capped = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # Gemma 2, Granite, Cohere
    weight = next(iter(head.parameters()))
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return ModelShape(
        packed=tuple(one.numel() for one in linear if not one.requires_grad) if four_bits else (),
        sizes=[parameter.numel() for parameter in parameters],
        trains=[parameter.requires_grad for parameter in parameters],
        itemsize=parameters[0].element_size(),
        head=(text.vocab_size, text.hidden_size),
        head_trains=weight.requires_grad,
        plain_head=type(head) is nn.Linear and all(getattr(text, name, None) is None for name in capped),
    )


def rehearse(model: PreTrainedModel, length: int, layer: int | None) -> Pass:
    """Trace forward and backward of one sequence and of two on the meta device.

    Args:
        length: tokens of a sequence.
        layer: number of the block after which the pass ends, or None for all of them.

    Raises:
        InputError: the forward pass reads the contents of a tensor.
    """
    one, two = (_rehearse(model, size, length, layer) for size in (1, 2))
    line = {key: Linear(2 * one.bytes[key] - two.bytes[key], two.bytes[key] - one.bytes[key]) for key in one.bytes}
    return Pass(**line, used=one.used, backward_gathers=one.backward_gathers, reached=one.reached)


@dataclass(frozen=True)
class _Trace:
    """Of a micro-batch of one size; see `Pass`."""

    bytes: dict[str, int]
    used: list[int]
    backward_gathers: list[int]
    reached: list[int]


def _rehearse(model: PreTrainedModel, size: int, length: int, layer: int | None) -> _Trace:
    parameters = list(model.parameters())
    number = {id(parameter): i for i, parameter in enumerate(parameters)}
    used: list[int] = []
    needed: list[int] = []  # by backward
    reached: list[int] = []

    def called(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        own = [number[id(parameter)] for parameter in module.parameters(recurse=False)]
        used.extend(own)
        first = output[0] if isinstance(output, tuple) else output
        needed.extend(own if first.requires_grad else [])

    def reduced(parameter: Tensor) -> None:  # ZeRO reduces and frees a gradient as soon as it is complete
        reached.append(number[id(parameter)])
        parameter.grad = None

    owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(called) for module in owners]
    hooks += [p.register_post_accumulate_grad_hook(reduced) for p in parameters if p.requires_grad]
    base, head = base_of(model), model.get_output_embeddings()
    assert head is not None
    ids = torch.zeros(size, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    ledger = LiveBytes(parameters)
    try:
        with ledger:
            states = base(**inputs).last_hidden_state if layer is None else hidden_after(base, layer, inputs)
            saved, forward_flops, num_used, num_needed = ledger.alive, ledger.flops, len(used), len(needed)
            if states.requires_grad:
                states.backward(torch.empty_like(states))
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.path: its forward pass cannot be traced without weights: {reason}") from None
    finally:
        for hook in hooks:
            hook.remove()
    last = [number[id(parameter)] for parameter in head.parameters()] if layer is None else []
    return _Trace(
        {"saved": saved, "peak": ledger.peak, "flops": ledger.flops, "forward_flops": forward_flops},
        used=used[:num_used] + last,
        backward_gathers=needed[:num_needed] + used[num_used:] + last,
        reached=sorted({*reached, *(row for row in last if parameters[row].requires_grad)}),
    )


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of the storages that operations allocate, as long as they live, and their FLOPs.

    `existing`: tensors that exist already; neither they nor their views count.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self.known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage] | None]] = {}
        for tensor in existing:
            self.known[tensor.untyped_storage()._cdata] = (0, None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet is torch.ops.aten._grouped_mm:  # experts: [rows, in] with [experts, in, out], or two of rows
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known[key] = (storage.nbytes(), weakref.ref(storage, lambda _, key=key: self._remove(key)))
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def _remove(self, key: int) -> None:
        self.alive -= self.known.pop(key)[0]
