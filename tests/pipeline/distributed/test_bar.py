"""Progress bars: one form, whole numbers on a narrow terminal, and nothing left where a result follows."""

from __future__ import annotations

import ast
import fcntl
import os
import pty
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterable
from contextlib import closing

import pytest

from pipeline.config.schema import REPOSITORY
from pipeline.distributed.bar import Bar
from pipeline.monitoring.console import Progress


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], None], columns: int = 80) -> list[str]:
    """The states of a terminal's line while `draw` runs, the last of them what stays."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writer, "w") as terminal, closing(os.fdopen(reader, "rb", buffering=0)) as screen:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            draw()
        terminal.write("\rend")
        terminal.flush()
        seen = b""
        while not seen.endswith(b"\rend"):
            seen += screen.read(10000)
    return [line.rstrip() for line in seen.decode().removesuffix("\rend").replace("\r\n", "").split("\r")]


def test_a_bar_counts_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(items: Iterable[int]) -> None:
        for _ in Bar(items, title="batch", is_shown=True):
            time.sleep(0.6)  # longer than the time between two drawings

    states = drawn(monkeypatch, lambda: draw([0, 1]))
    assert any(state.startswith("batch 1/2: ") and state.endswith("|") for state in states), states
    assert states[-1] == "", states
    states = drawn(monkeypatch, lambda: draw(iter([0, 1])))  # how many there are is not known
    assert any(state.startswith("batch 1: ") for state in states) and states[-1] == "", states


def test_the_pace_is_that_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 steps of 10 were there already; 2 more took 20 seconds; 4 remain, of 10 s each."""

    def draw() -> None:
        bar = Bar(title="step", total=10, initial=4, is_shown=True, leave=True)
        bar.start_t -= 20
        bar.n = 6
        bar.refresh()

    assert any(state.startswith("step 6/10: 10 s each, 00:40 left |") for state in drawn(monkeypatch, draw))


@pytest.mark.parametrize("columns", [80, 120])
def test_a_narrow_terminal_cuts_the_bar_and_no_number(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    def draw() -> None:
        progress = Progress(12, 100)
        progress.bar.start_t -= 33.9
        progress.update(13, {"forget": 13.87, "retain": 3.841, "conflict": 0.5644})
        progress.bar.refresh()
        progress.close()

    monkeypatch.setattr("pipeline.monitoring.console.is_live", lambda: True)
    last = drawn(monkeypatch, draw, columns)[-1]
    assert last.startswith("step 13/100: 33.9 s each, ") and "forget 13.9, retain 3.84, conflict 0.564" in last
    assert len(last) <= columns


def test_every_bar_is_of_this_form() -> None:
    """A call of tqdm itself would bring its own units, and lines that stay."""
    calls = [
        f"{file.relative_to(REPOSITORY)}:{node.lineno}"
        for folder in ("pipeline", "eval", "launch")
        for file in sorted((REPOSITORY / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("tqdm", "trange")
    ]
    assert not calls, calls
