"""Model options through the program, on real engines: adapters, attention, compilation, checkpointing, experts."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from eval.evaluation import find_models
from eval.loading import load
from pipeline.config.schema import Lora, Model
from pipeline.errors import InputError
from pipeline.modeling.load import load_model
from pipeline.modeling.lora import attach_adapters
from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.modeling.options import LORA, TARGETS, cases_of, run_cases

TARGETS_IN_PEFT = r".*(q_proj|self_attn\.o_proj|layers\.1\.mlp\.(up|down)_proj)"  # one expression of the whole name


def bound(rule: str) -> float:
    return 2e-4 if rule == "sago" else 2e-5


# Slow. Each rule on adapters in every store is in test_stages.py, and so is sago on experts that no token reaches;
# through the program, each rule and two stages are enough by default. Compilation under ZeRO-3 takes half a minute.
MORE = (
    *("lora-zero0-sago", "lora-zero1-sago", "lora-zero2-sum", "lora-zero2-pcgrad", "lora-zero3-sago"),
    *("lora-zero3-sum", "eager", "qwen3_moe-sago", "mixtral-lora", "compiled-3"),
)


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case but those of MORE, trained on two ranks."""
    cases = cases_of(world, tmp_path_factory.mktemp("models"))
    few = {name: keys for name, keys in cases.items() if name not in MORE}
    run_distributed(run_cases, 2, few, timeout=900)
    return few


def final_of(config: dict[str, Any]) -> Path:
    return Path(config["output"]) / "final"


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapters as adapter_model.safetensors names them."""
    return {name.replace(".default.", "."): tensor.detach() for name, tensor in tensors.items()}


def initial_of(config: dict[str, Any]) -> dict[str, Tensor]:
    return plain_names(dict(oracle.model_of(config).named_parameters()))


def weights_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """What a run exported, by the names of the plain loop."""
    if config["model"].get("lora"):
        return load_file(final_of(config) / "adapter_model.safetensors")
    return dict(AutoModelForCausalLM.from_pretrained(final_of(config)).named_parameters())


@cache
def _trained_plainly(config: str) -> dict[str, Tensor]:
    return plain_names(oracle.train(json.loads(config))[0])


def error_of(config: dict[str, Any]) -> float:
    """The error of the weight change, relative to the plain loop's change; the sets of tensors are equal."""
    options = {key: config["model"][key] for key in ("path", "lora") if key in config["model"]}
    if (options.get("lora") or {}).get("targets") == TARGETS:
        options["lora"] = {**LORA, "targets": TARGETS_IN_PEFT}
    alike = {**config, "output": "", "model": options, "train": {"steps": 2, "batch_size": 8}}
    expected = _trained_plainly(json.dumps(alike))
    final = {name: tensor.detach().float() for name, tensor in weights_of(config).items()}
    assert set(final) == set(expected)
    return oracle.weight_change_error(final, expected, initial_of(alike))


@pytest.mark.parametrize(
    "case",
    [
        *("plain", "checkpointing", "compiled-2", "lora-checkpointing", "lora-targets", "lora-resumed"),
        *("lora-zero2-sago", "lora-zero3-pcgrad"),
        *("mixtral-pcgrad", "qwen3_moe-pcgrad", "qwen3_moe-lora"),
    ],
)
def test_weights_equal_the_plain_loop(case: str, runs: dict[str, dict[str, Any]]) -> None:
    error = error_of(runs[case])
    print(f"{case}: relative error of the weight change {error:.1e}")
    assert error < bound(runs[case]["synthesis"]["rule"])


@pytest.mark.slow
def test_the_other_rules_on_adapters_and_experts_and_compilation_under_zero3(world: World, tmp_path: Path) -> None:
    cases = {name: keys for name, keys in cases_of(world, tmp_path).items() if name in (*MORE, "compiled-2")}
    run_distributed(run_cases, 2, cases, "aot_eager", timeout=900)
    for name, keys in cases.items():
        error = error_of(keys)
        print(f"{name}: relative error of the weight change {error:.1e}")
        assert error < bound(keys["synthesis"]["rule"]), name


def test_options_are_on(runs: dict[str, dict[str, Any]]) -> None:
    """Else the comparisons above would compare nothing."""
    outputs = {name: Path(config["output"]) for name, config in runs.items() if not name.startswith("refused")}
    calls = {name: json.loads((output / "calls.json").read_text()) for name, output in outputs.items()}
    training = 2 * 2 * 2 * 2  # blocks, micro-batches, tasks, steps
    looks = 2 * 2 + 2 * 2 * 2  # blocks, forwards of has_plain_head; blocks, micro-batches, tasks: what is known before
    assert calls["plain"]["mlp"] == training + looks
    for case in ("checkpointing", "lora-checkpointing"):
        assert calls[case]["mlp"] == 2 * training + looks
    for case, counted in calls.items():
        assert counted.get("compiled", 0) == (2 if case.startswith("compiled") else 0), case


