"""Pages that quote: messages in docs/guides/troubleshooting.md and tests in docs/concepts/numerics.md are there.

A heading of the first that is a message of ours is, part by part, a text of the source.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("error: ", "warning: ", "RuntimeError: ", "rank …: ")
FOREIGN = ("RuntimeError: cannot load MPI library",)  # mpi4py's
QUOTED = [
    quoted
    for heading in re.findall(
        "^### (.*)$", (REPOSITORY / "docs" / "guides" / "troubleshooting.md").read_text(), re.MULTILINE
    )
    for quoted in re.findall("`([^`]+)`", heading)
    if quoted.startswith(OURS) and quoted not in FOREIGN
]


def template(node: ast.AST) -> str:
    """A text as the source writes it, with … for what varies; … for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[sd]", "…", text)
        case ast.JoinedStr(values=parts):
            return "".join(map(template, parts))
        case ast.BinOp(op=ast.Add()):
            return template(node.left) + template(node.right)
    return "…"


@cache
def texts() -> frozenset[str]:
    files = [file for folder in ("pipeline", "eval") for file in sorted((REPOSITORY / folder).rglob("*.py"))]
    return frozenset(template(node) for file in files for node in ast.walk(ast.parse(file.read_text())))


def parts_not_in_the_source(message: str) -> list[str]:
    for prefix in OURS:
        message = message.removeprefix(prefix)
    parts = [part.strip(" :;,") for part in message.split("…")]  # where one text is put into another
    return [part for part in parts if not any(part in text for text in texts())]


@pytest.mark.parametrize("message", QUOTED)
def test_a_message_that_is_ours_is_in_the_source(message: str) -> None:
    assert not parts_not_in_the_source(message)


def test_a_message_that_is_not_ours_would_be_noticed() -> None:
    assert len(QUOTED) > 20
    assert parts_not_in_the_source("error: output: … already holds a runner; name another folder") == [
        "already holds a runner; name another folder",
    ]


def test_the_tests_that_prove_the_numerics_are_there() -> None:
    page = (REPOSITORY / "docs" / "concepts" / "numerics.md").read_text()
    cited = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(cited) > 20
    for file, name in cited:
        (found,) = (REPOSITORY / "tests" / "pipeline").rglob(file)
        assert not name or f"def {name}(" in found.read_text(), (file, name)
