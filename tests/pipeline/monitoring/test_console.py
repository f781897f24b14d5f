"""What stands on the console and in log.txt; the numbers of the summary."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.schema import REPOSITORY
from pipeline.monitoring import console
from pipeline.monitoring.metrics import Monitor, results
from pipeline.monitoring.rows import Rows
from tests.pipeline.monitoring.base import rows


def test_without_a_terminal_plain_lines_and_a_summary(told: dict[str, Any]) -> None:
    done, run = told["first"], told["run"]
    assert done.stdout == "" and "\r" not in done.stderr and "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) < 20
    assert [line.split(":")[0] for line in lines[:2]] == ["data.forget", "data.retain"]  # how much of them is used
    assert next(line for line in lines[2:] if not line.startswith("warning: ")).startswith("step 1 of 4: forget ")
    assert any(line.startswith("step 4 of 4: forget ") and "0:00:00 left" in line for line in lines)
    losses = [row["retain_loss"] for row in rows(run)]
    line = next(line for line in lines if line.strip().startswith("retain loss"))
    assert [float(number) for number in line.split()[2::2]] == pytest.approx([losses[0], losses[-1]], rel=1e-3)
    assert any(re.match(rf"  model +{re.escape(str(run / 'final'))}$", line) for line in lines)
    proposed = ["--model", str(run / "final"), "--suite", "corpus", "--output", str(run / "evaluation.json")]
    assert shlex.split(lines[-1]) == ["next", "python", "-m", "eval.run", *proposed]
    assert shlex.split(lines[-2]) == ["chat", "python", "-m", "eval.chat", "--model", str(run)]


def test_quiet_says_nothing(told: dict[str, Any]) -> None:
    assert told["second"].stderr == "" and told["second"].stdout == ""


def test_what_libraries_say_is_in_the_log(told: dict[str, Any]) -> None:
    assert "DeepSpeed Final Optimizer" in told["log"] and "rank 0 INFO pipeline: step 4 of 4" in told["log"]
    assert "DeepSpeed" not in told["first"].stderr
    assert (told["run"] / "log.txt").read_text().startswith(told["log"])  # the resumed run goes on below


def test_warnings_once_errors_always(tmp_path: Path) -> None:
    """In processes of their own, one for each of two ranks: it takes over Python's logging."""
    code = """
import logging, os, sys, warnings
from pathlib import Path
import datasets, transformers
from pipeline.monitoring import console
rank, folder = 1 if os.fork() else 0, Path(sys.argv[1])
os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
console.setup_logging(rank, quiet=True)
for _ in range(3):
    logging.getLogger("pipeline.data.tokenize").warning("rows are left out")
    logging.getLogger("DeepSpeed").warning("strange")
    logging.getLogger("DeepSpeed").info("chatter")
    warnings.warn("look out", UserWarning, stacklevel=1)
    warnings.warn("renamed soon", FutureWarning, stacklevel=1)
    logging.getLogger("transformers").warning("flags")
    logging.getLogger("somebody").error("broken")
with console.capture_stdout():
    print("compiling")
assert not (folder / "log.txt").exists()
(folder / str(rank)).mkdir()
console.open_log(folder / str(rank), rank)
if rank:
    os.wait()
"""
    line = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == ""
    written = [(tmp_path / f"stderr-{rank}").read_text().splitlines() for rank in (0, 1)]
    logged = [(tmp_path / str(rank) / "log.txt").read_text() for rank in (0, 1)]
    errors = ["somebody: broken"] * 3
    assert [line for line in written[0] if line in errors] == errors and written[1] == errors
    others = [line for line in written[0] if line not in errors]
    assert others[:2] == ["warning: rows are left out", "warning: DeepSpeed: strange"]
    assert others[2].startswith("warning: python: look out (UserWarning, ") and len(others) == 3
    assert logged[0].count("INFO DeepSpeed: chatter") == 3 and "INFO DeepSpeed: compiling" in logged[0]
    assert "rank 0 INFO python: renamed soon" in logged[0] and logged[0].count("transformers: flags") == 1
    assert (
        "chatter" not in logged[1] and logged[1].count("rank 1 WARNING pipeline.data.tokenize: rows are left out") == 1
    )


def test_on_a_terminal_one_line_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    level = console.logger.level
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for now, is_drawn in ((logging.INFO, True), (logging.WARNING, False)):  # as `listen` sets it; then for --quiet
            console.logger.setLevel(now)
            progress = console.Progress(0, 2)
            for step in (1, 2):
                progress.update(step, {"forget": 0.25, "retain": None})
            progress.close()
            terminal.write("end")
            terminal.flush()
            seen = ""
            while not seen.endswith("end"):
                seen += os.read(reader, 10000).decode()
            if is_drawn:
                assert "\r" in seen and "2/2" in seen and "forget 0.25" in seen and "retain" not in seen
            else:
                assert seen == "end"
    os.close(reader)
    console.logger.setLevel(level)


def test_results_are_means_and_medians() -> None:
    history = [
        {"forget_loss": float(n), "retain_loss": None, "cos_forget_retain": n / 10, "skipped": int(n == 3)}
        | {"seconds": 1.0 if n else 60.0, "tokens_per_second": n, "peak_memory_bytes": n * 2**30}
        for n in range(20)
    ]
    found = results(history)
    assert found["forget_loss_start"] == 0.5 and found["forget_loss"] == 18.5 and "retain_loss" not in found
    assert found["cos_forget_retain"] == pytest.approx(0.95) and "conflict_fraction" not in found
    assert found["skipped"] == 1 and found["seconds"] == 1.0 and found["peak_memory_gib"] == 19


def test_a_summary_of_a_run_whose_first_loss_was_not_finite(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Its step was skipped and the run went on; the summary is the last thing that a run of hours does."""
    cost = {"seconds": 1.0, "tokens_per_second": 2.0, "peak_memory_bytes": 3.0}
    history = [
        {"step": n + 1, "forget_loss": loss, "skipped": loss is None} | cost for n, loss in enumerate((None, 0.5))
    ]
    log: Any = SimpleNamespace(is_writer=True, rows=Rows(steps=history), probed={}, probes=[], folder=tmp_path)
    with caplog.at_level(logging.INFO, logger="pipeline"):
        Monitor.summarise(log, 1.0)
    assert re.search(r"forget loss +not finite -> 0\.5\n", caplog.text) and "1 skipped" in caplog.text
