"""Small models of many kinds, made by code: what is true of a Llama need not be of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

BARE: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
TEXT: dict[str, Any] = {**BARE, "num_key_value_heads": 2, "head_dim": 8}
ALTERNATING = ["sliding_attention", "full_attention"]
# Towers have three blocks, so that they are not taken for the two of the text decoder.
TOWER: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"image_size": 28, "patch_size": 14},
}


def _gemma3() -> PreTrainedModel:
    tokens: dict[str, Any] = {
        "image_token_index": 299,
        "boi_token_index": 298,
        "eoi_token_index": 297,
        "mm_tokens_per_image": 4,
    }
    shape = transformers.Gemma3Config(text_config=TEXT, vision_config=TOWER, **tokens)  # pyright: ignore
    return transformers.Gemma3ForConditionalGeneration(shape)


def _gemma3n_text() -> PreTrainedModel:
    depth: dict[str, Any] = {
        "num_hidden_layers": 4,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    own: dict[str, Any] = {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "num_kv_shared_layers": 2,
    }
    shape: dict[str, Any] = {
        **TEXT,
        **depth,
        **own,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "layer_types": ALTERNATING * 2,
    }
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**shape))


def _gemma4() -> PreTrainedModel:
    own: dict[str, Any] = {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "num_kv_shared_layers": 0,
    }
    text: dict[str, Any] = {**TEXT, **own, "global_head_dim": 8, "layer_types": ALTERNATING}
    patches: dict[str, Any] = {
        "position_embedding_size": 64,
        "pooling_kernel_size": 2,
        "default_output_length": 4,
        "patch_size": 4,
    }
    heads: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8, "global_head_dim": 8}
    shape = transformers.Gemma4Config(text_config=text, vision_config={**TOWER, **patches, **heads}, audio_config=None)  # pyright: ignore
    return transformers.Gemma4ForConditionalGeneration(shape)


def _qwen3_5_text() -> PreTrainedModel:
    linear: dict[str, Any] = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    layers: dict[str, Any] = {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**TEXT, **linear, **layers))


def _phi4() -> PreTrainedModel:
    text: dict[str, Any] = {key: value for key, value in TEXT.items() if key != "head_dim"}
    convolutions: dict[str, Any] = {
        "num_blocks": 3,
        "ext_pw_out_channel": 32,
        "nemo_conv_channels": 32,
        "audio_token_id": 6,
    }
    shape = transformers.Phi4MultimodalConfig(
        **text,
        vision_config={**TOWER, "image_token_id": 5},  # pyright: ignore
        audio_config={"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **convolutions},  # pyright: ignore
    )
    return transformers.Phi4MultimodalForCausalLM(shape)


def _opt() -> PreTrainedModel:
    shape: dict[str, Any] = {key: value for key, value in BARE.items() if key != "intermediate_size"}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**shape, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16)
    )


def _gpt2() -> PreTrainedModel:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, **sizes)
    )


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "gpt2": _gpt2,
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**BARE)),
    "opt": _opt,
    "bert": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**BARE, is_decoder=True)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=4)),
    "gemma3": _gemma3,
    "gemma3n_text": _gemma3n_text,
    "gemma4": _gemma4,
    "qwen3_5_text": _qwen3_5_text,
    "git": lambda: transformers.GitForCausalLM(transformers.GitConfig(vision_config=TOWER, **BARE)),
    "phi4_multimodal": _phi4,
}
# Two kinds of names of the same tensors, both to be had on the hub: what to find and replace in those of transformers.
LAYOUTS: dict[str, tuple[str, str, str]] = {
    "gemma3, of later releases": ("gemma3", r"^language_model\.model\.", "model.language_model."),
    "gpt2, without prefix": ("gpt2", r"^transformer\.", ""),
    "bert, of the first release": ("bert", r"LayerNorm\.weight$", "LayerNorm.gamma"),
}


def make_kind(name: str, folder: Path) -> None:
    """The model `name` of KINDS or LAYOUTS in `folder`."""
    kind, found, replacement = LAYOUTS.get(name, (name, "", ""))
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder)
    if name in LAYOUTS:
        file = folder / "model.safetensors"
        tensors = {re.sub(found, replacement, name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
