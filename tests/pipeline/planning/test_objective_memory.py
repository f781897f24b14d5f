"""`objective_memory.measure` against arithmetic, and its variants against the tensors that they must store."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.data.batches import Batch
from pipeline.modeling import token_losses as objectives
from pipeline.planning import objective_memory as memory

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 9,
    "num_attention_heads": 2,
}


def test_the_measure_is_the_bytes_of_live_storages() -> None:
    """Views, what is written in place and what was there before cost nothing; what is freed makes room."""
    there = torch.zeros(4000)

    def step(kept: torch.Tensor) -> None:
        first = there[10:].view(-1, 2) + 1  # 15,960 bytes
        first[:5].mul_(2)
        kept.add_(1)
        second = first.double()  # 31,920
        del first
        third = second.sum() + second  # 8 and 31,920
        del second, third

    found = memory.measure(lambda: torch.ones(500), step, [there], CPU)
    assert found == memory.Bytes(persistent=2000, peak=31920 + 8 + 31920)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_usual_head_stores_all_logits_and_ours_never(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, width, vocabulary = 64, 4, 2**13
    monkeypatch.setattr(objectives, "_CHUNK", 2**14)
    found = memory.head(tokens, width, vocabulary, dtype, CPU)
    logits = 4 * tokens * vocabulary
    weight = vocabulary * width * dtype.itemsize  # its gradient
    assert found["logits and cross-entropy"].peak >= logits + weight
    assert weight < found["ours"].peak < logits / 2


def test_the_bytes_of_each_source_of_the_reference() -> None:
    """Two float64 of NPO, three [32, 48] tensors of RMU, or a model."""
    ids = torch.randint(300, (2, 16))
    found: dict[str, Any] = memory.references(SIZES, 7, Batch(torch.arange(2), ids, torch.ones_like(ids), ids), CPU)
    model = 4 * (2 * 300 * 32 + 9 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32)
    for name, row in found.items():
        if "second" in name:
            assert model <= row.persistent < model + 1000, name  # and a few buffers
    assert found["NPO: ours"].persistent == 2 * 8
    assert found["RMU's retain term: ours"].persistent == 3 * 32 * 48 * 4
    assert found["NPO: ours"].peak > model  # the gradient
    for term in ("NPO", "RMU's retain term"):
        (second,) = (row for name, row in found.items() if name.startswith(f"{term}: a second"))
        assert found[f"{term}: ours"].peak <= second.peak
