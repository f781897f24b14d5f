"""From text to one checked configuration, quickly and without torch; and which file may import which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config.deepspeed import accumulation, deepspeed_config
from pipeline.config.explain import nearest
from pipeline.config.load import parse_command_line, resolve
from pipeline.config.run_folder import check_output_dir, content_digest, run_fingerprint
from pipeline.config.schema import RunConfig
from pipeline.config.untested import OLD_NAMES, UNTESTED
from pipeline.distributed.environment import world_from_environment
from pipeline.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[3]

Resolve = Callable[..., RunConfig]


def keys(folder: Path) -> dict[str, Any]:
    """The least that a run needs."""
    for task in ("forget", "retain"):
        (folder / f"{task}.jsonl").touch()
    return {
        "output": str(folder / "run"),
        "model": {"path": "some/model"},
        "data": {task: {"path": str(folder / f"{task}.jsonl")} for task in ("forget", "retain")},
    }


@pytest.fixture
def config(tmp_path: Path) -> Resolve:
    """Resolve a file of the least keys with `changed` sections laid over them."""

    def make(*overrides: str, method: str | None = None, **changed: Any) -> RunConfig:
        base = keys(tmp_path)
        for section, values in changed.items():
            base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(base))
        return resolve(file, method, overrides)

    return make


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        make()
    message = str(error.value)
    assert message and "\n" not in message and "\r" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_defaults_are_the_contracts(config: Resolve) -> None:
    """The configuration that the README documents, key by key."""
    made = config().model_dump()
    assert made["seed"] == 0
    assert made["model"] == {
        "path": "some/model", "dtype": "bfloat16", "gradient_checkpointing": False, "trainable": [".*"], "lora": None,
        "attn_implementation": None, "torch_compile": False, "trust_remote_code": False, "allow_pickle": False,
        "dropout": 0.0,
    }  # fmt: skip
    assert made["data"]["max_length"] == 512 and made["data"]["packing"] == "blocks"
    assert made["data"]["forget"]["field"] == made["data"]["retain"]["field"] == "text"
    objective = {"forget": "npo", "retain": "nll", "beta": 0.1, "delta": 0.0, "layer": 7, "steering_coeff": 20.0}
    assert objective.items() <= made["objective"].items()
    assert {"rule": "sago", "alpha": 1.0, "gamma": 1.0}.items() <= made["synthesis"].items()
    assert made["synthesis"]["scope"] in (None, "element")
    assert made["optimizer"] == {
        "name": "adamw", "lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0,
        "schedule": "linear", "warmup_ratio": 0.1, "max_grad_norm": 1.0,
    }  # fmt: skip
    train = {"steps": 100, "batch_size": 32, "micro_batch_size": 4, "deepspeed": "ds_configs/zero3.json"}
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


METHODS = {
    "npo_pcgrad": {"objective": {"forget": "npo", "beta": 0.5}, "synthesis": {"rule": "pcgrad"}},
    "ga_sum": {"objective": {"forget": "ga"}, "synthesis": {"rule": "sum", "alpha": 0.1}},
    "empty": {},
}


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
# Refusals: one line, the culprit, the nearest valid name

REFUSED: list[tuple[list[str], list[str]]] = [
    (["--synthesis.rule", "pcgard"], ["synthesis.rule", "'pcgard'", "did you mean 'pcgrad'"]),
    (["--synthesis.rule", "3"], ["synthesis.rule", "sum", "sago", "pcgrad"]),
    (["--synthesis.scope", "modul"], ["synthesis.scope", "'modul'", "did you mean 'module'"]),
    (["--synthesis.rule", "gru", "--synthesis.scope", "element"], ["synthesis.scope", "gru", "global"]),
    (["--objective.forget", "simpo"], ["objective.forget", "'simpo'", "did you mean 'simnpo'"]),
    (["--objective.retain", "gd"], ["objective.retain", "'gd'", "nll"]),
    (["--model.dtype", "bf16"], ["model.dtype", "'bf16'", "bfloat16"]),
    (["--train.step", "5"], ["'train.step'", "did you mean 'steps'"]),
    (["--trian.steps", "5"], ["'trian'", "did you mean 'train'"]),
    (["--data.forget.feild", "body"], ["'data.forget.feild'", "did you mean 'field'"]),
    (["--alpha", "5"], ["'alpha'", "synthesis"]),
    (["--train.steps", "ten"], ["train.steps", "integer", "'ten'"]),
    (["--train.steps", "1.5"], ["train.steps", "integer", "1.5"]),
    (["--train.steps", "true"], ["train.steps", "integer", "True"]),
    (["--train.steps", "'5'"], ["train.steps", "integer", "'5'"]),
    (["--train.steps", "0"], ["train.steps", "0"]),
    (["--train.steps", "-5"], ["train.steps", "-5"]),
    (["--train.batch_size=-1"], ["train.batch_size", "-1"]),
    (["--train.micro_batch_size", "0"], ["train.micro_batch_size"]),
    (["--data.max_length", "1"], ["data.max_length", "2"]),
    (["--optimizer.lr", "0"], ["optimizer.lr", "0"]),
    (["--optimizer.lr", "-1e-5"], ["optimizer.lr", "-1e-05"]),
    (["--optimizer.lr", ".nan"], ["optimizer.lr", "nan"]),
    (["--optimizer.betas", "[0.9]"], ["optimizer.betas"]),
    (["--optimizer.betas", "0.9"], ["optimizer.betas"]),
    (["--optimizer.warmup_ratio", "1.0"], ["optimizer.warmup_ratio"]),
    (["--objective.beta", "0"], ["objective.beta"]),
    (["--synthesis.alpha", "-1"], ["synthesis.alpha", "-1"]),
    (["--model.trainable", "['(']"], ["model.trainable", "'('"]),
    (["--model.trainable", "lm_head"], ["model.trainable", "list"]),
    (["--model.lora.r", "0"], ["model.lora.r", "0"]),
    (["--model.lora.rank", "8"], ["'model.lora.rank'", "valid: r, alpha"]),
    (["--model.lora.targets", "['(']"], ["model.lora.targets", "'('"]),
    (["--model.lora.targets", "[]"], ["model.lora.targets"]),
    (["--model.lora", "{}", "--model.trainable", "[lm_head]"], ["model.trainable", "model.lora.targets"]),
    (["--model.attn_implementation", "''"], ["model.attn_implementation"]),
    (["--model", "null"], ["model"]),
    (["--train.steps.x", "3"], ["train.steps"]),
    (["--train.steps"], ["--train.steps", "value"]),
    (["--train.steps", "--seed", "1"], ["--train.steps", "value"]),
    (["train.steps", "3"], ["'train.steps'", "--"]),
    (["-x", "3"], ["'-x'"]),
    (["--model.trainable", "[a"], ["--model.trainable", "YAML"]),
    (["--output", "!!python/name:os.system"], ["--output", "YAML"]),
    (["--data.forget", "null"], ["data.forget", "objective.forget"]),
    (["--data.forget.path", "no/such.jsonl"], ["data.forget.path", "no/such.jsonl"]),
    (["--data.retain.path", "no/such.parquet"], ["data.retain.path", "no/such.parquet"]),
    (["--data.forget.prompt", "q"], ["data.forget", "prompt needs response"]),
    (["--data.retain.response", "a"], ["data.retain", "response needs prompt"]),
    (["--data.forget.field", "null"], ["data.forget", "field", "prompt and response"]),
    (["--data.forget", "{path: a.txt, preferred: b}"], ["data.forget", ".txt", "preferred"]),
    (["--data.forget", "{path: a.txt, prompt: q, response: a}"], ["data.forget", ".txt", "prompt"]),
    (["--data.forget.refusals", "no.txt"], ["data.forget", "refusals", "prompt and response"]),
    (["--data.forget.preferred", "text"], ["data.forget", "field, preferred", "different columns"]),
    (["--data.forget.preferred", "b"], ["data.packing", "blocks", "data.forget.preferred", "documents"]),
    (["--data.forget.prompt", "3"], ["data.forget.prompt", "3"]),
    (["--objective.forget", "none", "--objective.retain", "none"], ["objective.forget", "objective.retain", "none"]),
]


@pytest.mark.parametrize(("tokens", "expected"), REFUSED, ids=[" ".join(tokens) for tokens, _ in REFUSED])
def test_refused_with_the_culprit_and_the_remedy(tokens: list[str], expected: list[str], config: Resolve) -> None:
    message = refusal(lambda: config(*tokens))
    for part in expected:
        assert part in message


# Old names of keys: the old one with a value, and the one to write.
RENAMED_KEYS = [
    ("optimizer.clip", 1.0, "optimizer.max_grad_norm"),
    ("optimizer.warmup", 0.1, "optimizer.warmup_ratio"),
    ("model.train", [".*"], "model.trainable"),
    ("objective.steering", 6.5, "objective.steering_coeff"),
    ("synthesis.spare", "host", "synthesis.stash_device"),
    ("train.timeout", 5.0, "train.timeout_minutes"),
]


@pytest.mark.parametrize(("old", "value", "new"), RENAMED_KEYS, ids=[old for old, *_ in RENAMED_KEYS])
def test_an_old_name_of_a_key_is_refused_with_the_new_one(
    old: str, value: Any, new: str, config: Resolve, tmp_path: Path
) -> None:
    """In the file, in a preset and on the command line; the message names the place."""
    section, key = old.split(".")
    sections: dict[str, Any] = {section: {key: value}}
    file = str(tmp_path / "run.yaml")
    for place, make in {
        f"{file}: the key": lambda: config(**sections),
        f"{file}: methods.mine: the key": lambda: config(method="mine", methods={"mine": sections}),
        "command line: the key": lambda: config(f"--{old}", str(value)),
    }.items():
        message = refusal(make)
        assert message == f"{place} {old!r} has a new name; write {new!r}"


def test_a_refusal_names_where_the_value_was_written(config: Resolve, tmp_path: Path) -> None:
    file, wrong = str(tmp_path / "run.yaml"), {"synthesis": {"rule": "pcgard"}}
    assert refusal(lambda: config(**wrong)).startswith(f"{file}: synthesis.rule")
    preset = {"methods": {"mine": wrong}}
    assert refusal(lambda: config(method="mine", **preset)).startswith(f"{file}: methods.mine: synthesis.rule")
    assert refusal(lambda: config("--synthesis.rule", "x", method="mine", **preset)).startswith("command line: synth")
    assert config("--synthesis.rule", "sum", method="mine", **preset).synthesis.rule == "sum"
    assert refusal(lambda: config("--trian.steps", "3")).startswith("command line: unknown key 'trian'")


ASKED = ["--data.packing", "documents", "--data.forget.prompt", "q", "--data.forget.response", "a"]
REFUSED_QUESTIONS: list[tuple[list[str], list[str]]] = [
    (["--data.packing", "blocks"], ["data.packing", "blocks", "data.forget.prompt", "documents"]),
    (["--data.forget.field", "text"], ["data.forget", "either field", "prompt and response"]),
    (["--data.forget.field", "body"], ["data.forget", "either field", "prompt and response"]),
    (["--data.forget.response", "q"], ["data.forget", "prompt, response", "different columns"]),
    (["--data.forget.preferred", "a"], ["data.forget", "different columns"]),
    (["--data.forget.refusals", "no.jsonl"], ["data.forget", "refusals", ".txt", "no.jsonl"]),
    (["--data.forget.refusals", "no/such.txt"], ["data.forget.refusals", "no/such.txt"]),
    (["--data.forget.promt", "q"], ["'data.forget.promt'", "did you mean 'prompt'"]),
]


@pytest.mark.parametrize(
    ("tokens", "expected"), REFUSED_QUESTIONS, ids=[" ".join(tokens) for tokens, _ in REFUSED_QUESTIONS]
)
def test_questions_are_refused_with_the_culprit_and_the_remedy(
    tokens: list[str], expected: list[str], config: Resolve
) -> None:
    assert config(*ASKED).data.forget is not None
    message = refusal(lambda: config(*ASKED, *tokens))
    for part in expected:
        assert part in message


def test_questions_beside_plain_text_are_read_back_as_they_were(config: Resolve, tmp_path: Path) -> None:
    """A run folder's `config.yaml` names every key, also the `field` that a corpus of questions has not."""
    (tmp_path / "no.txt").write_text("no")
    more = ["--data.forget.preferred", "b", "--data.forget.refusals", str(tmp_path / "no.txt")]
    for tokens in (ASKED, [*ASKED, *more], ["--data.packing", "documents", *more[:2]]):
        made = config(*tokens)
        again = tmp_path / "again.yaml"
        again.write_text(yaml.safe_dump(made.model_dump()))
        assert resolve(again) == made
    forget, retain = config(*ASKED, *more).data.forget, config(*ASKED).data.retain
    assert forget is not None and forget.columns == {"prompt": "q", "response": "a", "preferred": "b"}
    assert retain is not None and retain.columns == {"field": "text"}


