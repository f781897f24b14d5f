"""Rounding to int8, int4 and NF4, against computations of its own."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from eval.attacks.quantize import normal_floats, round_linear_layers, rounded, rounded_to_integers
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
    answer = rounded_to_integers(weight, bits, columns)
    expected = rounded_by_hand(weight.numpy(), bits, columns or width)
    step = np.abs(weight.numpy()).max(axis=1, keepdims=True)
    assert np.all(np.abs(answer.numpy() - expected) <= 1e-6 * step)
    assert answer.dtype == weight.dtype and not torch.equal(answer, weight)
    halves = rounded_to_integers(weight.bfloat16(), bits, columns)
    assert halves.dtype == torch.bfloat16 and halves.isfinite().all()


PUBLISHED_NF4 = [  # QLoRA (Dettmers et al. 2023), appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def test_normal_floats_are_those_of_the_paper() -> None:
    assert normal_floats() == pytest.approx(PUBLISHED_NF4, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 128), (5, 50), (1, 7)])
def test_normal_floats_by_hand(shape: tuple[int, int]) -> None:
    """Blocks of 64 of the values as they lie in memory, across rows where a row is no multiple of 64."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-6, 3, shape[0]).unsqueeze(1)
    weight[-1, :5] = 0
    flat = weight.flatten().tolist()
    expected = list[float]()

    def nearest(value: float) -> float:
        return min(PUBLISHED_NF4, key=lambda code: abs(value - code))

    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = max(abs(value) for value in block)
        expected += [scale * nearest(value / scale) for value in block]
    answer = rounded(weight, "nf4")
    assert answer.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=0)
    assert rounded(torch.zeros(2, 64), "nf4").tolist() == [[0.0] * 64] * 2
    assert rounded(weight.bfloat16(), "nf4").dtype == torch.bfloat16


@pytest.mark.parametrize("rounding", ["int4", "nf4"])
def test_only_linear_layers_are_rounded(world: World, rounding: str) -> None:
    for folder in ("model", "tied"):
        model = AutoModelForCausalLM.from_pretrained(world.folder / folder)
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        share = round_linear_layers(model, rounding)
        changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if "proj" in name} and len(changed) == 14
        sizes = {name: tensor.numel() for name, tensor in before.items()}
        assert share == pytest.approx(sum(sizes[name] for name in changed) / sum(sizes.values()))


def test_a_scale_belongs_to_an_output_also_where_weights_are_transposed() -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    before = weight.detach().clone()
    round_linear_layers(model, "int8")
    assert torch.equal(weight.detach(), rounded(before.T.contiguous(), "int8").T)
    assert not torch.equal(weight.detach(), rounded(before, "int8"))
