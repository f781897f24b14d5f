"""MMLU and WMDP: files, options and a hub that cannot be used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import run
from eval.suites import harness
from pipeline.errors import InputError
from tests.eval.suites.questions import ROW, write_rows


@pytest.mark.parametrize(
    ("suite", "files", "culprit", "remedy"),
    [
        ("wmdp_bio", {}, "wmdp/wmdp_bio.jsonl", "leave --data out"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": []}, "wmdp_bio.jsonl holds no question", "remove it"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": [ROW, {"question": "Which?"}]}, "wmdp_bio.jsonl, line 2", "choices"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": [ROW, {**ROW, "answer": 4}]}, "wmdp_bio.jsonl, line 2", "0 to 3"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": [{**ROW, "answer": "B"}]}, "wmdp_bio.jsonl, line 1", "0 to 3"),
        ("wmdp_bio", {"wmdp/wmdp_bio.jsonl": [{**ROW, "choices": ["a", "b"]}]}, "line 1", "four texts"),
        ("mmlu", {}, "mmlu/test/SUBJECT.jsonl", "leave --data out"),
        ("mmlu", {"mmlu/test/anatomi.jsonl": [ROW]}, "anatomi.jsonl", "rename"),
        ("mmlu", {"mmlu/test/anatomy.jsonl": [ROW]}, "mmlu/dev/anatomy.jsonl", "--data needs it"),
        ("mmlu", {"mmlu/test/anatomy.jsonl": [ROW], "mmlu/dev/anatomy.jsonl": [ROW]}, "mmlu_anatomy", "fewer"),
    ],
)
def test_unusable_questions(
    tmp_path: Path, suite: str, files: dict[str, list[dict[str, Any]]], culprit: str, remedy: str
) -> None:
    for name, rows in files.items():
        write_rows(tmp_path / name, rows)
    with pytest.raises(InputError) as caught:
        harness.load_probes(tmp_path, suite, **({"shots": 5} if suite == "mmlu" else {}))
    assert culprit in str(caught.value) and remedy in str(caught.value) and "\n" not in str(caught.value)


def test_without_shots_no_examples_are_needed(tmp_path: Path) -> None:
    write_rows(tmp_path / "mmlu" / "test" / "anatomy.jsonl", [ROW])
    assert harness.load_probes(tmp_path, "mmlu", shots=0).shots == 0


def test_a_silent_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"suite wmdp_bio.*give --data"):
        harness.load_probes(None, "wmdp_bio")


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        (["--suite", "mmlu", "--shots", "-1"], "--shots -1"),
        (["--suite", "bios", "--shots", "3"], "--shots belongs to suite mmlu alone"),
        (["--suite", "mmlu", "--ds-config", "zero2.json"], "stage must be 3"),
        (["--suite", "mmlu", "--ds-config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_unusable_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], culprit: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    monkeypatch.setattr(sys, "argv", ["run.py", "--model", "model", "--output", "out.json", *more])
    with pytest.raises(InputError, match=culprit):
        run.main()
    assert os.listdir() == ["zero2.json"]
