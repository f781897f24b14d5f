"""A configuration that cannot be run is refused in one line that names the key and the nearest valid one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.explain import nearest
from pipeline.config.load import parse_command_line, resolve
from tests.pipeline.config.base import METHODS, Resolve, keys, refusal

REFUSED: list[tuple[list[str], list[str]]] = [
    (["--synthesis.rule", "pcgard"], ["synthesis.rule", "'pcgard'", "did you mean 'pcgrad'"]),
    (["--synthesis.rule", "3"], ["synthesis.rule", "sum", "sago", "pcgrad"]),
    (["--synthesis.scope", "modul"], ["synthesis.scope", "'modul'", "did you mean 'module'"]),
    (["--synthesis.rule", "gru", "--synthesis.scope", "element"], ["synthesis.scope", "gru", "global"]),
    (
        ["--synthesis.rule", "nash_mtl", "--synthesis.scope", "element"],
        ["synthesis.scope", "nash_mtl", "angle", "module"],
    ),
    (
        ["--synthesis.rule", "graddrop", "--synthesis.scope", "module"],
        ["synthesis.scope", "graddrop", "valid: element"],
    ),
    (["--synthesis.rule", "sago", "--synthesis.c", "0.4"], ["synthesis.c", "cagrad", "sago", "remove it"]),
    (["--synthesis.rule", "gru", "--synthesis.preference", "0.4"], ["synthesis.preference", "upgrad", "gru"]),
    (["--synthesis.rule", "cagrad", "--synthesis.c", "1"], ["synthesis.c", "less than 1"]),
    (["--synthesis.rule", "sum", "--synthesis.metric", "adam"], ["synthesis.metric", "sum reads none", "remove it"]),
    (["--synthesis.metric", "adma"], ["synthesis.metric", "'adma'", "did you mean 'adam'"]),
    (["--synthesis.confine.share", "1"], ["synthesis.confine.share", "less than 1"]),
    (["--synthesis.confine.by", "forget"], ["synthesis.confine.share"]),
    (["--synthesis.confine.share", "0.2", "--synthesis.rule", "gru"], ["synthesis.confine", "gru", "average"]),
    (["--synthesis.confine.share", "0.2", "--objective.retain", "none"], ["synthesis.confine", "objective.retain"]),
    (["--synthesis.confine.share", "0.2", "--optimizer.weight_decay", "0.1"], ["synthesis.confine", "weight_decay: 0"]),
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
    (
        ["--data.packing", "blocks", "--data.forget.preferred", "b"],
        ["data.packing", "blocks", "data.forget.preferred", "documents"],
    ),
    (["--data.forget.prompt", "3"], ["data.forget.prompt", "3"]),
    (["--objective.forget", "none", "--objective.retain", "none"], ["objective.forget", "objective.retain", "none"]),
    (["--train.schedule", "both"], ["train.schedule", "'both'", "sequential", "joint"]),
    (["--train.schedule", "joint", "--objective.retain", "none"], ["joint", "objective.retain", "sequential"]),
    (["--train.schedule", "joint", "--objective.forget", "rmu"], ["joint", "objective.forget: rmu", "sequential"]),
    (["--train.schedule", "joint", "--objective.retain", "embed_diff"], ["objective.retain: embed_diff", "sequential"]),
    (["--train.schedule", "joint", "--model.torch_compile", "true"], ["joint", "model.torch_compile", "sequential"]),
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
        ("train: {steps: 5}\nseed: 1\ntrain: {probe_every: 1}\n", ["line 3", "'train' is there twice", "line 1"]),
        ("train: {steps: 5,\n  steps: 6}\n", ["line 2", "'steps' is there twice"]),
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
    message = refusal(lambda: config(method="any"))  # of a file without methods, as the first page's my.yaml
    assert "no method 'any': the file has no table `methods:`" in message and "leave out --method" in message


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
