"""The model card: nothing private in it, a licence where the base has one, a snippet that runs, and scores once."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import run as evaluation
from eval.reporting.card import write_scores
from pipeline.config.load import resolve, to_yaml
from pipeline.modeling.card import licence, model_card, public_name, usage
from tests.conftest import World


def card_of(world: World, folder: Path, **sections: Any) -> str:
    config = resolve(world.write(folder / "run.yaml", folder / "mine", **sections))
    return model_card(to_yaml(config), "digest", {"forget": "f", "retain": "r"}, {"forget_loss": 1.5}, chats=False)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("gpt2", "gpt2"),
        ("/elsewhere/secret/model", "model"),
        ("./model", "model"),
        ("runs/target/final", "final"),
        ("data/forget.jsonl", "forget.jsonl"),
        ("cais/wmdp-corpora", "cais/wmdp-corpora"),
    ],
)
def test_names_of_the_hub_stay_and_folders_lose_their_place(path: str, name: str) -> None:
    assert public_name(path) == name


def test_a_card_names_no_folder_of_the_machine(world: World, tmp_path: Path) -> None:
    card = card_of(world, tmp_path)
    assert not re.findall(r"(?:/|~)[\w.-]+/[\w./-]+", card.replace("ds_configs/cpu.json", ""))
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "model" and "license" not in head and head["pipeline_tag"] == "text-generation"
    assert "hf upload NAME ." in card


def test_the_licence_is_that_of_the_base(world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for text, expected in (
        ("---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        ("# No head\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: mit\ndate: 2024-02-31\n---\n", None),
    ):
        (base / "README.md").write_text(text)
        assert licence(str(base)) == expected
    assert licence(str(tmp_path)) is None and licence("nobody/knows-this") is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    head = yaml.safe_load(card_of(world, tmp_path, model={"path": str(base)}).split("---\n")[1])
    assert head["license"] == "apache-2.0"


def test_a_hub_that_breaks_off_costs_no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is written after the last step: an error there would lose the final model."""
    from huggingface_hub import file_download

    hub: Any = file_download  # of whatever package it takes its client from

    def breaks_off(*_: object, **__: object) -> None:
        raise hub.httpx2.ReadTimeout("the read operation timed out")

    monkeypatch.setattr("pipeline.modeling.card.hf_hub_download", breaks_off)
    assert licence("owner/model") is None


def test_the_snippet_runs_with_and_without_a_chat_template(world: World, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    for chats in (False, True):
        if chats:
            tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.chdir(tmp_path):
            exec(usage(os.path.join(".", "model"), chats), {})
        assert printed.getvalue().endswith("\n") and len(printed.getvalue()) > 2


def test_scores_are_written_once_for_each_suite(world: World, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(card_of(world, tmp_path))
    before = file.read_text()
    write_scores(tmp_path, "bios", [["step", "forget"], ["1", "0.4321"], ["2", r"0.1\1"]])
    write_scores(tmp_path, "corpus", [["model", "forget.rouge"], ["final", "0.25"]])
    first = file.read_text()
    assert "| 2 | 0.1\\1 |" in first and "0.4321" not in first and "| final | 0.25 |" in first
    write_scores(tmp_path, "bios", [["step", "forget"], ["2", r"0.1\1"]])
    assert file.read_text() == first
    write_scores(tmp_path, "bios", [["step", "forget"], ["2", "0.7"]])
    assert file.read_text() == first.replace(r"0.1\1", "0.7")
    assert re.sub(r"\[//\]: # \(scores of.*\(end of \w+\)\n", "", file.read_text(), flags=re.DOTALL) == before
    file.write_text("# Somebody else's card\n")
    write_scores(tmp_path, "bios", [["step", "forget"], ["2", "0.7"]])
    assert file.read_text() == "# Somebody else's card\n"


def test_an_evaluation_writes_the_card_of_what_it_evaluated(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prints the same table, and lines of progress where there is no terminal."""
    model, data = tmp_path / "final", tmp_path / "data"
    AutoModelForCausalLM.from_pretrained(world.folder / "model").save_pretrained(model)
    AutoTokenizer.from_pretrained(world.folder / "model").save_pretrained(model)
    (model / "README.md").write_text(card_of(world, tmp_path))
    data.mkdir()
    for task in ("forget", "retain"):
        (data / f"{task}.txt").write_text("\n".join(world.documents(task)[:3]))
    output = tmp_path / "out.json"
    arguments = ["run", "--model", model, "--suite", "corpus", "--data", data, "--output", output]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    evaluation.main()
    printed = capsys.readouterr()
    table = [line.split() for line in printed.out.splitlines()]
    (header,) = (line for line in table if line[:1] == ["model"])
    assert sorted(header[1:]) == sorted(
        ["forget", "probability", "forget", "ROUGE-L", "retain", "probability", "retain", "ROUGE-L"]
    )
    values = next(line for line in table if line[:1] == ["final"])
    card = (model / "README.md").read_text()
    assert "## Scores on corpus" in card and f"| {' | '.join(values)} |" in card
    assert f"evaluating {model} on corpus (model 1 of 1)" in printed.err
