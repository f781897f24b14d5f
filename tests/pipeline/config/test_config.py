"""From text to one checked configuration: values, precedence and defaults, quickly and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config.load import parse_command_line, resolve
from pipeline.config.schema import REPOSITORY, RunConfig
from tests.conftest import processor_seconds
from tests.pipeline.config.base import METHODS, Resolve


def test_defaults_are_the_contracts(config: Resolve) -> None:
    """The configuration that the README documents, key by key, on a machine without a GPU."""
    made = config().model_dump()
    assert made["seed"] == 0
    assert made["model"] == {
        "path": "some/model", "dtype": "float32", "gradient_checkpointing": False, "trainable": [".*"], "lora": None,
        "attn_implementation": None, "torch_compile": False, "trust_remote_code": False, "allow_pickle": False,
        "dropout": 0.0, "load_in_4bit": False,
    }  # fmt: skip
    assert made["data"]["max_length"] == 512 and made["data"]["packing"] == "auto"
    assert made["data"]["forget"]["field"] == made["data"]["retain"]["field"] == "text"
    objective = {"forget": "npo", "retain": "nll", "beta": 0.1, "delta": 0.0, "layer": 7, "steering_coeff": 20.0}
    assert objective.items() <= made["objective"].items()
    assert {"rule": "sago", "alpha": 1.0, "gamma": 1.0}.items() <= made["synthesis"].items()
    assert made["synthesis"]["scope"] in (None, "element")
    assert made["optimizer"] == {
        "name": "adamw", "lr": None, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0,
        "schedule": "linear", "warmup_ratio": 0.1, "max_grad_norm": 1.0,
    }  # fmt: skip
    train = {"steps": 100, "batch_size": 32, "micro_batch_size": 4, "deepspeed": "ds_configs/cpu.json"}
    assert train.items() <= made["train"].items() and made["train"]["checkpoint_every"] == 0


def value_at(made: RunConfig, key: str) -> Any:
    value: Any = made
    for part in key.split("."):
        value = getattr(value, part)
    return value


OVERRIDES: list[tuple[list[str], str, Any]] = [
    (["--train.steps", "7"], "train.steps", 7),
    (["--train.steps=7"], "train.steps", 7),
    (["--optimizer.lr", "1e-5"], "optimizer.lr", 1e-5),
    (["--optimizer.lr=2E-6"], "optimizer.lr", 2e-6),
    (["--optimizer.lr", "3.5e+2"], "optimizer.lr", 350.0),
    (["--optimizer.lr", ".5e-3"], "optimizer.lr", 5e-4),
    (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
    (["--objective.delta", "-0.25"], "objective.delta", -0.25),
    (["--objective.delta", "-1e-3"], "objective.delta", -1e-3),
    (["--objective.delta=-3"], "objective.delta", -3.0),
    (["--optimizer.betas", "[0.8, 0.95]"], "optimizer.betas", [0.8, 0.95]),
    (["--model.trainable", "['layers\\.[12]\\.', lm_head]"], "model.trainable", ["layers\\.[12]\\.", "lm_head"]),
    (["--model.gradient_checkpointing", "true"], "model.gradient_checkpointing", True),
    (["--model.attn_implementation", "sdpa"], "model.attn_implementation", "sdpa"),
    (["--model.torch_compile", "true"], "model.torch_compile", True),
    (["--model.lora", "{}"], "model.lora.r", 16),
    (["--model.lora.r", "8"], "model.lora.alpha", 32.0),
    (["--model.lora.targets", "[q_proj, '.*mlp.*']"], "model.lora.targets", ["q_proj", ".*mlp.*"]),
    (["--synthesis.scope", "null"], "synthesis.scope", None),
    (["--synthesis.scope=layer"], "synthesis.scope", "layer"),
    (["--objective.retain", "none"], "objective.retain", "none"),
    (["--objective.retain", "null"], "objective.retain", "none"),
    (["--model.path", "a=b/c"], "model.path", "a=b/c"),
    (["--model.path=--odd"], "model.path", "--odd"),
    (["--output", "a folder/x"], "output", "a folder/x"),
    (["--optimizer", "{name: sgd, lr: 0.5}"], "optimizer.name", "sgd"),
    (["--train.steps", "3", "--train.steps", "4"], "train.steps", 4),
    (["--data.max_length", "8", "--data.packing", "documents"], "data.max_length", 8),
]


@pytest.mark.parametrize(("tokens", "key", "value"), OVERRIDES, ids=[" ".join(tokens) for tokens, _, _ in OVERRIDES])
def test_overrides(tokens: list[str], key: str, value: Any, config: Resolve, tmp_path: Path) -> None:
    """Also through the whole command line, where argparse has its own opinion of what starts with a dash."""
    got = value_at(config(*tokens), key)
    assert got == value and type(got) is type(value)
    made, resume, quiet = parse_command_line(["--config", str(tmp_path / "run.yaml"), *tokens])
    assert not resume and not quiet
    assert value_at(made, key) == value
    untouched = value_at(config(), "train.batch_size")
    assert made.train.batch_size == untouched and made.data.forget == config().data.forget


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("5E-7", 5e-7), ("3.e-4", 3e-4)])
def test_floats_in_the_file_are_floats(text: str, value: float, config: Resolve, tmp_path: Path) -> None:
    """YAML 1.1, which PyYAML follows, reads the first as a string."""
    config()
    file = tmp_path / "run.yaml"
    file.write_text(file.read_text() + f"optimizer: {{lr: {text}}}\n")
    assert resolve(file).optimizer.lr == value


def test_strings_that_look_like_numbers_stay_strings(config: Resolve) -> None:
    assert config("--model.path", "'1e-5'").model.path == "1e-5"
    assert config("--model.path", "1e-5b").model.path == "1e-5b"


def test_precedence_is_override_over_preset_over_file_over_default(config: Resolve) -> None:
    file: dict[str, Any] = {"objective": {"beta": 0.2, "delta": 0.7}, "methods": METHODS}
    plain = config(**file)
    assert (plain.objective.beta, plain.synthesis.rule, plain.method) == (0.2, "sago", None)
    preset = config(method="npo_pcgrad", **file)
    assert preset.objective.model_dump() == {**plain.objective.model_dump(), "beta": 0.5}  # delta of the file remains
    assert (preset.synthesis.rule, preset.method) == ("pcgrad", "npo_pcgrad")
    both = config("--objective.beta", "0.9", "--synthesis.rule", "sum", method="npo_pcgrad", **file)
    assert (both.objective.beta, both.objective.delta, both.synthesis.rule) == (0.9, 0.7, "sum")
    assert config(method="empty", **file).objective == plain.objective
    other = config(method="ga_sum", **file)
    assert (other.objective.forget, other.objective.beta, other.synthesis.alpha) == ("ga", 0.2, 0.1)


def test_the_resolved_configuration_reproduces_itself(config: Resolve, tmp_path: Path) -> None:
    """`config.yaml` of a run folder is a configuration file."""
    made = config("--optimizer.lr", "1e-5", "--objective.retain", "none", method="ga_sum", methods=METHODS)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(made.model_dump()))
    assert resolve(again) == made


def test_a_task_that_is_none_needs_no_corpus(config: Resolve) -> None:
    assert config(data={"retain": None}, objective={"retain": "none"}).tasks == ["forget"]
    assert config(data={"forget": None}, objective={"forget": None}).tasks == ["retain"]
    assert config().tasks == ["forget", "retain"]


# ---------------------------------------------------------------------------------------------------------------------
# Fast, and without torch

HEAVY = ("torch", "deepspeed", "transformers", "datasets", "numpy", "mpi4py")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("module", ["pipeline.config.schema", "pipeline.train"])
def test_import_brings_in_no_torch(module: str) -> None:
    done = python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--config", "no/such.yaml"]])
def test_help_and_refusals_bring_in_no_torch(arguments: list[str]) -> None:
    code = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('loaded', [name for name in {HEAVY} if name in sys.modules]))\n"
        "runpy.run_module('pipeline.train', run_name='__main__', alter_sys=True)"
    )
    done = python(code, *arguments)
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert done.returncode == (0 if arguments == ["--help"] else 2)


def help_text() -> tuple[str, float]:
    before = processor_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train", "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr
    return done.stdout, processor_seconds() - before


def test_help_answers_in_under_two_seconds() -> None:
    assert help_text()[1] < 2


def test_help_names_every_key() -> None:
    def leaves(section: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            options = getattr(field.annotation, "__args__", (field.annotation,))
            inner = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
            below = f"{prefix}{name}.NAME." if str(field.annotation).startswith("dict") else f"{prefix}{name}."
            found += leaves(inner[0], below) if inner else [f"{prefix}{name}"]
        return found

    text, _ = help_text()
    assert len(leaves(RunConfig)) > 30
    for key in ("config", "method", *leaves(RunConfig)):
        assert f"--{key} " in text
