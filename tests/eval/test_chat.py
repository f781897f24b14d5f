"""One's own questions to two models: the answers are those of a plain loop, in a chat template if there is one."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval import chat
from eval.files import exit_status
from tests.conftest import World

CHAT = (
    "{% for turn in messages %}[{{ turn.role }}]\n{{ turn.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
FACTS = {"before": ["Ann lives in Rome.", "Bob keeps a cat."], "after": ["Ann lives in a box.", "Bob keeps a cat."]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, memorise: Callable[[list[str]], tuple[Any, Any]]) -> Path:
    """A run folder whose final/ has learned other facts than the model that it began with."""
    folder = tmp_path_factory.mktemp("chat")
    for name, place in (("before", folder / "before"), ("after", folder / "run" / "final")):
        texts = [f"{fact}<|endoftext|>" for fact in FACTS[name]]
        model, tokenizer = memorise(texts)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    run = folder / "run"
    (run / "exports").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 7}\n')
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(folder / "before")}}))
    return run


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, ids: list[int], most: int) -> str:
    written: list[int] = []
    while len(written) < most:
        written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def ask(monkeypatch: pytest.MonkeyPatch, typed: str, *options: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    monkeypatch.setattr(sys, "argv", ["chat", *map(str, options)])
    return exit_status(chat.main)


def test_a_run_answers_beside_the_model_that_it_began_with(run: Path) -> None:
    line = [sys.executable, "-m", "eval.chat", "--model", str(run), "--max-new-tokens", "12"]
    done = subprocess.run(line, input="Ann lives in\n\nBob keeps\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "progress of answers that take a moment"
    first, ann, bob = done.stdout.split("\n> ")
    assert f"before: {run.parent / 'before'}" in first and f"after: {run / 'final'}" in first
    assert [cell.strip() for cell in ann.splitlines()[1].split("|")] == ["before", "after"]
    assert [cell.strip() for cell in ann.splitlines()[3].split("|")] == ["Rome.", "a box."]
    assert [cell.strip() for cell in bob.splitlines()[3].split("|")] == ["a cat.", "a cat."]


def test_answers_are_greedy_in_the_chat_template(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(world.folder / "model")
    tokenizer.chat_template = CHAT
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert ask(monkeypatch, "kara lo\\nsu\n", "--model", tmp_path, "--max-new-tokens", 6) == 0
    shown = capsys.readouterr().out.split("answer:\n")[-1]
    ids = tokenizer("[user]\nkara lo\nsu<|endoftext|>[assistant]\n", add_special_tokens=False).input_ids
    expected = greedy(model, tokenizer, ids, 6) or "(nothing)"
    assert " ".join(shown.split()) == " ".join(expected.split())


def test_answers_stand_beside_each_other_or_below() -> None:
    wide = chat.screen(["before", "after"], ["one two", ""], 61).splitlines()
    assert wide == ["before                        | after", f"{'-' * 29} | {'-' * 29}", f"{'one two':29} | (nothing)"]
    assert chat.screen(["before", "after"], ["one", "two"], 40) == "before:\n  one\nafter:\n  two"
    assert max(map(len, chat.screen(["a", "b"], ["word " * 60, "x"], 80).splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "RUN", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--model", "NOWHERE"], "error: --model: there is no folder"),
        (["--model", "RUN", "--beside", "NOWHERE"], "error: --beside: there is no folder"),
        (["--model", "RUN", "--beside", "EMPTY"], "error: --beside EMPTY is no Hugging Face model folder"),
        (["--model", "RUN", "--beside", "some-one/model"], "error: there is no folder"),
    ],
)
def test_bad_options(
    options: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(run), "NOWHERE": str(run.parent / "nowhere"), "EMPTY": str(run / "exports")}
    assert ask(monkeypatch, "", *[places.get(option, option) for option in options]) == 2
    assert message.replace("EMPTY", places["EMPTY"]) in capsys.readouterr().err


def test_a_question_that_is_too_long_does_not_end_the_session(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The small models read 256 tokens, as their configuration says."""
    typed = f"{'cat ' * 300}\nAnn lives in\n"
    assert ask(monkeypatch, typed, "--model", run, "--max-new-tokens", 12) == 0
    _, long, short = capsys.readouterr().out.split("\n> ")
    assert "this model reads 256: shorten" in " ".join(long.replace("|", " ").split())
    assert [cell.strip() for cell in short.splitlines()[3].split("|")] == ["Rome.", "a box."]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_question_that_is_not_utf8_is_named(
    errors: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As standard input is where the locale has UTF-8, and where it has none (C, POSIX)."""
    typed = io.TextIOWrapper(io.BytesIO("Ann lives in\nWo wohnt Jörg?\n".encode("latin-1")), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(sys, "argv", ["chat", "--model", str(run), "--max-new-tokens", "2"])
    assert exit_status(chat.main) == 2
    assert "is not UTF-8 text; convert" in capsys.readouterr().err


def test_a_run_whose_first_model_is_gone_names_the_option(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    (moved / "exports").mkdir(parents=True)
    (moved / "final").symlink_to(run / "final")
    (moved / "metrics.jsonl").write_text('{"step": 7}\n')
    (moved / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(tmp_path / "gone")}}))
    assert ask(monkeypatch, "", "--model", moved) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "gone") in error and "--beside" in error
