"""Weights come whole from their files, and go back under the names that they came with, whatever the model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import run as evaluation
from eval.files import exit_status
from eval.loading import load
from pipeline.config.schema import Model
from pipeline.distributed import errors as rank_errors
from pipeline.distributed import process_group
from pipeline.errors import InputError
from pipeline.modeling.export import export
from pipeline.modeling.load import load_model
from tests.conftest import World
from tests.distributed import run_distributed
from tests.interrupted import Copied
from tests.kinds import KINDS, LAYOUTS, make_kind

STAGES = {
    stage: {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "bf16": {"enabled": False}}
    for stage in (2, 3)
}


def named(folder: Path) -> Model:
    return Model.model_validate({"path": str(folder), "dtype": "float32"})


# -- names -------------------------------------------------------------------------------------------------------------


def export_all(folder: Path, tokenizer: str) -> None:
    """On every rank: what was loaded under each stage, exported again."""
    process_group.start()
    for name in (*KINDS, *LAYOUTS):
        for stage, zero in STAGES.items():
            model = load_model(named(folder / name), zero)
            export(model, AutoTokenizer.from_pretrained(tokenizer), folder / f"{name}-{stage}")


@pytest.fixture(scope="module")
def exported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    for name in (*KINDS, *LAYOUTS):
        make_kind(name, folder / name)
    run_distributed(export_all, 2, folder, str(world.folder / "model"))
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*KINDS, *LAYOUTS])
def test_an_export_has_the_names_and_tensors_of_its_source(name: str, stage: int, exported: Path) -> None:
    source, made = (load_file(exported / each / "model.safetensors") for each in (name, f"{name}-{stage}"))
    assert set(made) == set(source)
    assert all(made[name].equal(tensor) for name, tensor in source.items())


# -- tensors that are not there, or not the model's ------------------------------------------------------------------

Tensors = dict[str, Tensor]
HEAD, LAST = "lm_head.weight", "model.layers.1."
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "without output layer": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != HEAD},
        ("1 missing", HEAD),
    ),
    "without a block": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(LAST)},
        ("9 missing", f"{LAST}input_layernorm.weight", f"{LAST}mlp.down_proj.weight", "…"),
    ),
    "with a foreign prefix": (
        lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
        ("21 missing", "21 unexpected", HEAD, "remove '_orig_mod.'"),
    ),
    "with a block too many": (
        lambda tensors: {**tensors, "model.layers.2.mlp.up_proj.weight": tensors[f"{LAST}mlp.up_proj.weight"].clone()},
        ("1 unexpected", "model.layers.2.mlp.up_proj.weight"),
    ),
    "with another vocabulary": (lambda tensors: {**tensors, HEAD: tensors[HEAD][:-1].clone()}, (HEAD, "299", "300")),
}
SOUND: dict[str, Callable[[Tensors], Tensors]] = {
    "with an old buffer": lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "without prefix": lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
}


def rewritten(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of `source` with other tensors."""
    shutil.copytree(source, folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_broken(folder: Path, tied: Path, messages: Path) -> None:
    """On every rank: all under both stages; the refusals are written down."""
    process_group.start()
    found = {}
    for stage, zero in STAGES.items():
        for name in BROKEN:
            with pytest.raises(InputError) as refusal, rank_errors.raise_on_all_ranks():
                load_model(named(folder / name), zero)
            found[f"{name}-{stage}"] = str(refusal.value)
        for path in (*(folder / name for name in SOUND), tied):
            load_model(named(path), zero)
    if dist.get_rank() == 0:
        messages.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def broken(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models that differ from that of `world` in their tensors."""
    folder = tmp_path_factory.mktemp("broken")
    for name, change in {**{name: change for name, (change, _) in BROKEN.items()}, **SOUND}.items():
        rewritten(world.folder / "model", folder / name, change)
    return folder


@pytest.fixture(scope="module")
def refusals(world: World, broken: Path) -> dict[str, str]:
    assert HEAD not in load_file(world.folder / "tied" / "model.safetensors")
    run_distributed(load_broken, 2, broken, world.folder / "tied", broken / "messages.json")
    return json.loads((broken / "messages.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_are_not_the_models_are_refused_by_name(name: str, stage: int, refusals: dict[str, str]) -> None:
    message = refusals[f"{name}-{stage}"]
    assert message.startswith("model.path: ") and "\n" not in message
    for part in BROKEN[name][1]:
        assert part in message


def test_an_evaluation_refuses_them_too(world: World, broken: Path, tmp_path: Path) -> None:
    for name, (_, parts) in BROKEN.items():
        with pytest.raises(InputError) as refusal:
            load(broken / name)
        for part in parts:
            assert part in str(refusal.value)
    for name in SOUND:
        load(broken / name)
    run_distributed(evaluate_sharded, 2, broken, timeout=100)


def evaluate_sharded(folder: Path) -> None:
    process_group.start()
    for name in BROKEN:
        try:
            with rank_errors.raise_on_all_ranks():
                try:
                    load(folder / name, STAGES[3])
                except InputError as error:
                    raise InputError(str(error)) from None
        except InputError as error:
            assert all(part in str(error) for part in BROKEN[name][1]), error
        else:
            raise AssertionError(name)


def test_an_adapter_and_its_base_are_looked_at_alike(world: World, broken: Path, tmp_path: Path) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    AutoTokenizer.from_pretrained(world.folder / "model").save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(load(tmp_path / "adapter")[0](tokens).logits, adapted(tokens).logits, rtol=0, atol=1e-6)

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"adapter are not .* 1 missing .*1\.self_attn\.q_proj\.lora_B"):
        load(tmp_path / "adapter")

    save_file(tensors, file, metadata={"format": "pt"})
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": str(broken / "without output layer")}
    config.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"without output layer are not .* 1 missing \(lm_head\.weight\)"):
        load(tmp_path / "adapter")

    gone = tmp_path / "of another machine" / "model"
    config.write_text(json.dumps(settings | {"base_model_name_or_path": str(gone)}))
    with pytest.raises(InputError, match=rf"{config}.*base_model_name_or_path.*{gone}") as refusal:
        load(tmp_path / "adapter")
    assert "Repo id" not in str(refusal.value) and "export it again" not in str(refusal.value)


def test_the_commands_end_with_status_2(
    world: World, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And one line, and nothing written."""
    model = broken / "without output layer"
    config = world.write(tmp_path / "run.yaml", tmp_path / "run", model={"path": str(model)})
    shutil.copy(world.folder / "forget.jsonl", tmp_path)
    shutil.copy(world.folder / "retain.jsonl", tmp_path)
    statuses, of_training = Copied(config, ranks=1).ended()
    assert statuses == {2}, of_training[-3000:]
    evaluate = ["run.py", "--model", str(model), "--suite", "corpus", "--data", str(tmp_path), "--output"]
    monkeypatch.setattr(sys, "argv", [*evaluate, str(tmp_path / "answer.json")])
    capfd.readouterr()
    assert exit_status(evaluation.main) == 2
    for stderr in (of_training, capfd.readouterr().err):
        (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert "1 missing (lm_head.weight)" in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "answer.json").exists()


# -- files of another user ---------------------------------------------------------------------------------------------


def test_an_export_may_be_read_as_the_umask_says(exported: Path, world: World) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for file in (exported / "llama-2").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name


def test_files_of_another_user_are_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root may read everything: what the system answers to others is put in its place."""
    locked = world.folder / "model" / "model.safetensors"
    monkeypatch.setattr("os.access", lambda file, mode: Path(file) != locked)
    with pytest.raises(InputError, match=r"model\.path: .*model\.safetensors is not readable for this user; .*chmod"):
        load_model(named(world.folder / "model"), {})
    with pytest.raises(InputError, match=r"model\.safetensors is not readable for this user; .*chmod"):
        load(world.folder / "model")
