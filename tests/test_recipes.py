"""Every method of every recipe is resolved; each pair of objectives does two steps on a tiny model of its architecture.

Excerpts of the real benchmarks (tests/data) are the corpora of RWKU and TOFU; the others are made here in their form.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.load import resolve
from pipeline.config.schema import REPOSITORY, RunConfig
from tests.conftest import World
from tests.distributed import run_distributed

ROWS = REPOSITORY / "tests" / "data"
RECIPES = sorted(file.stem for file in (REPOSITORY / "launch" / "recipes").glob("*.yaml"))
ARCHITECTURES = {  # else Llama
    **{"wmdp_bio": "mistral", "wmdp_cyber": "mistral", "custom": "qwen2", "wmdp_bio_qwen3_8b": "qwen3"},
    **{"wmdp_cyber_qwen3_8b": "qwen3", "rwku_qwen3_8b": "qwen3", "wmdp_bio_deepseek_v2_lite": "deepseek_v2"},
}
OF_A_MODEL = ("qwen3", "deepseek_v2")  # their recipes have the objectives of others
REAL: dict[str, tuple[str, str]] = {
    "rwku_batch50": ("rwku/Batch/1-50/passage.json", "rwku/Batch/1-50/retain_passage.json"),
    **dict.fromkeys(
        ("rwku_llama31_8b", "rwku_qwen3_8b"),
        ("rwku/Batch/1-50/passage.json", "rwku/Batch/1-50/retain_passage.json"),
    ),
    **dict.fromkeys(
        ("tofu", "tofu_smollm2", "tofu_llama32_1b", "tofu_llama32_3b", "tofu_llama31_8b"),
        ("tofu/forget01.json", "tofu/retain99.json"),
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    recipe: yaml.safe_load((REPOSITORY / "launch" / "recipes" / f"{recipe}.yaml").read_text())["methods"]
    for recipe in RECIPES
}
CASES = [
    (recipe, method)
    for recipe in RECIPES
    for method, keys in METHODS[recipe].items()
    if not keys.get("model", {}).get("load_in_4bit")  # which needs a package: tests/pipeline/modeling/test_four_bits.py
]


def make_model(architecture: str, world: World, folder: Path) -> Path:
    """A tiny untrained model with the fixture's tokenizer; three blocks, so that RMU has two to train below it."""
    import torch
    from transformers import (
        AutoTokenizer,
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    experts: dict[str, Any] = {  # the first block is dense
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
        **{"first_k_dense_replace": 1, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    }
    kinds: dict[str, Any] = {
        "mistral": lambda: MistralForCausalLM(MistralConfig(**shape)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8)),
        "deepseek_v2": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**{**shape, **experts})),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
    }
    torch.manual_seed(0)
    kinds[architecture]().save_pretrained(folder / architecture)
    tokenizer.save_pretrained(folder / architecture)
    return folder / architecture


def corpora(recipe: str, keys: dict[str, Any], world: World, folder: Path) -> dict[str, Path]:
    """Files with the columns that the recipe names."""
    found = {}
    for number, task in enumerate(("forget", "retain")):
        if recipe in REAL:
            found[task] = ROWS / REAL[recipe][number]
            continue
        columns = [keys["data"][task].get(key) for key in ("field", "prompt", "response")]
        rows = [{name: text for name in columns if name} for text in world.documents(task)]
        found[task] = folder / f"{recipe}-{task}.jsonl"
        found[task].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def train_all(configs: list[RunConfig]) -> None:
    from pipeline.trainer import run

    for config in configs:
        run(config, deepspeed_config(config))


def composition(config: RunConfig) -> str:
    """What code a run goes through: two methods that differ in numbers or paths alone have the same."""
    objective, synthesis, data = config.objective, config.synthesis, config.data
    columns = [getattr(corpus, "columns", None) for corpus in (data.forget, data.retain)]
    kind = Path(config.model.path).name, config.model.lora, config.model.trainable != [".*"], data.packing, columns
    return repr((objective.forget, objective.retain, synthesis.rule, synthesis.scope, synthesis.geometry, *kind))


