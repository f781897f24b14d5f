"""Adapters on a model in 4 bits (QLoRA): refusals, and, with bitsandbytes itself, runs on two ranks of a CPU."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from pipeline.config import checks
from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.load import resolve
from pipeline.config.schema import RunConfig
from pipeline.errors import InputError
from pipeline.planning.memory import whole_weights
from pipeline.planning.meta_trace import model_without_weights, shape_of
from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.modeling.options import LORA, SGD, resume
from tests.pipeline.zero.test_sharded import train_cases

FOUR_BITS: dict[str, Any] = {"lora": LORA, "load_in_4bit": True}


@pytest.mark.parametrize(
    ("model", "stage", "message"),
    [
        ({"load_in_4bit": True}, 2, r"weights in 4 bits cannot train; set model\.lora"),
        ({**FOUR_BITS, "lora": {**LORA, "merge": True}}, 2, r"model\.lora\.merge: .*merge it by peft"),
        ({**FOUR_BITS, "torch_compile": True}, 2, r"model\.torch_compile: was not tested with model\.load_in_4bit"),
        (FOUR_BITS, 3, r"stage 3 cuts every weight into shares .*zero2\.json"),
        (FOUR_BITS, 2, r"needs the package bitsandbytes, .*pip install bitsandbytes"),
    ],
)
def test_what_does_not_go_with_it(
    model: dict[str, Any], stage: int, message: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = lambda name: None if "package" in message else find_spec("torch")  # noqa: E731
    monkeypatch.setattr(checks, "find_spec", present)
    train = {"deepspeed": f"ds_configs/zero{stage}.json"}
    with pytest.raises(InputError, match=message):
        deepspeed_config(resolve(world.write(tmp_path / "run.yaml", tmp_path / "run", model=model, train=train)))


# -- with bitsandbytes (tests/requirements-slow.txt) -------------------------------------------------------------------


def make_model(world: World, folder: Path) -> Path:
    """Wider than other tests' models: on a CPU bitsandbytes 0.50 unpacks rows of fewer than 64 elements wrongly."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    shape = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, bos_token_id=0, eos_token_id=0, **sizes)
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def packed_of(source: Path) -> Any:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32)


def unpacked(source: Path, folder: Path) -> Path:
    """The model with each packed weight as bitsandbytes unpacks it: an ordinary one, for the plain loop."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    packed = packed_of(source)
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    changed = 0
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight, own = module.weight, plain.get_submodule(name).weight
                found = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                assert 0.08 < (found - own).norm() / own.norm() < 0.11  # of NF4 on a normal distribution
                own.copy_(found)
                changed += 1
    assert changed == 2 * 7  # every linear layer of two blocks, not the output layer
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def cases_of(world: World, folder: Path, source: Path) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    wanted = {
        "sago-0": (0, {"rule": "sago"}, {}),
        "sago-1": (1, {"rule": "sago"}, {}),
        "sago-2": (2, {"rule": "sago"}, {}),
        "pcgrad-2": (2, {"rule": "pcgrad", "scope": "global"}, {"gradient_checkpointing": True}),
        "half": (2, {"rule": "pcgrad", "scope": "global"}, {"dtype": "bfloat16"}),
    }
    for name, (stage, rule, more) in wanted.items():
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        train = {"steps": 2, "batch_size": 8, "deepspeed": str(folder / f"zero{stage}.json"), "checkpoint_every": 1}
        model = {**world.configuration("")["model"], "path": str(source), **FOUR_BITS, **more}
        objective = {"forget": "npo", "retain": "nll", "beta": 0.1}  # its reference: the adapters switched off
        optimizer = SGD if name == "half" else {"eps": 1e-6}
        made = world.configuration(
            folder / name, synthesis=rule, seed=5, train=train, objective=objective, optimizer=optimizer
        )
        cases[name] = {**made, "model": model}
    return cases


def train_and_resume(cases: dict[str, dict[str, Any]]) -> None:
    train_cases(list(cases.values()))
    resume(cases["sago-2"])


@pytest.mark.slow
def test_adapters_on_four_bits_equal_the_plain_loop_on_the_unpacked_model(world: World, tmp_path: Path) -> None:
    source = make_model(world, tmp_path / "model")
    cases = cases_of(world, tmp_path, source)
    run_distributed(train_and_resume, 2, cases, timeout=400)
    plain = unpacked(source, tmp_path / "unpacked")
    for name, keys in cases.items():
        alike = {**keys, "model": {"path": str(plain), "lora": LORA}, "train": {"steps": 2, "batch_size": 8}}
        expected, initial = (
            {key.replace(".default.", "."): tensor.detach() for key, tensor in found.items()}
            for found in (oracle.train(alike)[0], dict(oracle.model_of(alike).named_parameters()))
        )
        final = load_file(Path(keys["output"]) / "final" / "adapter_model.safetensors")
        assert set(final) == set(expected)
        error = oracle.weight_change_error(final, expected, initial)
        print(f"{name}: relative error of the weight change {error:.1e}")
        assert error < (0.1 if name == "half" else 2e-4 if "sago" in name else 2e-5)
    undisturbed = load_file(tmp_path / "sago-2" / "undisturbed" / "adapter_model.safetensors")
    resumed = load_file(tmp_path / "sago-2" / "final" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())


@pytest.mark.slow
def test_planned_bytes_are_those_of_the_packed_weights(world: World, tmp_path: Path) -> None:
    """Without the tables of levels, which each weight has and which do not grow with it."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    source = make_model(world, tmp_path / "model")
    keys = world.configuration("", model={"path": str(source), **FOUR_BITS})
    planned = shape_of(model_without_weights(RunConfig.model_validate(keys)), four_bits=True)
    found = 0
    for name, parameter in packed_of(source).named_parameters():
        found += parameter.data.untyped_storage().nbytes()
        if isinstance(parameter, bitsandbytes.nn.Params4bit):
            state = parameter.quant_state
            found += state.absmax.nbytes + state.state2.absmax.nbytes
            assert name.startswith("model.layers.")
    adapters = sum(size for size, trains in zip(planned.sizes, planned.trains, strict=True) if trains)
    assert sum(planned.packed) == 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert whole_weights(planned) - 4 * adapters == pytest.approx(found, rel=1e-3)
