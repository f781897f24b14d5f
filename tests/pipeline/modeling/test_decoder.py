"""Of a model with towers for images or sound, the text decoder is what is trained, adapted and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.config.schema import Lora, Model
from pipeline.errors import InputError
from pipeline.modeling.decoder import base_of, blocks_of
from pipeline.modeling.load import set_trainable_parameters
from pipeline.modeling.lora import attach_adapters
from pipeline.modeling.outputs import hidden_after
from tests.conftest import World
from tests.distributed import run_distributed
from tests.kinds import KINDS, make_kind
from tests.pipeline.zero.test_sharded import train_cases

# Of each model its text decoder's blocks, the linear layers in one of them, and what lies outside the text decoder,
# as its source in transformers has them.
TOWERS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "gemma3": ("model.language_model.layers", 7, ("model.vision_tower.", "model.multi_modal_projector.")),
    "gemma4": ("model.language_model.layers", 9, ("model.vision_tower.", "model.embed_vision.")),
    "git": ("git.encoder.layer", 6, ("git.image_encoder.",)),
    "phi4_multimodal": ("model.layers", 4, ("model.embed_tokens_extend.",)),
}
PLAIN = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "bert": "bert.encoder.layer", "llama": "model.layers"}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def options(**keys: Any) -> Model:
    return Model.model_validate({"path": "some/model", **keys})


@pytest.mark.parametrize("kind", [*TOWERS, *PLAIN])
def test_hidden_states_are_those_of_a_block_of_the_text_decoder(kind: str) -> None:
    model, name = model_of(kind), TOWERS[kind][0] if kind in TOWERS else PLAIN[kind]
    assert blocks_of(model) is blocks_of(base_of(model)) is model.get_submodule(name)
    seen: list[Any] = []
    hook = model.get_submodule(f"{name}.0").register_forward_hook(lambda *call: seen.append(call[2]))
    inputs = {"input_ids": torch.arange(8, 16).unsqueeze(0), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    model(**inputs, use_cache=False)
    hook.remove()
    expected = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    assert hidden_after(base_of(model), 0, {**inputs, "use_cache": False}).equal(expected)


@pytest.mark.parametrize("kind", TOWERS)
def test_what_trains_is_of_the_text_decoder(kind: str) -> None:
    model, outside = model_of(kind), TOWERS[kind][2]
    set_trainable_parameters(model, options(), 0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(outside)}
    set_trainable_parameters(model, options(trainable=[r"layers?\.0\..*(mlp|intermediate)"]), 0)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains and all(name.startswith(f"{TOWERS[kind][0]}.0.") for name in trains)
    with pytest.raises(InputError, match=r"model\.trainable: 'patch' matches no parameter of the text decoder"):
        set_trainable_parameters(model, options(trainable=["patch"]), 0)


@pytest.mark.parametrize("kind", TOWERS)
def test_adapters_are_on_the_text_decoder(kind: str) -> None:
    blocks, linear, _ = TOWERS[kind]
    model = model_of(kind)
    attach_adapters(model, Lora.model_validate({}))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert len([name for name in adapted if name.startswith(f"{blocks}.")]) == 2 * linear
    assert not [name for name in adapted if name.startswith(TOWERS[kind][2])]
    assert not [name for name, tensor in model.named_parameters() if tensor.requires_grad and ".lora_" not in name]
    query = {"git": "query", "phi4_multimodal": "qkv_proj"}.get(kind, "q_proj")
    model = model_of(kind)
    attach_adapters(model, Lora.model_validate({"targets": [query]}))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert len(adapted) == 2 and all(name.startswith(f"{blocks}.") for name in adapted)


def test_a_run_leaves_the_towers_as_they_were(world: World, tmp_path: Path) -> None:
    """Weight decay included; and RMU reads and trains the text decoder's first block."""
    make_kind("gemma3", tmp_path / "gemma3")
    AutoTokenizer.from_pretrained(world.folder / "model").save_pretrained(tmp_path / "gemma3")
    train = {"steps": 2, "batch_size": 4, "deepspeed": "ds_configs/zero3.json"}
    decay = {"lr": 1e-2, "weight_decay": 0.5, "warmup_ratio": 0.0}
    rmu = {"forget": "rmu", "retain": "embed_diff", "layer": 0}
    model = {"path": str(tmp_path / "gemma3"), "dtype": "float32"}
    cases = [
        world.configuration(tmp_path / "sago", model=model, train=train, optimizer=decay),
        world.configuration(
            tmp_path / "rmu",
            model={**model, "trainable": [r"layers\.0\.mlp"]},
            train=train,
            optimizer=decay,
            objective=rmu,
        ),
    ]
    run_distributed(train_cases, 2, cases, timeout=200)
    before = load_file(tmp_path / "gemma3" / "model.safetensors")
    block = "language_model.model.layers.0.mlp."
    for name in ("sago", "rmu"):
        after = load_file(tmp_path / name / "final" / "model.safetensors")
        changed = {name for name, tensor in before.items() if not after[name].equal(tensor)}
        text = {tensor for tensor in before if tensor.startswith("language_model." if name == "sago" else block)}
        assert changed == text
