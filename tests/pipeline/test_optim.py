"""Which tensors decay, by hand-written names. What comes of it on each stage: test_sharded.py, test_reshard.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.config.load import resolve
from pipeline.optim import make_schedule, parameter_groups
from tests.conftest import World

LLAMA: dict[str, Any] = {
    **{"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "tie_word_embeddings": False,
}


def groups_of(model: nn.Module, weight_decay: float) -> list[tuple[float, set[str]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay)
    return [(group["weight_decay"], {names[id(parameter)] for parameter in group["params"]}) for group in groups]


def test_layer_norms_and_biases_do_not_decay() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    layers = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    norms = {"transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.ln_f"}
    decaying = {"transformer.wte.weight", "transformer.wpe.weight"} | {f"{name}.weight" for name in layers}
    rest = {f"{name}.bias" for name in layers | norms} | {f"{name}.weight" for name in norms}
    assert groups_of(model, 0.1) == [(0.1, decaying), (0.0, rest)]
    assert groups_of(model, 0.0) == [(0.0, decaying | rest)]


def test_only_what_trains_is_in_a_group_and_no_group_is_empty() -> None:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    norms = {"model.norm.weight", *(f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention"))}
    every = {name for name, _ in model.named_parameters()}
    assert groups_of(model, 0.1) == [(0.1, every - norms), (0.0, norms)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in norms)
    assert groups_of(model, 0.1) == [(0.0, norms)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    adapters = {f"model.layers.0.self_attn.q_proj.lora_{side}.default.weight" for side in "AB"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters)
    assert groups_of(model, 0.1) == [(0.1, adapters)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_trains(schedule: str, world: World, tmp_path: Path) -> None:
    """One step would be all warm-up, whose first learning rate is 0."""
    chosen = [f"--optimizer.schedule={schedule}", "--optimizer.lr=0.5", "--optimizer.warmup_ratio=0.1"]
    resolved = resolve(world.write(tmp_path / "run.yaml", "runs/x"), None, chosen)
    for steps, first in ((1, 0.5), (2, 0.0)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        make_schedule(resolved, optimizer, steps)
        assert optimizer.param_groups[0]["lr"] == first
