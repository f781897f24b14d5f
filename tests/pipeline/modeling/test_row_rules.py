"""Two gradients of one backward pass are those of two passes: real architectures in float64, beside plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import InputError
from pipeline.modeling.row_rules import install_rules
from pipeline.zero.joint import TaskRows
from tests.kinds import KINDS, TEXT

FORGET, RETAIN, LENGTH = 2, 3, 6


def _llama(**shape: Any) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **shape))


def _adapted() -> nn.Module:
    adapters = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.inject_adapter_in_model(adapters, _llama().requires_grad_(False))


def _adapted_gpt2() -> nn.Module:
    adapters = peft.LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    return peft.inject_adapter_in_model(adapters, KINDS["gpt2"]().requires_grad_(False))


def _partly_frozen() -> PreTrainedModel:
    model = KINDS["gpt_neox"]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("dense.bias", "h_to_4h.weight", "1.input_layernorm.weight")))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: KINDS[name] for name in ("llama", "gpt2", "gpt_neox", "opt", "bert")
    },  # RMSNorm, Conv1D, LayerNorm, offsets
    "biased": lambda: _llama(attention_bias=True, mlp_bias=True),
    "tied": lambda: _llama(tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT)),  # scaled embedding, 1 + w
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT)),  # norms of queries and keys
    "adapters": _adapted,
    "adapters on Conv1D": _adapted_gpt2,
    "partly frozen": _partly_frozen,
}


def weighted(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """0-dim: a loss that treats each row by itself."""
    return (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits * weights).sum()


def check_two_gradients(model: nn.Module) -> None:
    model.double()
    plain = copy.deepcopy(model)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    diverted: dict[str, Tensor] = {}

    def divert(parameter: nn.Parameter, gradient: Tensor) -> None:
        diverted[names[parameter]] = diverted.get(names[parameter], 0) + gradient

    rows = TaskRows(divert=divert)
    install_rules(model, rows)
    dice = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 300, (FORGET + RETAIN, LENGTH), generator=dice)
    weights = torch.randn(FORGET + RETAIN, LENGTH, 300, generator=dice, dtype=torch.float64)
    rows.forget, rows.total = FORGET, FORGET + RETAIN
    weighted(model, ids, weights).backward()
    rows.total = 0
    expected: dict[str, dict[str, Tensor]] = {}
    for task, part in (("forget", slice(0, FORGET)), ("retain", slice(FORGET, None))):
        plain.zero_grad()
        weighted(plain, ids[part], weights[part]).backward()
        found = {name: parameter.grad for name, parameter in plain.named_parameters()}
        expected[task] = {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
    assert expected["forget"].keys() == set(names.values()) == diverted.keys()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            for gradient, task in ((diverted[name], "forget"), (parameter.grad, "retain")):
                wanted = expected[task][name]
                largest = float(wanted.abs().max())
                # The bias of the keys of an attention has gradient zero: it adds the same to all scores of a query.
                assert largest > 1e-6 or name.endswith(("k_proj.bias", "key.bias")), (name, "nothing to compare")
                torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12 + 1e-9 * largest)


@pytest.mark.parametrize("name", MODELS)
def test_each_task_has_the_gradient_of_its_own_pass(name: str) -> None:
    torch.manual_seed(0)
    check_two_gradients(MODELS[name]().eval())  # without dropout


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_activations_change_nothing(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model = _llama(attention_dropout=0.0).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    check_two_gradients(model)


def test_outside_a_joint_pass_and_without_gradients_modules_do_what_they_did() -> None:
    torch.manual_seed(0)
    model = KINDS["gpt2"]().eval()
    plain, rows = copy.deepcopy(model), TaskRows(divert=lambda parameter, gradient: pytest.fail("no joint pass"))
    install_rules(model, rows)
    ids = torch.arange(12).view(2, 6)
    for one in (model, plain):
        one(input_ids=ids).logits.square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)
    rows.forget, rows.total = 1, 3  # of another number of rows: nothing looks without gradients
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_module_without_a_rule_is_named_unless_it_is_frozen() -> None:
    model = KINDS["mixtral"]()
    with pytest.raises(InputError, match=r"joint .*MixtralExperts.*train\.schedule: sequential") as refusal:
        install_rules(model, TaskRows())
    assert "layers.0.mlp" in str(refusal.value) and "layers.1" not in str(refusal.value), "once for each kind"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    install_rules(model, TaskRows())

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

    with pytest.raises(InputError, match=r"norm \(BatchNorm1d\)"):
        install_rules(Batched(), TaskRows())


def test_the_rows_of_a_dimension() -> None:
    rows = TaskRows(forget=2, total=5)
    assert rows.parts(5) == (slice(0, 2), slice(2, 5))
    assert rows.parts(20) == (slice(0, 8), slice(8, 20))
    assert rows.parts(7) is None and rows.parts(0) is None
