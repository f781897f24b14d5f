"""Logging: a line of progress and each warning once on stderr, everything in the run folder's `log.txt`.

Rank 0 prints. Other ranks print errors only and log their warnings. Nothing is written before `open_log`, so a run that
is refused leaves no trace.
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

from pipeline.distributed.bar import Bar
from pipeline.distributed.terminal import can_redraw

PROGRESS_EVERY_S = 10.0  # between two lines of progress where stderr is no terminal


logger = logging.getLogger("pipeline")


_log = MemoryHandler(capacity=0, flushOnClose=False)  # buffers records until `open_log` gives it a file


def setup_logging(rank: int, quiet: bool = False) -> None:
    """Route the records of program, libraries and Python's warnings. quiet: print warnings and errors only."""
    quiet_libraries()
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)  # for log.txt; `_Terminal` prints none of it
    transformers, datasets = logging.getLogger("transformers"), logging.getLogger("datasets")
    transformers.setLevel(logging.WARNING)
    datasets.setLevel(logging.WARNING)
    for library in (logging.getLogger("DeepSpeed"), transformers, datasets, logging.getLogger("huggingface_hub")):
        library.handlers.clear()  # the libraries' own handlers print, DeepSpeed's on stdout
        library.propagate = True
    logging.getLogger("python").setLevel(logging.INFO)
    warnings.showwarning = _python_warning
    threading.excepthook = _thread_ended
    logging.raiseExceptions = False  # the writer that needs the disk reports that it is full, once
    logger.setLevel(logging.INFO if rank == 0 and not quiet else logging.WARNING)
    _log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    shown = _Terminal(logging.INFO if rank == 0 else logging.ERROR)
    for handler in (_log, shown):
        handler.addFilter(DedupFilter())
        logging.getLogger().addHandler(handler)


def quiet_libraries() -> None:
    """Let the libraries print warnings and errors only: the program has its own progress line."""
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
    """Write records to `folder/log.txt` from now on, those of before included."""
    file = logging.FileHandler(folder / "log.txt", mode="a", encoding="utf-8")
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    _log.setTarget(file)
    _log.flush()


def log_end(error: BaseException) -> bool:
    """Log the error that ends this process (`distributed.errors.report` prints it); returns whether a log is open."""
    cause = (type(error), error, error.__traceback__)
    _log.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "the run ends here", (), cause))
    return _log.target is not None


def is_live() -> bool:
    """Whether a progress bar may be redrawn: a terminal that has a width, on rank 0, without --quiet."""
    return logger.isEnabledFor(logging.INFO) and can_redraw(sys.stderr)


@contextmanager
def capture_stdout() -> Iterator[None]:
    """Log what is printed inside: DeepSpeed's compiled extensions write to the stdout of the process."""
    sys.stdout.flush()
    stdout = os.dup(1)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as captured:
        os.dup2(captured.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
            captured.seek(0)
            for line in captured.read().splitlines():
                logging.getLogger("DeepSpeed").info(line)


def _python_warning(message: Warning | str, category: type[Warning], file: str, line: int, *_: object) -> None:
    """For `warnings.showwarning`: warnings for developers of a library are logged, the others also printed."""
    for_developers = issubclass(category, FutureWarning | DeprecationWarning | PendingDeprecationWarning)
    level = logging.INFO if for_developers else logging.WARNING
    logging.getLogger("python").log(
        level, "%s (%s, %s:%d)", " ".join(str(message).split()), category.__name__, file, line
    )


def _thread_ended(failed: threading.ExceptHookArgs) -> None:
    """For `threading.excepthook`: the error of a writing thread reaches its caller, who reports it; log it alone."""
    if isinstance(failed.exc_value, OSError):
        cause = (failed.exc_type, failed.exc_value, failed.exc_traceback)
        logging.getLogger("python").info("a thread ended", exc_info=cause)
    else:
        threading.__excepthook__(failed)


class DedupFilter(logging.Filter):
    """Lets each warning through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        is_new = text not in self.seen
        self.seen.add(text)
        return is_new


class _Terminal(logging.Handler):
    """Prints records on stderr, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        source = record.name.split(".")[0]
        # transformers and datasets warn of things that the user did not do
        least = {"pipeline": logging.INFO, "transformers": logging.ERROR, "datasets": logging.ERROR}
        if record.levelno >= least.get(source, logging.WARNING):
            origin = "" if source == "pipeline" else f"{source}: "
            prefix = "warning: " if record.levelno == logging.WARNING else ""
            tqdm.write(prefix + origin + self.format(record), file=sys.stderr)


class Progress:
    """A bar that is redrawn; without a terminal, a line at most every `PROGRESS_EVERY_S` seconds, and a last one."""

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.steps = start, steps
        self.began, self.printed = time.monotonic(), float("-inf")
        self.bar = Bar(title="step", total=steps, initial=start, is_shown=is_live(), leave=True)

    def update(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Show the numbers, by label, after `step` steps; None is left out."""
        text = ", ".join(f"{label} {value:.3g}" for label, value in numbers.items() if value is not None)
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif step == self.steps or now - self.printed >= PROGRESS_EVERY_S:
            self.printed = now
            pace = (now - self.began) / max(step - self.start, 1)
            left = timedelta(seconds=round(pace * (self.steps - step)))
            logger.info("step %d of %d: %s; %.3g s a step, %s left", step, self.steps, text, pace, left)

    def close(self) -> None:
        self.bar.close()


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of (label, value) as two aligned columns."""
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"  {what:<{width}}  {value}" for what, value in rows)
