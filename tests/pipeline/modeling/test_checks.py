"""Tokens that the model does not embed, and tokenizers that cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from eval.loading import load
from pipeline.config.schema import Model
from pipeline.errors import InputError
from pipeline.modeling.checks import load_tokenizer
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.test_sharded import train_cases


def with_added(world: World, folder: Path, **tokens: Any) -> Path:
    """The model of `world`, 300 rows, with a tokenizer that got another token, of id 300."""
    shutil.copytree(world.folder / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_special_tokens(tokens) == 1 and len(tokenizer) == 301
    tokenizer.save_pretrained(folder)
    return folder


def train_and_be_refused(good: list[dict[str, Any]], bad: dict[str, Any]) -> None:
    """On every rank."""
    train_cases(good)
    with pytest.raises(InputError, match=r"data\.retain: token '<\|user\|>' has id 300, .* has 300 rows"):
        train_cases([bad])
    assert not Path(bad["output"]).exists()


def test_a_pad_token_outside_the_embedding_changes_nothing_and_any_other_is_refused(
    world: World, tmp_path: Path
) -> None:
    padded = with_added(world, tmp_path / "padded", pad_token="<pad>")
    chatty = with_added(world, tmp_path / "chatty", additional_special_tokens=["<|user|>"])
    texts = [*world.documents("retain"), "<|user|> kara lovi"]
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path, train = str(world.folder / "model"), {"steps": 2}
    usual, other = (
        world.configuration(tmp_path / name, model={"path": path, "dtype": "float32"}, train=train)
        for name, path in (("usual", path), ("other", str(padded)))
    )
    bad = world.configuration(tmp_path / "bad", model={"path": str(chatty), "dtype": "float32"}, train=train)
    bad["data"] = {**bad["data"], "retain": {"path": str(tmp_path / "retain.jsonl")}}
    run_distributed(train_and_be_refused, 2, [usual, other], bad, timeout=200)
    expected, made = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("usual", "other"))
    assert all(made[name].equal(tensor) for name, tensor in expected.items())


def test_a_tokenizer_model_alone_asks_for_sentencepiece(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.folder / "model", folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    monkeypatch.setattr("pipeline.modeling.weights.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.path: .*tokenizer\.model alone.* pip install sentencepiece"):
        load_tokenizer(Model.model_validate({"path": str(folder)}))
    with pytest.raises(InputError, match=r"tokenizer\.model alone.* pip install sentencepiece"):
        load(folder)