OUT_OF_RANGE = {
    "betas out of range": ["--optimizer.betas", "[1.5, -3]"],
    "nothing trains": ["--model.trainable", "[]"],
    "margin nan": ["--objective.delta", ".nan"],
    "weight inf": ["--synthesis.alpha", ".inf"],
    "rate inf": ["--optimizer.lr", ".inf"],
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_values_that_cannot_run_are_refused(case: str, config: Resolve) -> None:
    tokens = OUT_OF_RANGE[case]
    assert tokens[0][2:] in refusal(lambda: config(*tokens))


@pytest.mark.parametrize("missing", ["output", "model", "data", "model.path", "data.forget.path"])
def test_what_must_be_given(missing: str, tmp_path: Path) -> None:
    base = keys(tmp_path)
    holder, *rest = missing.split(".")
    section: Any = base
    for part in (holder, *rest)[:-1]:
        section = section[part]
    del section[missing.split(".")[-1]]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    message = refusal(lambda: resolve(tmp_path / "run.yaml"))
    assert repr(missing) in message and f"--{missing}" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", ["line 2", "YAML"]),
        ("output: x\n  model: y\n", ["line 2", "YAML"]),
        ("\tmodel: y\n", ["line 1", "YAML"]),
        ("a: \x01\n", ["YAML"]),
        ("model: !!python/object:os.system {}\n", ["line 1", "YAML"]),
        ("- a\n- b\n", ["keys and values", "list"]),
        ("", ["keys and values"]),
        ("just text\n", ["keys and values", "str"]),
        ("methods: [a]\n", ["methods"]),
        ("methods: {a: 3}\n", ["methods"]),
        pytest.param(
            "seed: 2024-13-45\n",
            ["YAML"],
        ),
    ],
)
def test_a_file_that_is_no_configuration(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    message = refusal(lambda: resolve(tmp_path / "run.yaml"))
    for part in (*expected, "run.yaml"):
        assert part in message


@pytest.mark.parametrize("content", [None, b"caf\xe9: 1\n"])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    message = refusal(lambda: resolve(tmp_path / "run.yaml"))
    assert "--config" in message and "run.yaml" in message
    assert "--config" in refusal(lambda: resolve(tmp_path))  # a folder


def test_an_unknown_method_names_the_nearest(config: Resolve) -> None:
    message = refusal(lambda: config(method="npo_pcgard", methods=METHODS))
    assert "'npo_pcgard'" in message and "did you mean 'npo_pcgrad'" in message
    assert "'any'" in refusal(lambda: config(method="any"))


def test_a_misspelt_required_key_is_named(tmp_path: Path) -> None:
    base = keys(tmp_path)
    base["data"]["forget"] = {"pth": base["data"]["forget"]["path"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    assert "pth" in refusal(lambda: resolve(tmp_path / "run.yaml"))


def test_the_command_line_needs_a_file() -> None:
    assert "--config" in refusal(lambda: parse_command_line(["--train.steps", "3"]))
    assert "--config" in refusal(lambda: parse_command_line(["--config"]))


def test_a_hint_lists_what_is_valid() -> None:
    assert nearest("sagoo", ["sum", "sago"]).startswith("did you mean 'sago'")
    assert "did you mean" not in nearest("xyz", ["sum", "sago"])
    assert all("valid: sum, sago" in nearest(name, ["sum", "sago"]) for name in ("sagoo", "xyz"))


def test_an_output_that_holds_a_run_is_refused(tmp_path: Path, config: Resolve) -> None:
    def check(output: Path, resume: bool = False) -> None:
        check_output_dir(config(output=str(output)), resume)

    for resume in (False, True):  # a job script may always say --resume
        check(tmp_path / "new", resume)
        check(tmp_path, resume)  # a folder without a run will do
    (tmp_path / "note.txt").touch()
    assert "is a file" in refusal(lambda: check(tmp_path / "note.txt"))
    for name in ("config.yaml", "metrics.jsonl", "final"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).touch()
        assert str(folder) in refusal(lambda folder=folder: check(folder))


def test_what_a_resumed_run_may_have_otherwise(tmp_path: Path, config: Resolve) -> None:
    def made(**train: Any) -> RunConfig:
        return config(output=str(tmp_path / "run"), train=train)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(made().model_dump()))
    free = {
        "micro_batch_size": 2, "checkpoint_every": 7, "keep_checkpoints": 5, "timeout_minutes": 1.5, "export_every": 3,
        "max_skipped": 2, "deepspeed": "moved/zero3.json",
    }  # fmt: skip
    check_output_dir(made(**free), resume=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = config(output=str(tmp_path / "moved"), cache=str(tmp_path / "cache"), train=free)
    check_output_dir(moved, resume=True)
    (tmp_path / "moved").rename(tmp_path / "run")
    assert "train.batch_size" in refusal(lambda: check_output_dir(made(**free, batch_size=64), resume=True))
    zero: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    assert run_fingerprint(made(), zero) == run_fingerprint(made(**free), zero)
    assert run_fingerprint(made(), zero) != run_fingerprint(made(batch_size=64), zero)


def test_what_a_resumed_run_reads_may_have_moved(tmp_path: Path, config: Resolve) -> None:
    """The old files are gone; whether the content is the same is the checkpoint's to say, by digests."""
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    (tmp_path / "run").mkdir()
    old.touch()
    here = {"output": str(tmp_path / "run"), "data": {"forget": {"path": str(old)}, "retain": {"path": str(old)}}}
    before = config(**here)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(before.model_dump()))
    old.rename(new)
    corpora = {"forget": {"path": str(new)}, "retain": {"path": str(new)}}
    changed = {"synthesis": {"layer_geometry_every": 3, "stash_device": "host"}, "data": corpora}
    now = config(**{**here, **changed, "model": {"path": "elsewhere", "gradient_checkpointing": True}}).model_copy(
        update={"method": "b"}
    )
    check_output_dir(now, resume=True)
    zero = {"zero_optimization": {"stage": 3}}
    assert run_fingerprint(before, zero) == run_fingerprint(now, zero)
    for other in ({"model": {"torch_compile": True}}, {"seed": 1}, {"synthesis": {"gamma": 2.0}}):
        assert run_fingerprint(before, zero) != run_fingerprint(config(**{**here, "data": corpora, **other}), zero)


@pytest.mark.parametrize(
    ("changed", "decides"),
    [
        ({"zero_optimization": {"stage": 2}}, True),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 10}}, True),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, True),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, True),
        ({"communication_data_type": "bf16"}, True),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, True),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 10, "overlap_comm": False}}, False),
        ({"csv_monitor": {"enabled": True}, "wall_clock_breakdown": True, "train_micro_batch_size_per_gpu": 1}, False),
    ],
)
def test_the_keys_of_a_deepspeed_file_decide_and_not_its_name(
    changed: dict[str, Any], decides: bool, config: Resolve
) -> None:
    zero = {"zero_optimization": {"stage": 3}}
    same = run_fingerprint(config(), zero) == run_fingerprint(config(), {**zero, **changed})
    assert same is not decides


