"""The trace of a pass without weights against a real pass, and its operations against a count by hand."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import RunConfig
from pipeline.planning import memory as budget_memory
from pipeline.planning import meta_trace as rehearsal
from tests.conftest import World
from tests.pipeline.planning.base import configuration_of


class Watch(TorchDispatchMode):
    """Bytes of real storages alive, and at most alive, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                at = storage.data_ptr()
                if at and at not in before and at not in self.sizes:
                    self.sizes[at] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, at)
                    self.peak = max(self.peak, sum(self.sizes.values()))
        return out


class Engine(torch.nn.Module):
    """A whole model behind the interface of an engine."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.device, self.optimizer = module, torch.device("cpu"), None

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


PASSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True},
    "adapters": {"lora": {"r": 4}},
    "last blocks": {"trainable": [r"layers\.[23]\."]},
    "eager": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("name", PASSES)
def test_activations_of_a_real_pass(name: str, tmp_path: Path, world: World) -> None:
    """Peak of forward and backward of 4 sequences on a CPU, beside weights, whole gradients taken away as ZeRO does."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pipeline.data.batches import Batch
    from pipeline.modeling.load import set_trainable_parameters
    from pipeline.modeling.outputs import TokenLosses, forward, install_outputs

    shape = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    shape.save_pretrained(tmp_path)
    data = {**world.configuration("")["data"], "max_length": 192}
    model = {"path": str(tmp_path), "dtype": "float32", **PASSES[name]}
    config = RunConfig.model_validate(world.configuration(tmp_path / "run", model=model, data=data))

    options = {"attn_implementation": config.model.attn_implementation} if name == "eager" else {}
    real = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, **options)
    set_trainable_parameters(real, config.model, 0)
    engine = Engine(real.train())
    install_outputs(engine)
    for parameter in real.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.randint(4096, (4, 192))
    mask = torch.ones_like(ids)
    mask[0, 100:] = 0  # as documents are padded
    watch = Watch()
    with watch:
        forward(engine, Batch(torch.arange(4), ids, mask, ids), TokenLosses()).sum().backward()

    without = rehearsal.model_without_weights(config)
    sizes = rehearsal.shape_of(without)
    passes = {"retain": rehearsal.rehearse(without, 192, None)}
    activations, logits = budget_memory.working(config, sizes, passes, 4)
    print(
        f"{name}: peak measured {watch.peak / 2**20:.1f} MiB, planned {(activations + logits) / 2**20:.1f}: "
        f"{(activations + logits) / watch.peak - 1:+.1%}"
    )
    assert 0.9 < (activations + logits) / watch.peak < 1.25


@pytest.mark.parametrize(
    ("keys", "times"), [({}, 6), ({"gradient_checkpointing": True}, 8), ({"lora": {"r": 1}}, 4)], ids=str
)
def test_operations_are_six_a_parameter_and_token(keys: dict[str, Any], times: int, tmp_path: Path) -> None:
    """8 with recomputation, 4 where weights are frozen; and attention's two products forward, five backward."""
    from transformers import MistralConfig

    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 700,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    MistralConfig(vocab_size=4096, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)
    config = configuration_of(tmp_path, model={"dtype": "bfloat16", **keys})
    tokens = 64
    one = rehearsal.rehearse(rehearsal.model_without_weights(config), tokens, None)
    linear = 3 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 700)
    attention = (2 + (2 if times == 8 else 0) + 5) * 2 * tokens * tokens * 256 * 3
    spared = 2 * 3 * 256 * 700 * tokens if times == 8 else 0  # a block's last product: nothing needs it again
    assert one.flops(3) == pytest.approx(3 * (times * linear * tokens + attention - spared), rel=0.04)
