"""A sweep that is killed, that fails in part, or that two want at once: nothing is lost and nothing is done twice."""

import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eval import frontier
from eval.sweep import axes, launch
from pipeline.config.schema import REPOSITORY
from pipeline.distributed.signals import INTERRUPTED
from tests.eval.pretender import GRID, Pretender


def test_a_kill_loses_nothing(pretender: Pretender, command: Callable[..., int], tmp_path: Path) -> None:
    def kill_in_third_training(number: int, folder: Path, log: Path) -> None:
        if number == 5:
            (folder / "exports").mkdir(parents=True)
            raise KeyboardInterrupt

    pretender.before = kill_in_third_training
    assert command(*GRID) == INTERRUPTED
    assert len(json.loads((tmp_path / "out" / "frontier.json").read_text())["runs"]) == 2
    left_over = tmp_path / "out" / "runs" / "plain" / "synthesis.gamma=1" / "seed-0"
    assert left_over.is_dir()

    pretender.lines.clear()
    pretender.before = lambda number, folder, log: None
    assert command(*GRID) == 0
    assert len(pretender.lines) == 2 * 6 and pretender.told()[0] == ("train", "plain/synthesis.gamma=1/seed-0")
    assert not (left_over / "exports").exists() and "--resume" not in pretender.lines[0]
    assert len(json.loads((tmp_path / "out" / "frontier.json").read_text())["runs"]) == 8


def test_checkpoints_are_resumed_and_finished_training_is_only_evaluated(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path
) -> None:
    runs = tmp_path / "out" / "runs" / "sago" / "recipe"
    checkpoint = runs / "seed-0" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").touch()
    pretender.train(runs / "seed-1", {"--method": "sago", "--seed": "1"})
    assert command("--methods", "sago", "--seeds", 0, 1) == 0
    expected = (("train", 0), ("evaluate", 0), ("evaluate", 1))
    assert pretender.told() == [(what, f"sago/recipe/seed-{seed}") for what, seed in expected]
    assert pretender.lines[0][-1] == "--resume" and checkpoint.is_dir()


RANGE = ("--methods", "sago", "--seeds", 0, "--sweep", "synthesis.gamma=0.01:10", "optimizer.lr=1,2", "--trials", 14)


def test_an_interrupted_study_proposes_what_it_would_have(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontier, "write_report", lambda plan: [])  # it takes most of the time
    assert command(*RANGE) == 0
    whole = [folder for what, folder in pretender.told() if what == "train"]
    gammas = [float(axes.parse_setting(folder.split("/")[1])["synthesis.gamma"]) for folder in whole]
    assert len(whole) == 14 and all(0.01 <= gamma <= 10 for gamma in gammas)
    assert {axes.parse_setting(folder.split("/")[1])["optimizer.lr"] for folder in whole} == {"1", "2"}
    # What the estimator proposes after its ten random settings lies nearer to 0.3, the best, than those do.
    distances = [abs(math.log(gamma / 0.3)) for gamma in gammas]
    assert sum(distances[10:]) / 4 < sum(distances[:10]) / 10
    pretender.lines.clear()
    assert command(*RANGE) == 0 and pretender.lines == []

    shutil.rmtree(tmp_path / "out")

    def kill(number: int, folder: Path, log: Path) -> None:
        if number == 25:  # the thirteenth training
            raise KeyboardInterrupt

    pretender.before = kill
    assert command(*RANGE) == INTERRUPTED
    pretender.lines.pop()
    pretender.before = lambda number, folder, log: None
    assert command(*RANGE) == 0
    assert [folder for what, folder in pretender.told() if what == "train"] == whole