@pytest.fixture(scope="module")
def configs(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """Every method of every recipe, resolved for two steps on a tiny model: one of each composition."""
    folder = tmp_path_factory.mktemp("recipes")
    models = {name: make_model(name, world, folder) for name in ("llama", *dict.fromkeys(ARCHITECTURES.values()))}
    files: dict[str, dict[str, Path]] = {}
    cases: dict[str, RunConfig] = {}
    for recipe, method in CASES:
        file = REPOSITORY / "launch" / "recipes" / f"{recipe}.yaml"
        keys = yaml.safe_load(file.read_text())
        files.setdefault(recipe, corpora(recipe, keys, world, folder))
        settings = {
            "output": folder / recipe / method,
            "cache": folder / "cache",
            "model.path": models[ARCHITECTURES.get(recipe, "llama")],
            "model.dtype": "float32",
            # A question and its answer, letter by letter; or a text.
            "data.max_length": 256 if "prompt" in keys["data"]["forget"] else 24,
            "data.forget.path": files[recipe]["forget"],
            "data.retain.path": files[recipe]["retain"],
            "train.steps": 2,
            "train.epochs": "null",
            "train.batch_size": 4,
            "train.micro_batch_size": 2,
            "train.export_every": 0,
            "train.checkpoint_every": 0,
            "train.deepspeed": "ds_configs/cpu.json",
        }
        for name in (*files[recipe], *(f"probes.{one}" for one in keys["data"].get("probes", {}))):
            settings[f"data.{name}.split"] = "train"
            if name.startswith("probes."):
                settings[f"data.{name}.path"] = files[recipe]["retain"]
        if keys["methods"][method].get("objective", {}).get("layer"):
            settings["objective.layer"] = 2
        config = resolve(file, method, [part for key, value in settings.items() for part in (f"--{key}", str(value))])
        assert deepspeed_config(config)["zero_optimization"]["stage"] == 3, (recipe, method)
        cases.setdefault(composition(config), config)
    assert 50 < len(cases) < len(CASES)
    return [*cases.values()]


def of_each_objective(configs: list[RunConfig]) -> list[RunConfig]:
    """One of each pair of objectives on each architecture, with the rule that is least often among those before it; of
    the architectures in OF_A_MODEL one run each."""
    groups: dict[tuple[str, ...], list[RunConfig]] = {}
    for config in configs:
        architecture = Path(config.model.path).name
        objectives = () if architecture in OF_A_MODEL else (config.objective.forget, config.objective.retain)
        key = *objectives, architecture
        groups.setdefault(key, []).append(config)
    chosen, rules = [], Counter[str]()
    for group in groups.values():
        chosen.append(min(group, key=lambda config: rules[config.synthesis.rule]))
        rules[chosen[-1].synthesis.rule] += 1
    return chosen


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "more"])
def test_every_method_of_every_recipe_trains(more: bool, configs: list[RunConfig]) -> None:
    """few: see `of_each_objective`; more: the other compositions, of rule, columns and packing."""
    few = of_each_objective(configs)
    chosen = [config for config in configs if config not in few] if more else few
    assert {config.synthesis.rule for config in few} == {config.synthesis.rule for config in configs}
    with ThreadPoolExecutor(2) as pool:  # a rank each
        halves = [pool.submit(run_distributed, train_all, 1, chosen[first::2], timeout=900) for first in (0, 1)]
        for half in halves:
            half.result()
    for config in chosen:
        run = Path(config.output)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["step"]]  # row 0 is a probe
        assert [step["skipped"] for step in steps] == [0, 0], run
        for task in ("forget", "retain"):
            assert (steps[0][f"{task}_loss"] is not None) == (task in config.tasks), run
        assert (run / "final" / "README.md").is_file(), run


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("wmdp_bio", "truncate"), ("wmdp_cyber", "truncate"), ("rwku_batch50", "truncate")],
)
def test_recipes_of_the_paper_leave_out_what_fills_no_block(recipe: str, expected: str) -> None:
    raw = yaml.safe_load((REPOSITORY / "launch" / "recipes" / f"{recipe}.yaml").read_text())
    assert raw["data"]["packing"] == "blocks" and raw["data"]["long_documents"] == expected


def test_the_recipe_for_an_own_corpus_leaves_to_the_program_what_depends_on_text_model_and_machine() -> None:
    recipe = REPOSITORY / "launch" / "recipes" / "custom.yaml"
    assert yaml.safe_load(recipe.read_text())["train"]["deepspeed"] == "auto"
    for method in ("sago", "lora_sago"):
        config = resolve(recipe, method, [], reads_data=False)
        assert (config.data.packing, config.optimizer.lr) == ("auto", None), method
        assert config.data.retain is not None and config.data.retain.heldout == 0.05
        assert config.train.steps == 100 and config.data.long_documents == "split"


