"""The scores of a run's models in its TensorBoard log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from eval.files import read_config, read_log
from eval.results.general import GENERAL
from eval.results.metrics import MEASURES, flatten, headlines, suite_of
from pipeline.files import Json, whole

# Groups sort after the probes of a training and before its losses (pipeline/monitoring/tensorboard.py): first the pair
# by which reports compare, then the other scores of the suite. General ability, many tasks, comes last.
PAIR, OTHERS, ABILITY = "1_scores", "1_scores_others", "5_general"

# TensorBoard reads the files of a folder in the order of their names, and what a training begins with discards what it
# has read by then: these are the last. A suite has its own, which a later evaluation of it replaces.
FILE = "events.out.tfevents.9999999999.evaluation.{suite}"


def write_to_board(models: Sequence[tuple[int | None, Path]], entries: Sequence[Json]) -> None:
    """Write the headline scores of the exports of a run as scalars by step, and its forget and retain score to HParams.

    They replace those of an earlier evaluation of the suite. Models of no run with a TensorBoard log get nothing.

    Args:
        models: (step or None, folder) as `find_models` returns them.
        entries: what `evaluate_all` made of each.
    """
    run = run_of(models[-1][1].resolve())
    if run is None:
        return
    steps = read_log(run).steps
    last = steps[-1]["step"] if steps else 0
    # The prefix that training gives its tags too: the axes of a run that does not unlearn are its own.
    prefix = "training/" if read_config(run, ["objective"])["objective"].get("forget") == "none" else ""
    for suite in entries[0]["suites"]:
        with whole(run / "tensorboard" / FILE.format(suite=suite)) as unfinished, unfinished.open("wb") as opened:
            writer = RecordWriter(opened)
            writer.write(Event(file_version="brain.Event:2").SerializeToString())
            for (_, path), entry in zip(models, entries, strict=True):
                export = re.fullmatch(r"step-(\d+)", path.resolve().name)
                values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars(entry, suite, prefix).items()]
                event = Event(
                    step=int(export[1]) if export else last,
                    wall_time=path.stat().st_mtime,
                    summary=Summary(value=values),
                )
                writer.write(event.SerializeToString())


def run_of(model: Path) -> Path | None:
    """The run folder with a TensorBoard log of which `model` is final/ or one of exports/; None for another model."""
    run = model.parent if model.name == "final" else model.parent.parent if model.parent.name == "exports" else None
    return run if run and (run / "tensorboard").is_dir() and (run / "metrics.jsonl").is_file() else None


def scalars(entry: Mapping[str, Json], suite: str, prefix: str) -> dict[str, float]:
    """{tag: score} of one model: every headline score of `suite`, and the pair by which reports compare it, if any."""
    every: dict[str, float] = {}
    for name, scored in entry["suites"].items():
        every |= flatten(scored["metrics"], name)
    own = [score for score in every if suite_of(score) == suite]
    pair = next((one for one in MEASURES if one.suite == suite and one.forget in every and one.retain in every), None)
    first = (pair.forget, pair.retain) if pair else ()
    found = {}
    for score in dict.fromkeys([*first, *(headlines(own) or own)]):
        group = PAIR if score in first else ABILITY if suite in GENERAL else OTHERS
        found[f"{prefix}{group}/{score}"] = every[score]
    if pair is not None:
        found |= {"result/forget_score": every[pair.forget], "result/retain_score": every[pair.retain]}
    return found
