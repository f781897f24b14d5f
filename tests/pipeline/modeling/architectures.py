"""Random models of many architectures: heads that are tied, with a bias, capped, scaled, with adapters."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY, WIDTH, BLOCKS = 64, 32, 3
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MLP = {**SHAPE, "intermediate_size": 48}
GROUPED = {**MLP, "num_key_value_heads": 2}
# Name of the configuration class, its keys, whether the logits are the head's own product and nothing else.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("LlamaConfig", GROUPED, True),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, True),
    "gpt2": ("GPT2Config", {**SHAPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, True),
    "gpt-neox": ("GPTNeoXConfig", MLP, True),
    "opt": ("OPTConfig", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "dropout": 0.0}, True),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}, True),
    "phi": ("PhiConfig", MLP, True),  # its head has a bias
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 5.0}, False),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0}, False),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.25}, False),
    "adapters": ("LlamaConfig", GROUPED, True),
    "adapters-on-head": ("LlamaConfig", GROUPED, False),
}


def build(name: str) -> Any:
    """A random model whose logits are far from zero, so that capping and scaling matter."""
    import transformers

    kind, keys, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**keys))
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight *= 20
        if head.bias is not None:
            head.bias.normal_()
    if name.startswith("adapters"):
        from peft import LoraConfig, inject_adapter_in_model

        targets = ["q_proj", "v_proj"] + (["lm_head"] if name == "adapters-on-head" else [])
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
    return model.train()
