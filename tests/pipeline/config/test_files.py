"""Recipes and DeepSpeed files by name and by path, from any folder; an error names the path that was tried."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import yaml

from eval.frontier import parse_command_line as parse_sweep
from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.files import DEEPSPEED_FILES, RECIPES
from pipeline.config.load import parse_command_line, resolve
from pipeline.config.schema import REPOSITORY
from pipeline.errors import InputError

RECIPE_NAMES = [
    "bios",
    "custom",
    "muse_books",
    "muse_news",
    "rwku_batch50",
    "rwku_llama31_8b",
    "rwku_qwen3_8b",
    "tofu",
    "tofu_llama31_8b",
    "tofu_llama32_1b",
    "tofu_llama32_3b",
    "tofu_smollm2",
    "wmdp_bio",
    "wmdp_bio_deepseek_v2_lite",
    "wmdp_bio_llama31_8b",
    "wmdp_bio_qwen3_8b",
    "wmdp_cyber",
    "wmdp_cyber_llama31_8b",
    "wmdp_cyber_qwen3_8b",
]
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_hpz": 3, "zero3_offload": 3, "zero3_nvme": 3, "cpu": 3}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of these tests: not the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*arguments: str) -> str:
    with pytest.raises(InputError) as error:
        deepspeed_config(parse_command_line(arguments)[0])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_is_found_by_its_name_and_by_its_path_in_a_clone(name: str) -> None:
    raw = yaml.safe_load((REPOSITORY / "launch" / "recipes" / f"{name}.yaml").read_text())
    method = next(iter(raw["methods"]))
    for given in (name, f"launch/recipes/{name}.yaml", str(REPOSITORY / "launch" / "recipes" / f"{name}.yaml")):
        config = resolve(given, method, reads_data=False)
        assert config.model.path == raw["methods"][method].get("model", raw["model"])["path"]
        assert config.seed == raw["seed"] and config.method == method


def test_a_sweep_finds_a_recipe_by_its_name(elsewhere: Path) -> None:
    line = ["--config", "tofu_smollm2", "--methods", "npo_sum", "--suite", "probes", "--output", str(elsewhere)]
    plan, presets = parse_sweep(line)
    assert plan.config == REPOSITORY / "launch" / "recipes" / "tofu_smollm2.yaml" and "npo_sum" in presets["methods"]


@pytest.mark.parametrize("name", STAGES)
def test_a_deepspeed_file_is_found_by_its_name_and_by_its_path_in_a_clone(name: str) -> None:
    paths = (name, f"ds_configs/{name}.json", str(REPOSITORY / "ds_configs" / f"{name}.json"))
    for given in paths:
        config = resolve("tofu", "npo_sago", ["--train.deepspeed", given])
        assert deepspeed_config(config)["zero_optimization"]["stage"] == STAGES[name]


def test_the_shipped_names_are_those_of_the_folders() -> None:
    assert RECIPES.names() == RECIPE_NAMES and DEEPSPEED_FILES.names() == sorted(STAGES)


def test_a_path_is_relative_to_the_working_folder_and_wins_over_a_shipped_file(elsewhere: Path) -> None:
    """Also inside the YAML, wherever that file lies."""
    (elsewhere / "ds_configs").mkdir()
    (elsewhere / "ds_configs" / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    (elsewhere / "rows.jsonl").write_text('{"text": "a"}\n')
    (elsewhere / "folder").mkdir()
    (elsewhere / "folder" / "my.yaml").write_text(
        "output: run\nmodel: {path: m}\ntrain: {deepspeed: ds_configs/zero3.json}\n"
        "data: {forget: {path: rows.jsonl}, retain: {path: rows.jsonl}}\n"
    )
    config = resolve("folder/my.yaml")
    assert deepspeed_config(config)["zero_optimization"]["stage"] == 1
    assert config.output == "run"


def test_an_error_names_the_absolute_path_that_was_tried(elsewhere: Path) -> None:
    (elsewhere / "my.yaml").write_text("output: run\nmodel: {path: m}\ndata: {forget: {path: no.jsonl}}\n")
    tofu = ("--config", "tofu", "--method", "npo_sago")
    for arguments, expected in (
        (("--config", "no/my.yaml"), ("--config", "no/my.yaml", "tofu")),
        (("--config", "tofuu"), ("--config", "tofuu", "tofu")),
        (("--config", "."), ("--config", "folder")),
        (("--config", "launch/recipes/no.yaml"), ("--config", "launch/recipes/no.yaml")),
        (("--config", "my.yaml", "--objective.retain", "none"), ("data.forget.path", "no.jsonl")),
        ((*tofu, "--data.forget.refusals", "no.txt"), ("data.forget.refusals", "no.txt")),
        ((*tofu, "--train.deepspeed", "zero4"), ("train.deepspeed", "zero4", "zero3_hpz")),
        ((*tofu, "--train.deepspeed", "no/zero3.json"), ("train.deepspeed", "no/zero3.json", "zero3_hpz")),
    ):
        message = refusal(*arguments)
        assert expected[0] in message and str(elsewhere / expected[1].replace("folder", "")) in message, message
        assert all(part in message for part in expected), message


def test_the_packages_of_an_installation_are_the_folders_of_the_repository() -> None:
    """A folder that is missing from the list would be missing from an installation."""
    packaging = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        str(file.parent.relative_to(REPOSITORY)).replace("/", ".")
        for root in ("pipeline", "eval")
        for file in (REPOSITORY / root).rglob("*.py")
    }
    shipped = {"pipeline.recipes": RECIPES.folder, "pipeline.ds_configs": DEEPSPEED_FILES.folder}
    assert set(packaging["packages"]) == folders | shipped.keys()
    assert packaging["package-dir"] == shipped
    for name, patterns in packaging["package-data"].items():
        folder = REPOSITORY / (shipped[name] if name in shipped else name.replace(".", "/"))
        assert {file for pattern in patterns for file in folder.glob(pattern)}, name
    others = {file for root in ("pipeline", "eval") for file in (REPOSITORY / root).rglob("*.*") if file.is_file()}
    others = {file for file in others if file.suffix not in (".py", ".pyc")}
    assert {file.name for file in others} <= {name for names in packaging["package-data"].values() for name in names}
