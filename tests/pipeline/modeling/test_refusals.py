"""Models and options that are refused before training, with the key and the remedy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
)

from pipeline.config.schema import REPOSITORY, Lora, Model
from pipeline.errors import InputError
from pipeline.modeling.checks import check_router_loss, load_model_config, load_tokenizer
from pipeline.modeling.load import load_model
from pipeline.modeling.lora import attach_adapters
from tests.conftest import World
from tests.distributed import run_distributed


def test_targets_that_name_nothing(world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    lora = Lora.model_validate({"targets": ["q_proj", "query"]})
    with pytest.raises(InputError, match=r"model\.lora\.targets: 'query' matches no linear layer.* q_proj") as error:
        attach_adapters(model, lora)
    assert "\n" not in str(error.value)


def test_an_adapter_on_a_tied_output_layer_cannot_be_merged(world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.folder / "tied")
    lora = Lora.model_validate({"targets": ["lm_head"], "merge": True})
    with pytest.raises(InputError, match=r"model\.lora\.merge: 'lm_head' shares its weights"):
        attach_adapters(model, lora)


@pytest.mark.parametrize("attention", ["flash_attention_2", "nonsense"])
def test_attention_that_cannot_be_had(attention: str, world: World) -> None:
    config = Model.model_validate({"path": str(world.folder / "model"), "attn_implementation": attention})
    with pytest.raises(InputError, match=r"model\.attn_implementation: ") as error:
        load_model(config, {})
    assert "\n" not in str(error.value) and attention in str(error.value)


def test_a_load_balancing_loss_that_a_model_asks_for_is_not_dropped_without_a_word(tmp_path: Path) -> None:
    def check(**keys: Any) -> None:
        MixtralConfig(**keys).save_pretrained(tmp_path)
        check_router_loss(Model(path=str(tmp_path)))  # pyright: ignore[reportCallIssue]

    check()
    check(output_router_logits=True, router_aux_loss_coef=0.0)
    with pytest.raises(InputError, match=r"load-balancing loss .*set output_router_logits to false"):
        check(output_router_logits=True, router_aux_loss_coef=0.02)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "mxfp4", "compressed-tensors"])
@pytest.mark.parametrize("section", [None, "text_config"])
def test_quantised_weights_are_refused_by_their_name(
    method: str, section: str | None, world: World, tmp_path: Path
) -> None:
    """And not by the package that would be needed next, or by tensors of scales that the model does not have."""
    shape: dict[str, Any] = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    if section is None:
        shape = json.loads((world.folder / "model" / "config.json").read_text())
    (shape if section is None else shape[section])["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(InputError, match=rf"model\.path: .*quantised.*{method}.*model\.load_in_4bit") as error:
        load_model_config(Model(path=str(tmp_path)))  # pyright: ignore[reportCallIssue]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lora", [None, {"r": 2, "merge": True}])
def test_a_model_that_could_not_be_written_again_is_refused_before_it_trains(
    lora: dict[str, Any] | None, world: World, tmp_path: Path
) -> None:
    """transformers reads this configuration, and refuses to write it: the export failed, when all steps were done."""
    shutil.copytree(world.folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"output_attentions": True}))
    keys = {"path": str(tmp_path / "model"), "lora": lora}
    with pytest.raises(InputError, match=r"model\.path: .*output_attentions.*in a copy of the model") as error:
        load_model(Model.model_validate(keys), {})
    assert "\n" not in str(error.value)


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    def save_vocabulary(self, directory):  # of an older transformers, which gave it no prefix
        return ()
    def _save_pretrained(self, *given, **named):
        return self.save_vocabulary(*given, **named)
"""


def test_so_is_a_tokenizer(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.folder / "model", folder)
    (folder / "own.py").write_text(OWN_TOKENIZER)
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    model = {"path": str(folder), "trust_remote_code": True, "lora": {"r": 2}}
    config = world.write(tmp_path / "run.yaml", tmp_path / "run", model=model, train={"steps": 1})
    line = [sys.executable, "-m", "pipeline.train", "--config", str(config)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert re.search(r"^error: model\.path: .*tokenizer.*save_vocabulary.*$", done.stderr, re.MULTILINE), done.stderr
    assert not (tmp_path / "run").exists()


def test_pickles_and_code_of_a_model_are_refused_unless_asked_for(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(world.folder / "model", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pickled.*safetensors.*model\.allow_pickle"):
        load_model(Model(path=str(folder)), {})  # pyright: ignore[reportCallIssue]
    run_distributed(load_alone, 1, str(folder))
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"model_type": "stranger", "auto_map": {"AutoConfig": "strange.Config"}}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="trust_remote_code"):
        load_tokenizer(Model(path=str(folder)))  # pyright: ignore[reportCallIssue]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["./typo", "../typo", "typo/", "runs/deep/typo", "runs/typo", "typo"])
def test_a_folder_that_is_missing_is_named_where_it_was_looked_for(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its name could be one of the hub's: `runs` is here, `runs/typo` is not."""
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError) as caught:
        load_model_config(Model(path=path))  # pyright: ignore[reportCallIssue]
    tried = f"{tmp_path}/here/{path.removeprefix('./').removesuffix('/')}"
    assert str(caught.value).startswith(f"model.path: there is no folder {tried}"), caught.value
    could_be_a_name = path in ("runs/typo", "typo")
    assert (f", and {path!r} cannot be had from the hub: " in str(caught.value)) == could_be_a_name
    assert could_be_a_name or "owner/name" in str(caught.value)


def test_a_folder_without_a_model_is_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"model.path: '{tmp_path}' is not the folder of a model: "):
        load_model_config(Model(path=str(tmp_path)))  # pyright: ignore[reportCallIssue]


def load_alone(folder: str) -> None:
    from pipeline.distributed import process_group as ranks

    ranks.start()
    load_model(Model(path=folder, allow_pickle=True), {})  # pyright: ignore[reportCallIssue]