@pytest.mark.parametrize(("before", "now"), [(None, {"r": 4}), ({"r": 4}, None), ({"r": 4}, {"r": 8})])
def test_a_run_is_not_resumed_with_other_adapters(before: Any, now: Any, tmp_path: Path, config: Resolve) -> None:
    def made(lora: Any) -> RunConfig:
        return config(output=str(tmp_path / "run"), model={"lora": lora})

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(made(before).model_dump()))
    check_output_dir(made(before), resume=True)
    assert "model.lora" in refusal(lambda: check_output_dir(made(now), resume=True))


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and the DeepSpeed file


@pytest.mark.parametrize(
    ("batch", "micro", "world", "count"), [(32, 4, 1, 8), (32, 4, 2, 4), (12, 2, 3, 2), (6, 3, 2, 1)]
)
def test_accumulation_makes_up_the_global_batch(
    batch: int, micro: int, world: int, count: int, config: Resolve
) -> None:
    made = config(train={"batch_size": batch, "micro_batch_size": micro})
    assert accumulation(made, world) == count and count * micro * world == batch


@pytest.mark.parametrize(("batch", "micro", "world"), [(32, 3, 1), (32, 4, 3), (4, 4, 2), (1, 2, 1)])
def test_a_batch_that_does_not_divide_is_refused(batch: int, micro: int, world: int, config: Resolve) -> None:
    message = refusal(lambda: accumulation(config(train={"batch_size": batch, "micro_batch_size": micro}), world))
    for part in ("train.batch_size", str(batch), f"{world} rank", str(micro * world)):
        assert part in message


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "5", "PMI_SIZE": "6"}, (5, 6)),
    ],
)
def test_the_world_is_what_the_launcher_says(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(("OMPI_COMM_WORLD", "PMI_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == expected


STAGE3 = {"zero_optimization": {"stage": 3}}
NVME = {"device": "nvme", "nvme_path": "disk"}


@pytest.fixture
def deepspeed(config: Resolve, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`deepspeed_config` for a DeepSpeed file with this content."""

    def make(content: Any, **changed: Any) -> dict[str, Any]:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        train = {"deepspeed": str(file), **changed.pop("train", {})}
        return deepspeed_config(config(train=train, **changed))

    return make


def test_the_digest_of_a_deepspeed_file_is_of_what_it_decides(deepspeed: Any) -> None:
    """Logging, monitors, micro-batch and the order of keys are not; the stage, clipping and precision are."""
    whole = content_digest(deepspeed(STAGE3))
    csv = {"csv_monitor": {"enabled": True, "output_path": "runs/csv"}, "wall_clock_breakdown": True}
    assert content_digest(deepspeed({**csv, **STAGE3, "steps_per_print": 3}, train={"micro_batch_size": 8})) == whole
    others = [
        deepspeed({"zero_optimization": {"stage": 2}}),
        deepspeed(STAGE3, optimizer={"max_grad_norm": 0.5}),
        deepspeed(STAGE3, model={"path": "x", "dtype": "float16"}),
        deepspeed({**STAGE3, "communication_data_type": "fp32"}),
    ]
    assert len({whole, *map(content_digest, others)}) == 5


def test_the_run_decides_batch_clipping_and_precision(deepspeed: Any) -> None:
    made = deepspeed(STAGE3, train={"micro_batch_size": 8}, optimizer={"max_grad_norm": 0.5})
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"]["enabled"] is True and made["fp16"]["enabled"] is False
    assert made["managed_gradient_accumulation"] is True  # the boundary is set by pipeline/zero/combiner.py
    assert made["data_types"]["grad_accum_dtype"] == "fp32"  # gradients are complete, and exact, before they meet
    assert made["zero_optimization"]["stage"] == 3
    full = deepspeed(STAGE3, model={"dtype": "float32"})
    assert not full["bf16"]["enabled"] and not full["fp16"]["enabled"]
    assert deepspeed(STAGE3, model={"dtype": "float16"})["fp16"]["enabled"] is True


def test_what_the_file_says_beside_that_is_kept(deepspeed: Any) -> None:
    given = {
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "optimizer": "auto",
        "bf16": {"enabled": "auto", "check_grad_overflow": "auto"},
        "fp16": {"initial_scale_power": 12},
        "data_types": {"grad_accum_dtype": "bf16"},
        "wall_clock_breakdown": True,
    }
    made = deepspeed(given)
    assert made["zero_optimization"] == given["zero_optimization"]
    assert made["bf16"]["enabled"] is True and made["fp16"] == {"enabled": False, "initial_scale_power": 12}
    assert made["data_types"] == {"grad_accum_dtype": "bf16"} and made["wall_clock_breakdown"] is True
    assert "optimizer" not in made and made["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({**STAGE3, "optimizer": {"type": "Adam"}}, ["'optimizer'"]),
        ({**STAGE3, "scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "optimizer.schedule"]),
        ({**STAGE3, "train_batch_size": 32}, ["'train_batch_size'"]),
        ({**STAGE3, "train_micro_batch_size_per_gpu": 5}, ["'train_micro_batch_size_per_gpu'", "5", "4"]),
        ({**STAGE3, "gradient_accumulation_steps": 2}, ["'gradient_accumulation_steps'", "2"]),
        ({**STAGE3, "gradient_clipping": 0.3}, ["'gradient_clipping'", "0.3", "1.0"]),
        ({**STAGE3, "bf16": {"enabled": False}}, ["'bf16'", "False", "True"]),
        ({**STAGE3, "fp16": {"enabled": True}}, ["'fp16'", "True", "False"]),
        ({**STAGE3, "managed_gradient_accumulation": False}, ["'managed_gradient_accumulation'"]),
        ("{\n  'stage': 3\n}", ["line 2", "JSON"]),
        ('{"zero_optimization": {"stage": 3}', ["line 1", "JSON"]),
        ("", ["JSON"]),
        ("[1, 2]", ["object", "list"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["nvme_path", "folder"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, ["nvme", "stage 3", "cpu"]),
        ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, ["offload_param", "nvme", "cpu"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["stage 3"]),
        ({"zero_optimization": {"stage": 4}}, ["stage"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": True}}, ["offload_optimizer", "object", "True"]),
        ("3", ["object", "int"]),
        pytest.param(
            {**STAGE3, "data_types": None},
            ["data_types"],
        ),
        pytest.param(
            {**STAGE3, "data_types": "fp32"},
            ["data_types"],
        ),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(
    content: Any, expected: list[str], deepspeed: Any
) -> None:
    message = refusal(lambda: deepspeed(content))
    for part in (*expected, "train.deepspeed", "ds.json"):
        assert part in message


def test_auto_inside_a_section_counts_as_unset(deepspeed: Any) -> None:
    """As in DeepSpeed's own models; the code here that reads the file must never see the word."""
    keys = (
        "overlap_comm",
        "reduce_bucket_size",
        "sub_group_size",
        "zero_hpz_partition_size",
        "stage3_max_live_parameters",
    )
    zero = {**dict.fromkeys(keys, "auto"), "offload_optimizer": {"device": "cpu", "buffer_count": "auto"}}
    data_types = {"grad_accum_dtype": "auto"}
    made = deepspeed(
        {"zero_optimization": {"stage": 3, **zero}, "data_types": data_types, "communication_data_type": "auto"}
    )
    assert made["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and "communication_data_type" not in made
    assert made == deepspeed({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    assert "stage" in refusal(lambda: deepspeed({"zero_optimization": {"stage": "auto"}}))


@pytest.mark.parametrize(
    ("content", "feature"),
    [
        ({"optimizer": {"type": "Muon"}}, "'optimizer'"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "qgZ"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "qwZ"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "SuperOffload",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "in part"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "without gradient norm"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16 master weights"),
        ({"bf16": {"check_grad_overflow": False}}, "non-finite"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16 master weights"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "autocast"),
        ({"data_types": {"param_dtype": "fp32"}}, "model.dtype"),
        ({"gradient_allreduce_op": "sum"}, "summed"),
        ({"prescale_gradients": True}, "divided"),
        ({"communication_data_type": "fp16"}, "communication"),
        ({"compile": {"deepcompile": True}}, "DeepCompile"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism"),
    ],
)
def test_what_was_never_tested_is_refused_by_name(content: Any, feature: str, deepspeed: Any) -> None:
    message = refusal(lambda: deepspeed({**STAGE3, **content}))
    assert feature in message and "ds.json" in message and ("remove it" in message or "write " in message)
    assert "\n" not in message


# What DeepSpeed 0.19.8 can be told below these sections, sorted by hand: how much at a time, in which order, from where
# and with what checks, but not what comes out. `stage3_` is left off, and what was never tested is refused.
TOLD = {
    "zero_optimization": """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm offload_param offload_optimizer sub_group_size
        prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
        max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold
        use_all_reduce_for_fetch_params allgather_sequential gather_fp16_weights_on_model_save
        ignore_unused_parameters round_robin_gradients zero_hpz_partition_size memory_efficient_linear
        pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks leaf_module""",
    "zero_optimization.offload_optimizer": """device nvme_path buffer_count pin_memory pipeline_read pipeline_write
        fast_init cpuadam_cores_perc""",
    "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
    "bf16": "enabled",
    "fp16": """enabled loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale""",
}


def test_every_key_that_deepspeed_knows_was_looked_at() -> None:
    """A release that brings another one fails here, until somebody has decided what it does to a gradient."""
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    models: dict[str, Any] = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
        "fp16": precision_config.DeepSpeedFP16Config,
    }
    for section, model in models.items():
        there = {name.removeprefix("stage3_") for name in model.model_fields}
        refused = {key.removeprefix(f"{section}.") for key in (*UNTESTED, *OLD_NAMES)}
        assert there - refused == {*TOLD[section].split()}, section


def test_what_deepspeed_changed_the_default_of_is_stated(deepspeed: Any) -> None:
    """Of 0.16.0 to 0.19.8, as their sources have it: clipping 0 then 1, the bf16 overflow check off then on, immediate
    updates on in 0.16.9, pinned memory off then on. (The limit of collectives, 30 minutes then 10: `ranks.start`.)"""
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu", "pin_memory": False}}
    made = deepspeed({"zero_optimization": {"stage": 3, **offload}}, optimizer={"max_grad_norm": 0.0})
    assert made["gradient_clipping"] == 0.0 and made["managed_gradient_accumulation"] is True
    assert made["bf16"] == {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": False}
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}


def test_what_nvme_would_not_restore_is_not_saved(deepspeed: Any) -> None:
    content = {"zero_optimization": {"stage": 3, "offload_optimizer": NVME}}
    assert deepspeed(content)["zero_optimization"]["offload_optimizer"] == {**NVME, "pin_memory": True}
    message = refusal(lambda: deepspeed(content, train={"checkpoint_every": 5}))
    assert "train.checkpoint_every" in message and "nvme" in message and "ds.json" in message


def test_a_missing_deepspeed_file_is_refused(config: Resolve) -> None:
    message = refusal(lambda: deepspeed_config(config("--train.deepspeed", "no/such.json")))
    assert "train.deepspeed" in message and "no/such.json" in message


def test_shipped_deepspeed_files_are_found_from_any_folder(
    config: Resolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config(config("--train.deepspeed", "ds_configs/zero3.json"))["zero_optimization"]["stage"] == 3


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
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train", "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr
    return done.stdout, time.perf_counter() - start


def test_help_answers_in_under_two_seconds() -> None:
    assert min(help_text()[1] for _ in range(3)) < 2  # the best of three: the machine may be busy


def test_help_names_every_key() -> None:
    def leaves(section: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            options = getattr(field.annotation, "__args__", (field.annotation,))
            inner = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
            found += leaves(inner[0], f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
        return found

    text, _ = help_text()
    assert len(leaves(RunConfig)) > 30
    for key in ("config", "method", *leaves(RunConfig)):
        assert f"--{key} " in text
