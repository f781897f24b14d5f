"""Dropout is off unless the run asks for it; where it is on, the reference is still computed without it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MptConfig

from pipeline.config.schema import Model
from pipeline.errors import InputError
from pipeline.modeling.dropout import set_dropout
from pipeline.modeling.load import load_model
from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MLP = {**SHAPE, "intermediate_size": 48}
OPT = {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32}
ATTENTION = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
DBRX = {
    **{"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "attn_config": ATTENTION},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
}
GPT_NEO = {**MLP, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
# Name of the configuration class, its keys, and the model's own rates: of elements, and of whole layers.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "gpt2": ("GPT2Config", SHAPE, {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    "opt": ("OPTConfig", OPT, {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.4}),
    "phi": ("PhiConfig", MLP, {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
    "llama": ("LlamaConfig", MLP, {"attention_dropout": 0.1}),
    "falcon": ("FalconConfig", SHAPE, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "bloom": ("BloomConfig", SHAPE, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "dbrx": ("DbrxConfig", DBRX, {"resid_pdrop": 0.1, "attn_config.attn_pdrop": 0.1}),  # a configuration in another
    "gpt_neo": ("GPTNeoConfig", GPT_NEO, {"resid_dropout": 0.1, "embed_dropout": 0.1, "attention_dropout": 0.1}),
    "gpt_neox": ("GPTNeoXConfig", MLP, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "starcoder2": ("Starcoder2Config", MLP, {"residual_dropout": 0.1, "embedding_dropout": 0.1}),
    "biogpt": ("BioGptConfig", MLP, {"hidden_dropout_prob": 0.1, "activation_dropout": 0.1, "layerdrop": 0.4}),
}


def at(shape: Any, key: str) -> tuple[Any, str]:
    *parts, name = key.split(".")
    for part in parts:
        shape = getattr(shape, part)
    return shape, name


def make(name: str, folder: Path, vocabulary: int = 64) -> Path:
    import transformers

    kind, shape, rates = KINDS[name]
    config = getattr(transformers, kind)(**{**shape, "vocab_size": vocabulary})
    for key, rate in rates.items():
        setattr(*at(config, key), rate)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder / name


def load_each(folder: str) -> None:
    """What each kind of model computes in training, by the rate that the run asks for; see the test below."""
    from pipeline.distributed import process_group as ranks

    ranks.start()
    ids = torch.arange(1, 61).view(4, 15)
    for name, (_, _, rates) in KINDS.items():
        path = str(Path(folder, name))
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for rate in (0.0, None, 0.3):
            model = load_model(Model(path=path, dtype="float32", dropout=rate), {})  # pyright: ignore
            with torch.no_grad():
                first, second, right = (m(input_ids=ids).logits for m in (model, model, plain))
            assert torch.equal(first, right) == torch.equal(first, second) == (rate == 0.0), (name, rate)
            model.save_pretrained(Path(folder, "exported", name))
            exported = AutoConfig.from_pretrained(Path(folder, "exported", name))
            assert {key: getattr(*at(exported, key)) for key in rates} == rates, (name, rate)
            modules = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
            if rate is not None:
                assert {module.p for module in modules} <= {rate}, name
                inner: Any = model.get_decoder()  # whole layers are kept: their number would be another every time
                assert getattr(inner, "layerdrop", 0.0) == 0.0, name


def test_the_rate_of_the_run_is_that_of_the_model_and_the_export_keeps_its_own(tmp_path: Path) -> None:
    for name in KINDS:
        make(name, tmp_path)
    run_distributed(load_each, 1, str(tmp_path))


def test_a_rate_that_the_configuration_of_the_model_refuses() -> None:
    """transformers has an integer for MPT's dropout."""
    assert set_dropout(MptConfig(), 0.0).attn_config.attn_pdrop == 0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match=r"model\.dropout: attn_pdrop of mpt does not take 0\.3"):
        set_dropout(MptConfig(), 0.3)


def train_watched(configurations: list[dict[str, Any]], report: str) -> None:
    """Run each. Report, of every forward pass on rank 0, [whether it builds a graph, whether dropout is on]."""
    from pipeline import trainer
    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig

    load, passes = trainer.load_model, []

    def load_and_watch(*arguments: Any) -> Any:
        made = load(*arguments)

        def note(module: Any, inputs: Any) -> None:
            passes.append([torch.is_grad_enabled(), any(part.training for part in module.modules())])

        made.base_model.register_forward_pre_hook(note)
        return made

    trainer.load_model = load_and_watch
    for keys in configurations:
        config = RunConfig.model_validate(keys)
        trainer.run(config, deepspeed_config(config))
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(passes))


def with_gpt2(world: World, folder: Path, name: str, **model: Any) -> dict[str, Any]:
    """NPO beside KL on a GPT-2 with its stock dropout of 0.1."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    path = make("gpt2", folder, len(tokenizer))
    tokenizer.save_pretrained(path)
    return world.configuration(
        folder / name,
        cache=str(folder / f"cache-{name}"),
        model={"path": str(path), **model},
        objective={"forget": "npo", "retain": "kl", "beta": 0.1},
        train={"steps": 2},
    )


def first_step(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def test_the_first_npo_loss_is_that_of_a_model_equal_to_its_reference(world: World, tmp_path: Path) -> None:
    """With equal likelihoods the loss is -(2/beta) log sigma(0)."""
    run_distributed(train_watched, 2, [with_gpt2(world, tmp_path, "run")], str(tmp_path / "passes.json"))
    step = first_step(tmp_path / "run")
    assert step["forget_loss"] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)
    assert abs(step["retain_loss"]) < 1e-6
    shape = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert shape["resid_pdrop"] == shape["embd_pdrop"] == shape["attn_pdrop"] == 0.1


def test_the_reference_is_computed_in_eval_mode_and_training_in_train_mode(world: World, tmp_path: Path) -> None:
    cases = [with_gpt2(world, tmp_path, "stock", dropout=None), with_gpt2(world, tmp_path, "much", dropout=0.5)]
    run_distributed(train_watched, 1, cases, str(tmp_path / "passes.json"))
    passes = json.loads((tmp_path / "passes.json").read_text())
    with_graph, without = ([on for graph, on in passes if graph is wanted] for wanted in (True, False))
    assert len(with_graph) == 2 * 2 * 2 * 6, "runs, steps, tasks, micro-batches"
    assert all(with_graph)
    assert len(without) > 2 * 2 * 6, "the reference of kl, a batch at a time, and that of npo before"
    assert not any(without)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    for name in ("stock", "much"):
        (file,) = (tmp_path / f"cache-{name}" / "reference").iterdir()
        known = load_file(file)["nll"]
        for index, text in enumerate(world.documents("forget")):
            if not torch.isnan(known[index]):
                ids = tokenizer(text, truncation=True, max_length=24).input_ids
                with torch.no_grad():
                    assert known[index].item() == pytest.approx(oracle.nll_of(model, ids).sum().item(), rel=1e-5)
        step = first_step(tmp_path / name)
        assert step["forget_loss"] != pytest.approx(2 / 0.1 * math.log(2), rel=1e-3), "the model itself drops elements"
        assert step["retain_loss"] > 1e-4
