"""Load a causal language model sharded from the start, and set which of its parameters are trained."""

from __future__ import annotations

import copy
import re
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from pipeline.config.deepspeed import DeepSpeedDict
from pipeline.config.schema import Model
from pipeline.errors import InputError
from pipeline.modeling.checks import _holds_an_adapter, check_writing, load_model_config
from pipeline.modeling.decoder import blocks_of, text_parameters
from pipeline.modeling.dropout import restore_dropout, set_dropout
from pipeline.modeling.lora import attach_adapters
from pipeline.modeling.weights import WrongWeights, load_whole


def load_model(config: Model, deepspeed_config: DeepSpeedDict, seed: int = 0) -> PreTrainedModel:
    """The model in `config.dtype`, with its trainable parameters set; ZeRO-3 partitions each tensor while it loads.

    transformers stores the experts of a block in one tensor, which all ranks use in every micro-batch. With a module
    for each expert, a rank under ZeRO-3 would wait for ranks that route elsewhere: name the class of the block in the
    DeepSpeed file, `"zero_optimization": {"leaf_module": {"classes": ["package.module.Block"]}}`.

    Args:
        seed: the initial adapters are a function of it alone, the same on any number of ranks.

    Raises:
        InputError: unreadable weights, an attention that is not available here, a pattern that matches no parameter.
    """
    zero3 = HfDeepSpeedConfig(deepspeed_config)  # while it lives, from_pretrained loads under deepspeed.zero.Init
    options: dict[str, object] = {"trust_remote_code": config.trust_remote_code}
    shape = load_model_config(config)
    if config.dropout is not None:
        options["config"] = set_dropout(copy.deepcopy(shape), config.dropout)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if not config.allow_pickle:
        options["use_safetensors"] = True  # else transformers loads a pickle where there are no safetensors
    if config.load_in_4bit:
        options |= four_bits(config)
    try:
        dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)  # auto: as it was saved
        model = load_whole(config.path, dtype=dtype, **options)
    except WrongWeights as error:
        raise InputError(f"model.path: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:  # RuntimeError: shapes differ
        reason = " ".join(str(error).split())[:300]
        if config.attn_implementation and (isinstance(error, ImportError) or "attn_implementation" in reason):
            wanted = config.attn_implementation
            raise InputError(f"model.attn_implementation: {wanted!r} is not available here: {reason}") from None
        if not config.allow_pickle and "safetensors" in reason:
            reason += "; if you trust its other files, which can run code, set model.allow_pickle: true"
        raise InputError(f"model.path: cannot load {config.path!r}: {reason}") from None
    finally:
        del zero3
    if config.load_in_4bit:
        keep_packing(model)
    if hasattr(model, "peft_config"):
        raise _holds_an_adapter(config.path)
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = config.dropout  # a rate that is a constant in the model's code
        restore_dropout(model, shape)
    if config.lora is None or config.lora.merge:
        check_writing(partial(model.save_pretrained, state_dict={}), "configuration", config.path)
    set_trainable_parameters(model, config, seed)
    if config.torch_compile:
        _compile_blocks(model, deepspeed_config.get("zero_optimization", {}).get("stage", 0))
    torch.manual_seed(seed + dist.get_rank())  # each rank draws its own dropout
    model.train()
    return model


def four_bits(config: Model) -> dict[str, object]:
    """Options of `from_pretrained` by which linear layers but the output layer are in 4 bits, on this rank's device.

    QLoRA (Dettmers et al., 2023): NF4 in blocks of 64, whose scales are quantised again. A layer multiplies in the
    model's dtype, in which its weight is unpacked for each product.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    accelerator = get_accelerator()
    assert accelerator is not None
    return {"quantization_config": settings, "device_map": {"": accelerator.current_device_name()}}


def keep_packing(model: PreTrainedModel) -> None:
    """In evaluation mode some CPUs would pack weights in 4 bits anew, in a form that a backward pass cannot read."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of bitsandbytes' Linear4bit
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (a Module's type has no such name)


def _compile_blocks(model: PreTrainedModel, stage: int) -> None:
    """
    Raises:
        InputError: frozen tensors under ZeRO stage 3.
    """
    text = text_parameters(model)
    if stage == 3 and not all(p.requires_grad for name, p in model.named_parameters() if name in text):
        raise InputError(
            "model.torch_compile: under ZeRO stage 3 the backward of a compiled block finds frozen tensors "
            "released; use a lower stage, or train all parameters (no model.lora, no model.trainable)"
        )
    for block in blocks_of(model):
        # ZeRO-3 gathers in hooks around each module; with one pair around the block, its inside is one graph.
        deepspeed.utils.set_z3_leaf_module(block, True)
        block.forward = torch.compile(block.forward)


def set_trainable_parameters(model: PreTrainedModel, config: Model, seed: int) -> None:
    """Freeze all other parameters, or attach adapters; turn on recomputation of activations. Also on the meta device.

    Only parameters of the text decoder, the embedding and the output layer train: towers for images or sound do not.

    Raises:
        InputError: a pattern that matches no parameter.
    """
    if config.lora is None:
        text = text_parameters(model)
        names = [name for name, _ in model.named_parameters() if name in text]
        for pattern in config.trainable:
            if not any(re.search(pattern, name) for name in names):
                raise InputError(
                    f"model.trainable: {pattern!r} matches no parameter of the text decoder; their names look like "
                    f"{names[0]!r}"
                )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in text and any(re.search(pattern, name) for pattern in config.trainable))
    else:
        torch.manual_seed(seed)
        attach_adapters(model, config.lora)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