# (learning rate, steps, β, α, γ) in the tables that the paper's authors ran; None where a method has no β.
PUBLISHED: dict[tuple[str, str], tuple[float, int, float | None, float, float]] = {
    ("wmdp_bio", "ga"): (5e-7, 100, None, 1.0, 1.0),
    ("wmdp_cyber", "ga"): (5e-7, 100, None, 1.0, 1.0),
    ("wmdp_bio", "ga_sago"): (1e-5, 500, None, 0.5, 1.0),
    ("wmdp_cyber", "ga_sago"): (1e-5, 500, None, 1.0, 1.0),
    ("wmdp_bio", "npo_sago"): (1e-5, 150, 1e-4, 1.0, 0.1),
    ("wmdp_cyber", "npo_sago"): (1e-5, 300, 1e-3, 0.1, 1.0),
}


@pytest.mark.parametrize(("recipe", "method"), PUBLISHED)
def test_recipes_keep_the_numbers_of_the_papers_code(recipe: str, method: str) -> None:
    """Spot checks, one of each kind of entry."""
    config = resolve(REPOSITORY / "launch" / "recipes" / f"{recipe}.yaml", method)
    lr, steps, beta, alpha, gamma = PUBLISHED[recipe, method]
    assert (config.optimizer.lr, config.train.steps) == (lr, steps)
    assert (config.synthesis.alpha, config.synthesis.gamma) == (alpha, gamma)
    assert beta is None or config.objective.beta == beta


CARRIED = {  # recipe for another model -> the recipe of the paper whose values it has
    **{
        f"wmdp_{domain}_{model}": f"wmdp_{domain}"
        for domain in ("bio", "cyber")
        for model in ("llama31_8b", "qwen3_8b")
    },
    **{"wmdp_bio_deepseek_v2_lite": "wmdp_bio", "rwku_llama31_8b": "rwku_batch50", "rwku_qwen3_8b": "rwku_batch50"},
}


@pytest.mark.parametrize("recipe", CARRIED)
def test_a_recipe_for_another_model_differs_in_the_model_alone(recipe: str) -> None:
    methods = [method for name, method in CASES if name == recipe]
    assert {"ga_sum", "npo_pcgrad", "simnpo_sago"} <= {*methods}
    for method in methods:
        own, papers = (resolve(name, method, reads_data=False).model_dump() for name in (recipe, CARRIED[recipe]))
        assert own["model"]["path"] != papers["model"]["path"] and own["output"] == f"runs/{recipe}/{method}"
        if recipe == "wmdp_bio_deepseek_v2_lite":
            assert own["model"].pop("trainable") != papers["model"].pop("trainable")
        for config in (own, papers):
            del config["model"]["path"], config["output"]
        assert own == papers, method


@pytest.mark.parametrize("recipe", ["tofu_llama32_1b", "tofu_llama32_3b", "tofu_llama31_8b"])
def test_tofu_has_the_tuned_values(recipe: str) -> None:
    """As published for the plain sum: learning rate, beta, margin, weights, epochs."""
    npo, simnpo = (resolve(recipe, method) for method in ("npo_sum", "simnpo_sum"))
    assert (npo.optimizer.lr, npo.objective.beta, npo.synthesis.alpha, npo.train.epochs) == (2e-5, 0.1, 1.0, 10)
    assert (simnpo.optimizer.lr, simnpo.objective.beta, simnpo.objective.delta) == (5e-5, 3.5, 1.0)
    assert (simnpo.synthesis.gamma, simnpo.synthesis.alpha, npo.synthesis.gamma) == (0.125, 1.0, 1.0)


def test_routers_do_not_train(configs: list[RunConfig]) -> None:
    """All tensors of a mixture of experts but the routers, by their names in a model of its architecture."""
    config = next(one for one in configs if Path(one.model.path).name == "deepseek_v2")
    with safe_open(f"{config.model.path}/model.safetensors", "np") as weights:
        names = [*weights.keys()]
    frozen = {name for name in names if not any(re.search(pattern, name) for pattern in config.model.trainable)}
    assert frozen == {"model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.weight"}
