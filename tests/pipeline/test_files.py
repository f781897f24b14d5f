"""What is written is whole or absent: after an error, after a kill at every moment, after the power fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.schema import REPOSITORY
from pipeline.files import remove_unfinished, remove_whole, whole, write_whole

KILLED = """
import os, sys
from pathlib import Path
from pipeline import files

# Ends the process as SIGKILL does, at the call of this number among those that touch the disk.
left = int(sys.argv[2])
def counting(call):
    def wrapper(*arguments, **named):
        global left
        if not left:
            os._exit(9)
        left -= 1
        return call(*arguments, **named)
    return wrapper
for name in ("open", "fsync", "replace", "unlink", "rmdir"):
    setattr(os, name, counting(getattr(os, name)))
with files.whole(Path(sys.argv[1])) as unfinished:
    unfinished.mkdir()
    for name in "ab":
        (unfinished / name).write_text("new")
        counting(bool)()
    files.remove_whole(Path(sys.argv[1]))
"""


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("before", [None, {"a": "old", "c": "old"}], ids=["nothing before", "a full folder before"])
def test_a_kill_at_any_moment_leaves_all_or_nothing(before: dict[str, str] | None, tmp_path: Path) -> None:
    found = []
    for moment in range(100):
        place = tmp_path / str(moment)
        if before is not None:
            place.mkdir()
            for name, text in before.items():
                (place / name).write_text(text)
        ended = subprocess.run([sys.executable, "-c", KILLED, str(place), str(moment)], cwd=REPOSITORY, check=False)
        found.append(content(place) if place.exists() else None)
        remove_unfinished(tmp_path)
        assert not list(tmp_path.glob(".*"))
        if ended.returncode == 0:
            break
        assert ended.returncode == 9
    written = {"a": "new", "b": "new"}
    renamed = found.index(written)
    old = next((moment for moment, it in enumerate(found) if it != before), 0)  # moments of the folder before
    assert found == [before] * old + [None] * (renamed - old) + [written] * (len(found) - renamed)
    assert renamed >= 8 and found[-1] == written


def disk_calls(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> list[tuple[str, str]]:
    """(call, path) of each fsync and rename that `work` makes; the kernel names the paths."""
    made: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(handle: int) -> None:
        made.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noting_replace(source: Path, target: Path) -> None:
        made.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    work()
    monkeypatch.undo()
    return made


def test_all_of_it_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        with whole(tmp_path / "model") as unfinished:
            (unfinished / "inner").mkdir(parents=True)
            (unfinished / "inner" / "weights").write_bytes(b"1")
            (unfinished / "config").write_bytes(b"2")

    *before, (call, renamed), (_, last) = disk_calls(monkeypatch, write)
    parts = {Path(path).relative_to(tmp_path).parts[1:] for call, path in before if call == "fsync"}
    assert parts == {(), ("config",), ("inner",), ("inner", "weights")} and len(before) == 4
    assert (call, renamed, last) == ("replace", str(tmp_path / "model"), str(tmp_path))

    calls = disk_calls(monkeypatch, lambda: write_whole(tmp_path / "file", "text"))
    assert [call for call, _ in calls] == ["fsync", "replace", "fsync"] and calls[2][1] == str(tmp_path)


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "deep" / "file", "old ü\n")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "deep" / "file") as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), whole(tmp_path / "deep" / "file"):
        pass  # nothing was written
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "file").read_bytes() == "old ü\n".encode()


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").touch()
    with pytest.raises(OSError), whole(tmp_path / "mine") as unfinished:
        unfinished.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and (tmp_path / "mine" / "text").exists()


def test_a_folder_is_removed_at_once_or_not_at_all(tmp_path: Path) -> None:
    remove_whole(tmp_path / "absent")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").touch()
    remove_whole(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    with whole(tmp_path / "file") as one, whole(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"  # the last to end


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    for umask in (0o022, 0o077, 0o002):
        before = os.umask(umask)
        try:
            write_whole(tmp_path / "file", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
