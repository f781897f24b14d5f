"""Rounding to int8 and int4, against computations of its own."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from eval.attacks.quantize import round_linear_layers, rounded
from tests.conftest import World


def rounded_by_hand(weight: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Each group of a row by itself, in float64."""
    levels, result = 2 ** (bits - 1) - 1, np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], columns):
            group = weight[row, start : start + columns].astype(np.float64)
            scale = np.abs(group).max() / levels
            result[row, start : start + columns] = np.rint(group / scale) * scale if scale else 0.0
    return result


@pytest.mark.parametrize(("bits", "columns", "width"), [(8, None, 300), (4, 128, 300), (4, 128, 256), (4, 128, 96)])
def test_rounding_by_hand(bits: int, columns: int | None, width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, width) * torch.logspace(-6, 3, 5).unsqueeze(1)  # rows of very different size
    weight[2] = 0
    weight[3, : width // 2] = 0
    answer = rounded(weight, bits, columns)
    expected = rounded_by_hand(weight.numpy(), bits, columns or width)
    step = np.abs(weight.numpy()).max(axis=1, keepdims=True)
    assert np.all(np.abs(answer.numpy() - expected) <= 1e-6 * step)
    assert answer.dtype == weight.dtype and not torch.equal(answer, weight)
    halves = rounded(weight.bfloat16(), bits, columns)
    assert halves.dtype == torch.bfloat16 and halves.isfinite().all()


def test_only_linear_layers_are_rounded(world: World) -> None:
    for folder in ("model", "tied"):
        model = AutoModelForCausalLM.from_pretrained(world.folder / folder)
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        share = round_linear_layers(model, 4)
        changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if "proj" in name} and len(changed) == 14
        sizes = {name: tensor.numel() for name, tensor in before.items()}
        assert share == pytest.approx(sum(sizes[name] for name in changed) / sum(sizes.values()))


def test_a_scale_belongs_to_an_output_also_where_weights_are_transposed() -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    before = weight.detach().clone()
    round_linear_layers(model, 8)
    assert torch.equal(weight.detach(), rounded(before.T.contiguous(), 8, None).T)
    assert not torch.equal(weight.detach(), rounded(before, 8, None))