def test_a_failed_run_is_told_and_the_others_go_on(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(number: int, folder: Path, log: Path) -> int | None:
        training = log.name.endswith(".training")
        if "plain" not in str(folder) or training != (folder.name == "seed-0"):
            return None  # of plain, seed 0 fails in training and seed 1 in evaluation
        log.parent.mkdir(parents=True, exist_ok=True)
        told = "error: no key 'gama'; did you mean 'gamma'?" if training else "RuntimeError: 10 steps"
        Path(f"{log}.err").write_text(f"0%|  |\rTraceback\n{told}\n\n")
        return 1 + training

    pretender.before = fail
    assert command("--methods", "plain", "sago", "--seeds", 0, 1) == 1
    output = capsys.readouterr()
    assert "2 of 4 runs failed" in output.err and output.err.count("\n") == 3
    answer = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [(run["method"], run["seed"]) for run in answer["runs"]] == [("sago", 0), ("sago", 1)]
    first, second = answer["failures"]
    assert (first["method"], first["seed"], first["what"], first["status"]) == ("plain", 0, "training", 2)
    assert first["lines"] == ["0%|  |", "Traceback", "error: no key 'gama'; did you mean 'gamma'?"]
    assert (second["seed"], second["what"], second["status"]) == (1, "evaluating", 1)
    text = (tmp_path / "out" / "frontier.md").read_text()
    assert "| no key 'gama'; did you mean 'gamma'? |" in text and "| RuntimeError: 10 steps |" in text
    assert str(tmp_path / "out" / "runs" / "plain" / "recipe" / "seed-0.training.err") in text

    pretender.before = lambda number, folder, log: None
    pretender.lines.clear()
    assert command("--methods", "plain", "sago", "--seeds", 0, 1) == 0  # the same command tries them again
    expected = (("train", 0), ("evaluate", 0), ("evaluate", 1))
    assert pretender.told() == [(what, f"plain/recipe/seed-{seed}") for what, seed in expected]
    assert json.loads((tmp_path / "out" / "frontier.json").read_text())["failures"] == []


def test_where_every_run_fails_the_slip_can_be_repaired(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path
) -> None:
    def fail(number: int, folder: Path, log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{log}.err").touch()
        return 2

    pretender.before = fail
    assert command("--methods", "sago", "--seeds", 0) == 1
    text = (tmp_path / "out" / "frontier.md").read_text()
    assert "No run has finished" in text and "nothing on stderr" in text
    assert json.loads((tmp_path / "out" / "frontier.json").read_text())["runs"] == []
    pretender.before = lambda number, folder, log: None
    assert command("--methods", "sago", "--seeds", 0, "--", "--b", 1) == 0


def test_a_setting_that_fails_counts_as_tried(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path
) -> None:
    def fail(number: int, folder: Path, log: Path) -> int | None:
        log.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{log}.err").write_text("RuntimeError: 10 steps in a row had a non-finite gradient\n")
        return 1 if number in (1, 6) else None

    pretender.before = fail
    line = ("--methods", "sago", "--seeds", 0, "--sweep", "synthesis.gamma=0.01:10", "--trials", 4)
    assert command(*line) == 1
    settings = [folder for what, folder in pretender.told() if what == "train"]
    assert len(set(settings)) == len(settings) == 4
    pretender.lines.clear()
    assert command(*line) == 0 and pretender.lines == []
    answer = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert len(answer["runs"]) == 2 and len(answer["failures"]) == 2


def test_a_folder_has_one_user(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even a `kill -9` of the command does not free the folder while what it started lives."""
    with launch.exclusive_lock(tmp_path / "out", "eval.frontier"):
        assert command("--methods", "sago") == 2
        assert "in use" in capsys.readouterr().err and pretender.lines == []
        child = subprocess.Popen(["sleep", "60"], close_fds=False)  # as `launch.call` starts its commands
    assert command("--methods", "sago") == 2
    child.kill()
    child.wait()
    assert command("--methods", "sago") == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_hindrance(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lustre as it is mounted by default; a run goes on there too."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with launch.exclusive_lock(tmp_path, "eval.frontier"):
        assert launch.call(["true"], tmp_path / "log") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and str(tmp_path) in line and "eval.frontier" in line
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(number)), launch.exclusive_lock(tmp_path, "eval.frontier"):
        pass


def test_what_ends_the_command_ends_what_it_called(tmp_path: Path) -> None:
    """A process that a killed child leaves behind would go on writing into a run folder that is begun again."""
    script = (
        "import pathlib; from eval.sweep import launch\n"
        "launch.end_on_terminate()\n"
        f"launch.call(['sh', '-c', 'sleep 60 & echo $!; wait'], pathlib.Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    out = tmp_path / "log.out"
    for _ in range(400):
        if out.is_file() and out.read_text().strip():
            break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    process.terminate()
    assert process.wait(30) == 143
    status = Path(f"/proc/{int(out.read_text())}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
