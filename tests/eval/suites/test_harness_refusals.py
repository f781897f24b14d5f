"""Tasks of lm-evaluation-harness that are refused: unknown, unreadable, without a hub, or not for this model."""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from eval import loading, run
from eval.suites import harness_tasks, shared_lm
from pipeline.config.schema import REPOSITORY
from pipeline.errors import InputError
from tests.conftest import World

ARC = yaml.safe_load((REPOSITORY / "docs" / "examples" / "tasks" / "arc_easy.yaml").read_text())
MEMBER = {"group": "more", "task": ["arc_easy", "hellaswag"]}  # the second is the harness's own


@pytest.mark.parametrize(
    ("tasks", "files", "culprit", "remedy"),
    [
        (["arc_eazy"], {"a": ARC}, "--tasks arc_eazy: neither", "the nearest are arc_easy, "),
        (["arc_easy"], {"a": ARC}, "--tasks arc_easy: cannot load it (FileNotFoundError", "repair "),
        (["arc_easy"], {"a": {**ARC, "output_type": "riddle"}}, "riddle", "repair "),
        (["arc_easy"], {"a": "task: [broken"}, "a.yaml: ", "repair or remove it"),
        (["arc_easy"], {}, "holds no file *.yaml", "name a folder with tasks"),
        (["hellaswag"], {"a": ARC}, "--tasks hellaswag: cannot load it", "without the hub, give --tasks-dir"),
        (["more"], {"a": ARC, "b": MEMBER}, "--tasks more: cannot load it", "repair "),
    ],
)
def test_unusable_tasks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: TaskManager,
    tasks: list[str],
    files: dict[str, Any],
    culprit: str,
    remedy: str,
) -> None:
    """The harness's 14,000 tasks are indexed once for all cases, as each command does it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(harness_tasks, "TaskManager", functools.partial(extended, index))
    (tmp_path / "tasks").mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        harness_tasks.load_probes(None, tasks=tasks, tasks_dir=tmp_path / "tasks")
    assert culprit in str(caught.value) and remedy in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def index() -> TaskManager:
    return TaskManager()


def extended(index: TaskManager, include_path: str, include_defaults: bool = True) -> TaskManager:
    """What `TaskManager(include_path)` makes, without the 15 s that it takes to read the harness's own files again."""
    own = TaskManager(include_path=include_path, include_defaults=False)
    if include_defaults:
        own._index = {**index.task_index, **own.task_index}
        own._all_tasks = sorted(own.task_index)
    return own


def test_tasks_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    """Code that the model writes, and pictures."""
    shutil.copytree(data / "general", tmp_path / "data" / "general")
    monkeypatch.chdir(tmp_path)
    for name, key, reason in (("code", "unsafe_code", "runs code"), ("image", "doc_to_image", "has images")):
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({**ARC, "task": name, key: True if key[0] == "u" else []})
        )
        with pytest.raises(InputError, match=f"--tasks {name}: {name} {reason}"):
            harness_tasks.load_probes(None, tasks=[name], tasks_dir=tmp_path)


def test_a_task_of_one_s_own_comes_before_that_of_the_harness(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: TaskManager
) -> None:
    """Both with the index of the folder alone and with that of all tasks (which a tag needs)."""
    shutil.copytree(data / "general", tmp_path / "data" / "general")
    monkeypatch.chdir(tmp_path)
    folder = REPOSITORY / "docs" / "examples"
    monkeypatch.setattr(harness_tasks, "TaskManager", functools.partial(extended, index))
    probes = harness_tasks.load_probes(None, tasks=["arc_easy"], tasks_dir=folder / "tasks")
    assert "data/general/arc_easy.jsonl" in str(probes.loaded.tasks["tasks"]["arc_easy"].config.dataset_kwargs)
    whole = harness_tasks.index_tasks(["arc_easy", "piqa"], folder / "tasks")
    path = whole.task_index["arc_easy"].yaml_path
    assert path is not None and path.is_relative_to(folder) and "piqa" in whole.task_index


@pytest.mark.parametrize(
    ("kwargs", "needed"),
    [
        ({"bos_token": None, "eos_token": None}, "end-of-text token, which tasks need that let the model write"),
        ({"max_gen_toks": 2048}, "set generation_kwargs.max_gen_toks"),
    ],
)
def test_answers_that_cannot_be_written(world: World, kwargs: dict[str, Any], needed: str) -> None:
    model, tokenizer = loading.load(world.folder / "model")
    if "eos_token" in kwargs:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    lm = shared_lm.SharedLM(model, tokenizer, 8, "lm_eval")
    settings = {"until": ["\n"], "max_gen_toks": kwargs.get("max_gen_toks", 4)}
    request: Any = type("Request", (), {"args": ("a", settings), "task_name": "written"})
    with pytest.raises(InputError, match=needed):
        lm.generate_until([request])


def test_batches_of_windows_have_a_limit_of_tokens() -> None:
    assert shared_lm.consecutive([4, 4, 9, 2, 2, 2, 30, 1], 3, 18) == [[0, 1], [2, 3], [4, 5], [6], [7]]
    assert shared_lm.consecutive([1] * 5, 2, 100) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        (["--suite", "lm_eval"], "--tasks names; give at least one"),
        (["--suite", "bios", "--tasks", "piqa"], "--tasks belongs to suite lm_eval alone"),
        (["--suite", "bios", "--limit", "3"], "--limit belongs to suite lm_eval alone"),
        (["--suite", "lm_eval", "--tasks", "piqa", "--limit", "0"], "--limit 0: give 1 or more"),
        (["--suite", "lm_eval", "--tasks", "piqa", "--tasks-dir", "nowhere"], "--tasks-dir nowhere is no folder"),
    ],
)
def test_unusable_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], culprit: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--model", "model", "--output", "out.json", *more])
    with pytest.raises(InputError, match=culprit):
        run.main()