# -- adapters ----------------------------------------------------------------------------------------------------------
def test_adapters_have_the_dtype_of_the_model(runs: dict[str, dict[str, Any]]) -> None:
    """And train like those of an fp32 model, up to the rounding of bf16 in forward and backward."""
    for stage in (2, 3):
        config = runs[f"lora-bfloat16-{stage}"]
        final = weights_of(config)
        assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16}
        error = error_of(config)
        print(f"bf16, ZeRO-{stage}: relative error of the weight change {error:.1e}")
        assert error < 0.1


def logits_of(folder: Path) -> Tensor:
    (_, found), *others = find_models(folder)
    assert not others and found == folder
    model, tokenizer = load(folder)
    with torch.no_grad():
        return model(**tokenizer("kara lovi suden mito", return_tensors="pt")).logits


def test_merged_adapted_and_evaluated_are_one_model(runs: dict[str, dict[str, Any]], world: World) -> None:
    adapter, merged = (final_of(runs[name]) for name in ("lora-zero3-pcgrad", "lora-merged"))
    assert {file.name for file in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (adapter / "model.safetensors").exists() and not (merged / "adapter_config.json").exists()
    difference = (logits_of(adapter) - logits_of(merged)).abs().max().item()
    change = (logits_of(adapter) - logits_of(world.folder / "model")).abs().max().item()
    print(f"logits: {difference:.1e} between adapter and merged, {change:.1e} from the original")
    assert difference < 1e-5 < 1e-3 < change
    base, whole = load_file(world.folder / "model" / "model.safetensors"), load_file(merged / "model.safetensors")
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if "lora_A" in name:
            b = load_file(adapter / "adapter_model.safetensors")[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            base[layer] = base[layer] + LORA["alpha"] / LORA["r"] * b @ tensor
    assert set(base) == set(whole)
    for name, tensor in base.items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=1e-7)


def test_cards_name_the_original(runs: dict[str, dict[str, Any]], world: World) -> None:
    files = [world.folder / "model" / name for name in ("config.json", "model.safetensors")]
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
    folder = hashlib.sha256("".join(lines).encode())
    for name, library in (("lora-zero3-pcgrad", "peft"), ("lora-merged", "transformers"), ("plain", "transformers")):
        card = (final_of(runs[name]) / "README.md").read_text()
        assert "base_model: model\n" in card and f"library_name: {library}" in card
        assert folder.hexdigest() in card
    adapter = json.loads((final_of(runs["lora-zero3-pcgrad"]) / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(world.folder / "model")


def test_resumed_adapters_are_those_of_the_undisturbed_run(runs: dict[str, dict[str, Any]]) -> None:
    final = final_of(runs["lora-resumed"])
    undisturbed = load_file(final.with_name("undisturbed") / "adapter_model.safetensors")
    resumed = load_file(final / "adapter_model.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in undisturbed.items())


# -- experts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_ranks_routed_differently_and_the_export_reloads(name: str, runs: dict[str, dict[str, Any]]) -> None:
    config = runs[f"{name}-pcgrad"]
    model: Any = AutoModelForCausalLM.from_pretrained(config["model"]["path"])
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    hit: list[set[int]] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *call: hit.append(set(call[2][2].flatten().tolist())))
    for line in Path(config["data"]["forget"]["path"]).read_text().splitlines():
        model(**tokenizer(json.loads(line)["text"], truncation=True, max_length=6, return_tensors="pt"))
    assert all(len(experts) < 16 for experts in hit) and len({frozenset(experts) for experts in hit}) > 10
    files = [load_file(folder / "model.safetensors") for folder in (Path(config["model"]["path"]), final_of(config))]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    final: Any = AutoModelForCausalLM.from_pretrained(final_of(config))
    final.save_pretrained(final_of(config).with_name("again"))
    again = load_file(final_of(config).with_name("again") / "model.safetensors")
    assert all(again[key].equal(tensor) for key, tensor in files[1].items())
    assert any(not files[0][key].equal(tensor) for key, tensor in files[1].items() if ".experts." in key)


# -- what cannot be ----------------------------------------------------------------------------------------------------
def test_an_adapter_is_no_model(runs: dict[str, dict[str, Any]]) -> None:
    config = Model.model_validate({"path": str(final_of(runs["lora-zero2-sago"])), "dtype": "float32"})
    with pytest.raises(InputError, match=r"model\.path: .* holds an adapter"):
        load_model(config, {})


def test_targets_are_linear_layers_and_not_experts(runs: dict[str, dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs["mixtral-pcgrad"]["model"]["path"])
    attach_adapters(model, Lora.model_validate({}))
    adapted = {name.partition(".lora_")[0] for name, tensor in model.named_parameters() if tensor.requires_grad}
    sides = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert adapted == {f"model.layers.{layer}.self_attn.{side}" for layer in (0, 1) for side in sides}
