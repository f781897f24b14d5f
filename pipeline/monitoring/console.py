"""What a run says, and where: one calm line and each warning once on stderr, all of it in the run folder's `log.txt`.

Rank 0 speaks; of the others only their errors are shown, and their warnings logged. Nothing is written before
`open_log`, so a run that is refused leaves no trace.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

PAUSE = 10.0  # seconds between two lines of progress where no line can be redrawn


logger = logging.getLogger("pipeline")


_log = MemoryHandler(capacity=0, flushOnClose=False)  # keeps what is said until `open_log` gives it a file


def setup_logging(rank: int, quiet: bool = False) -> None:
    """Take over what this process says: program, libraries, Python's warnings. quiet: show warnings and errors only."""
    quiet_libraries()
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)  # into the log; `_Terminal` shows none of it
    transformers, datasets = logging.getLogger("transformers"), logging.getLogger("datasets")
    transformers.setLevel(logging.WARNING)
    datasets.setLevel(logging.WARNING)
    for library in (logging.getLogger("DeepSpeed"), transformers, datasets, logging.getLogger("huggingface_hub")):
        library.handlers.clear()  # they print by themselves, DeepSpeed on stdout
        library.propagate = True
    logging.getLogger("python").setLevel(logging.INFO)
    warnings.showwarning = _python_warning
    threading.excepthook = _thread_ended
    logging.raiseExceptions = False  # a full disk is told once, by what cannot do without it
    logger.setLevel(logging.INFO if rank == 0 and not quiet else logging.WARNING)
    _log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    shown = _Terminal(logging.INFO if rank == 0 else logging.ERROR)
    for handler in (_log, shown):
        handler.addFilter(DedupFilter())
        logging.getLogger().addHandler(handler)


def quiet_libraries() -> None:
    """Warnings and errors of the libraries only: the program has its own progress line."""
    import datasets
    import transformers

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 wants to rename, hundreds of times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def open_log(folder: Path, rank: int) -> None:
    """From now on into `folder/log.txt`, and what was said before as well."""
    file = logging.FileHandler(folder / "log.txt", mode="a", encoding="utf-8")
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    _log.setTarget(file)
    _log.flush()


def log_end(error: BaseException) -> bool:
    """Why this process ends, into the log alone: `ranks.report` tells stderr. Returns whether there is a log yet."""
    cause = (type(error), error, error.__traceback__)
    _log.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "the run ends here", (), cause))
    return _log.target is not None


def is_live() -> bool:
    """Whether a line may be drawn over and over: a terminal on rank 0 of a run that is not to be quiet."""
    return logger.isEnabledFor(logging.INFO) and sys.stderr.isatty()


@contextmanager
def capture_stdout() -> Iterator[None]:
    """What is printed inside goes to the log: DeepSpeed's compiled extensions write to the stdout of the process."""
    sys.stdout.flush()
    stdout = os.dup(1)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        os.dup2(said.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
            said.seek(0)
            for line in said.read().splitlines():
                logging.getLogger("DeepSpeed").info(line)


def _python_warning(message: Warning | str, category: type[Warning], file: str, line: int, *_: object) -> None:
    """As `warnings.showwarning`; what only developers of a library can act on is logged and not shown."""
    for_developers = issubclass(category, FutureWarning | DeprecationWarning | PendingDeprecationWarning)
    level = logging.INFO if for_developers else logging.WARNING
    logging.getLogger("python").log(
        level, "%s (%s, %s:%d)", " ".join(str(message).split()), category.__name__, file, line
    )


def _thread_ended(failed: threading.ExceptHookArgs) -> None:
    """A thread that writes: what waits for it is given the error and tells it, so it is logged and not shown."""
    if isinstance(failed.exc_value, OSError):
        cause = (failed.exc_type, failed.exc_value, failed.exc_traceback)
        logging.getLogger("python").info("a thread ended", exc_info=cause)
    else:
        threading.__excepthook__(failed)


class DedupFilter(logging.Filter):
    """No warning twice."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        is_new = text not in self.said
        self.said.add(text)
        return is_new


class _Terminal(logging.Handler):
    """Lines on stderr, above the progress line where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        source = record.name.split(".")[0]
        # transformers and datasets warn of what is none of the user's doing
        least = {"pipeline": logging.INFO, "transformers": logging.ERROR, "datasets": logging.ERROR}
        if record.levelno >= least.get(source, logging.WARNING):
            origin = "" if source == "pipeline" else f"{source}: "
            prefix = "warning: " if record.levelno == logging.WARNING else ""
            tqdm.write(prefix + origin + self.format(record), file=sys.stderr)


class Progress:
    """One line that is redrawn; where there is no terminal, a plain one at most every `PAUSE` seconds, and the last."""

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.steps = start, steps
        self.began, self.told = time.monotonic(), float("-inf")
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc="unlearning",
            unit=" steps",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not is_live(),
        )

    def update(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """`step` steps are done. `numbers`: what to show, by its label; None is left out."""
        text = ", ".join(f"{label} {value:.3g}" for label, value in numbers.items() if value is not None)
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif step == self.steps or now - self.told >= PAUSE:
            self.told = now
            pace = (now - self.began) / max(step - self.start, 1)
            left = timedelta(seconds=round(pace * (self.steps - step)))
            logger.info("step %d of %d: %s; %.3g s a step, %s left", step, self.steps, text, pace, left)

    def close(self) -> None:
        self.bar.close()


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns: what, and how much."""
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"  {what:<{width}}  {value}" for what, value in rows)
