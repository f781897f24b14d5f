"""One rank of a run whose stages are marked, for a sampler outside: `python -m tests.scale.stages MARKS -- OPTIONS`.

Marks are lines of `MARKS/RANK.txt`: the time, the CPU seconds of the process, the stage that begins.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

PAUSE = 0.1  # seconds before a mark, for the sampler
FILE_BYTES = 2**24  # of an export, where models are small enough for a test


class Marks:
    def __init__(self, folder: Path) -> None:
        self.file = folder / f"{os.environ['RANK']}.txt"
        self.file.write_text(f"{os.getpid()}\n")

    def begin(self, stage: str) -> None:
        """What the stage before has freed goes back to the system, or it would hide what this one takes."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        time.sleep(PAUSE)
        with self.file.open("a") as file:
            file.write(f"{time.time()} {time.process_time()} {stage}\n")


def main(arguments: list[str]) -> None:
    marks = Marks(Path(arguments[0]))
    marks.begin("import")
    from pipeline import trainer
    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.load import parse_command_line
    from pipeline.distributed import process_group
    from pipeline.modeling.export import export
    from pipeline.zero import checkpoint

    config, resume, quiet = parse_command_line(arguments[2:])
    load = checkpoint.load

    def marked_load(*inputs: Any) -> int:
        marks.begin("resume")
        step = load(*inputs)
        marks.begin("resumed")
        return step

    checkpoint.load = marked_load
    marks.begin("load")
    found = trainer.setup(config, deepspeed_config(config), resume, quiet)
    assert found is not None
    run = found.run
    for step in range(run.start, run.steps):
        marks.begin("train")
        found.train_step(step)
        if step + 2 == run.steps:  # a resumed run does the last step again
            marks.begin("checkpoint")
            checkpoint.save(found.engine, found.combiner, run.folder, step + 1, keep=1, identity=run.fingerprint)
    marks.begin("export")
    target = run.folder / ("exports" if not resume else "resumed") / "step"
    export(run.model, run.tokenizer, target, None, None, FILE_BYTES)
    marks.begin("end")
    process_group.leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
