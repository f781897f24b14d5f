"""The commands of `launch/smollm2_matrix.sh`, which pretend: each reads what is there on a machine without the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import resolve
from pipeline.config.schema import REPOSITORY
from tests.pretended import make_clone

RECORD = r"""#!/bin/bash
printf '%s\0' "$@" >>"$RECORDED"; printf '\n' >>"$RECORDED"
case "$*" in "-m pipeline.distributed.launcher 1") printf "%s\n" deepspeed --num_gpus 1 ;; esac
while [ $# -gt 0 ]; do [ "$1" != --output ] || { mkdir -p "$(dirname "$2")"; : >"$2"; }; shift; done
"""
DATA = {
    "tofu": ("retain99.json", "forget01.json", "real_authors_perturbed.json", "world_facts_perturbed.json"),
    "wikitext2": ("wiki.test.raw",),
    "general": ("arc_easy.jsonl", "piqa.jsonl", "lambada_openai.jsonl", "bigbench_qa_wikidata.jsonl"),
}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The folder LOCAL; the files of TOFU hold a row each."""
    for folder, names in DATA.items():
        (tmp_path / "local" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "local" / folder / name).write_text(json.dumps({"question": name, "answer": "yes"}) + "\n")
    return tmp_path / "local"


def commands(folder: Path, *arguments: str) -> list[list[str]]:
    """What the script starts, with `RECORD` in place of both programs."""
    names = ("launch/smollm2_matrix.sh", "launch/recipes", "docs/examples/tasks")
    clone = make_clone(folder / "clone", names, python=RECORD, deepspeed=RECORD)
    (clone / "launch" / "smollm2.sh").write_text("exit 0\n")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "RECORDED": str(folder / "recorded")}
    line = ["bash", "launch/smollm2_matrix.sh", *arguments]
    done = subprocess.run(line, cwd=clone, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in (folder / "recorded").read_text().splitlines()]


def paths_of(settings: dict[str, Any]) -> list[str]:
    """The paths in a section of a configuration."""
    inner = [path for value in settings.values() if isinstance(value, dict) for path in paths_of(value)]
    return [*([settings["path"]] if "path" in settings else []), *inner]


def test_no_command_asks_the_hub_where_there_are_files(tmp_path: Path, local: Path) -> None:
    """Neither the target's training nor that of a method, whose recipe names TOFU on the hub."""
    recipe = REPOSITORY / "launch" / "recipes" / "tofu_smollm2.yaml"
    methods = yaml.safe_load(recipe.read_text())["methods"]
    read = set()
    for words in commands(tmp_path, str(tmp_path / "out"), str(local)):
        if "tofu_smollm2" not in words:
            continue
        (start,) = [index for index, word in enumerate(words) if word in ("--", "target")]
        for method in [word for word in words if word in methods]:
            config = resolve(recipe, method, words[start + 1 :], reads_data=False)
            found = paths_of(config.data.model_dump())
            assert len(found) == 5 and all(Path(path).exists() for path in found), (words, found)
            read.add(method)
    assert {"target", "npo_sum", "npo_sago", "ga_sum", "ga_sago", "simnpo_sago"} <= read
