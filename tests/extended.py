"""What docs/guides/extending.md adds, on an engine: run by tests/test_extending.py in a copy that has it.

One rank: neither a rule nor an objective knows how many there are, and a second would cost as long again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from pipeline.config.load import resolve
from pipeline.config.schema import REPOSITORY, RunConfig
from tests import oracle, test_recipes
from tests.conftest import World
from tests.pipeline.zero import stages, test_sharded
from tests.toy import Case, train_cases


def train_all(cases: dict[str, Case], made: str, program: list[dict[str, Any]], recipe: list[RunConfig]) -> None:
    train_cases(cases, made)
    test_sharded.train_cases(program)
    test_recipes.train_all(recipe)


def of_recipe(world: World, folder: Path) -> RunConfig:
    """One of the recipe's methods on the tiny model; tests/test_recipes.py would find the others."""
    file = REPOSITORY / "launch" / "recipes" / "cloze.yaml"
    keys = yaml.safe_load(file.read_text())
    files = test_recipes.corpora("cloze", keys, world, folder)
    tiny = {
        "output": folder / "cautious",
        "cache": folder / "cache",
        "model.path": world.folder / "model",
        "model.dtype": "float32",
        "data.forget.path": files["forget"],
        "data.retain.path": files["retain"],
        "train.steps": 2,
        "train.batch_size": 4,
        "train.micro_batch_size": 2,
        "train.deepspeed": "ds_configs/cpu.json",
    }
    return resolve(file, "cautious", [f"--{key}={value}" for key, value in tiny.items()])


def test_the_additions_equal_the_plain_loop_and_the_recipe_trains(world: World, tmp_path: Path) -> None:
    options = stages.RULES["cautious"]
    cases = {"3-small cautious": Case(zero=stages.CONFIGURATIONS["3-small"], micro=4, **options)}
    program = test_sharded.configurations(world, tmp_path)["unlikelihood-pcgrad"]
    (tmp_path / "recipe").mkdir()
    recipe = of_recipe(world, tmp_path / "recipe")
    train_all(cases, str(tmp_path / "made.pt"), [program], [recipe])  # in this process, which does nothing else

    stages.assert_equal_to_plain(torch.load(tmp_path / "made.pt", weights_only=False), cases, 1)
    final = load_file(Path(program["output"]) / "final" / "model.safetensors")
    initial = load_file(world.folder / "model" / "model.safetensors")
    error = oracle.weight_change_error(final, oracle.train(program)[0], initial)
    print(f"unlikelihood-pcgrad: relative error of the weight change {error:.1e}")
    assert error < 2e-5
    assert (Path(recipe.output) / "final" / "model.safetensors").is_file()
