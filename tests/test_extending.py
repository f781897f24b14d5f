"""docs/guides/extending.md: its edits are made to a copy of the repository, and what they add is run there.

`tests/extended.py` is run in that copy only: the new rule and objective on an engine beside the plain loop, the recipe.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
COPIED = ("pipeline", "eval", "tests", "docs", "ds_configs", "launch", "pyproject.toml")
BLOCK = re.compile(r"^```(diff|python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = (
    "tests/pipeline/synthesis/test_synthesis.py",
    "tests/pipeline/synthesis/test_shards.py",
    "tests/pipeline/synthesis/test_arguments.py",
    "tests/pipeline/losses/test_objectives.py",
    "tests/eval/suites/test_cloze.py",
    "tests/extended.py",
)


def apply(language: str, file: Path, text: str) -> None:
    """A new file; or a hunk, whose place is where its unsigned and its removed lines stand, once."""
    if language != "diff":
        assert not file.exists(), f"{file} is there already"
        file.write_text(text)
        return
    lines = [(line[:1], line[1:]) for line in text.splitlines()]
    assert {sign for sign, _ in lines} <= {" ", "-", "+"}, text
    old, new = ("".join(f"{line}\n" for sign, line in lines if sign in kept) for kept in (" -", " +"))
    before = file.read_text()
    assert before.count(old) == 1, f"{file} has {before.count(old)} places like\n{old}"
    file.write_text(before.replace(old, new))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    text = (REPOSITORY / "docs" / "guides" / "extending.md").read_text()
    found = BLOCK.findall(text)
    assert len(found) == sum(text.count(f"```{language}\n") for language in ("diff", "python", "yaml")) > 0
    for language, file, lines in found:
        apply(language, folder / file, lines)
    return folder


def test_the_examples_do_what_they_say(extended: Path) -> None:
    cautious = "cautious and (specification or plain_loops or retention_alone or any_cut)"  # of many more, for time
    names = f"({cautious}) or unlikelihood or cloze or configuration_offers or additions"
    command = [sys.executable, "-m", "pytest", *RUN, "-k", names, "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=extended, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_examples_are_as_tidy_as_the_rest(extended: Path) -> None:
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, "."], cwd=extended, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
