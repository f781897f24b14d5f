"""Commands that start other commands: the launcher, its log, and who may use a folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import InputError


def launcher() -> list[str]:
    """`deepspeed --master_port N` of this Python's environment, else of the PATH, with a port that is free now."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise InputError("there is no command deepspeed; install requirements.txt into this environment")
    with socket.socket() as listener:
        listener.bind(("", 0))
        return [found, "--master_port", str(listener.getsockname()[1])]


def call(line: Sequence[str], log: Path) -> int:
    """Run a command, stdout into `log`.out and stderr into `log`.err; returns its exit status.

    The command leads a process group of its own, so that whatever ends this process ends the ranks too. It inherits
    the lock of the folder (`exclusive_lock`), the only thing here that is inheritable.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, close_fds=False
        )
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a rank in a collective does not hear the first signal
            raise


def end_on_terminate() -> None:
    """Make SIGTERM an exception, so that `call` ends the ranks."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def last_error(log: Path) -> str:
    """The last line that says what went wrong: `error: …` of a command of ours, else the last line of stderr."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    return (told or lines or ["nothing on stderr"])[-1].removeprefix("error: ")


@contextmanager
def exclusive_lock(folder: Path, command: str) -> Iterator[None]:
    """Keep the folder from a second `command`, and from the next one while a training outlives a `kill -9` of this."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is in use by another {command} or by a training that outlived one; wait, or end it"
            ) from None
        os.set_inheritable(lock.fileno(), True)
        yield
