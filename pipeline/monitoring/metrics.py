"""Metrics of a run, each with its reduction over ranks: to `metrics.jsonl`, TensorBoard, trackers, progress."""

from __future__ import annotations

import json
import math
import resource
import shlex
import statistics
from collections.abc import Sequence
from datetime import timedelta
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.distributed.errors import raise_on_all_ranks
from pipeline.errors import FatalError, disk_errors
from pipeline.files import Json, sync, write_whole
from pipeline.monitoring import console
from pipeline.monitoring.console import Progress
from pipeline.monitoring.levels import PREFIX, probes_in, short
from pipeline.monitoring.rows import Rows, read_rows
from pipeline.monitoring.tensorboard import COSINES, GIB, PROBED, UPDATE, TensorBoardWriter
from pipeline.monitoring.trackers import ExternalTrackers, Monitored

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Monitor:
    """Collects the metrics of a step with `record` and writes them with `flush`, on rank 0 alone.

    A run that is resumed after `start` steps drops what it logged beyond them: each step is logged once, in order.
    Every rank calls every method: a disk that refuses what rank 0 writes is an error of all. They learn it without a
    collective of its own, from what the next step reduces; so a step later, and before a checkpoint.
    """

    def __init__(self, folder: Path, engine: Monitored, *, start: int, steps: int, has_probes: bool = False) -> None:
        self.folder, self.device = folder, engine.device
        self.trackers = ExternalTrackers(folder, engine, start=start)
        self.values: Json = {}
        self.pending: dict[str, dict[str, torch.Tensor]] = {}
        self.retain_norms: dict[str, float] = {}  # by what ends the names of an update that is recorded
        self.is_writer = dist.get_rank() == 0
        self.rows = Rows()  # on rank 0 those of metrics.jsonl
        self.probed: dict[str, float] = {}  # the numbers of the last probe
        self.log, self.events = folder / "metrics.jsonl", folder / "tensorboard"
        self.refusal: FatalError | None = None  # on rank 0: why the newest row could not be written
        with raise_on_all_ranks():
            if self.is_writer:
                with disk_errors(self.log):
                    self.rows = _keep_rows(self.log, start)
                    self.lines = self.log.open("a", encoding="utf-8", buffering=1)
                with disk_errors(self.events):
                    self.board = TensorBoardWriter(self.events, start=start, has_probes=has_probes)
                self.progress = Progress(start, steps)

    def describe(self, configuration: str, hyperparameters: dict[str, str | float]) -> None:
        """Log the configuration (YAML) and the hyper-parameters by which trackers list the run beside others."""
        with raise_on_all_ranks(), disk_errors(self.events):
            if self.is_writer:
                self.board.writer.add_text("configuration", f"```yaml\n{configuration}```")
                self.board.begin(hyperparameters)
        if self.is_writer:
            self.trackers.begin(hyperparameters)

    @property
    def last(self) -> Json:
        """The newest row of `metrics.jsonl`, on rank 0."""
        return self.rows.steps[-1] if self.rows.steps else {}

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the newest rows are steps without an update; 0 on other ranks, which have no rows."""
        return sum(1 for _ in takewhile(lambda row: row["skipped"], reversed(self.rows.steps)))

    @property
    def probes(self) -> list[tuple[int, dict[str, float]]]:
        """(step, numbers) of the probes so far, on rank 0."""
        return [(row["step"], numbers) for row in self.rows.all if (numbers := probes_in(row))]

    def record(self, name: str, value: float | torch.Tensor | None, reduce: str = "none") -> None:
        """Record a metric of the present step. reduce: `none` (the same on every rank), `sum` or `max` over ranks.

        A name that starts with `_` is reduced and returned by `flush`, but not written.
        """
        self.values[name] = value
        if reduce != "none":
            tensor = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
            self.pending.setdefault(reduce, {})[name] = tensor

    def record_update(
        self, product: float | None, square: float | None, retain_norm: float | None, suffix: str = ""
    ) -> None:
        """Record the update Δθ beside the retain gradient r: `cos_update_retain`, `dot_update_retain`, `update_norm`.

        They are reduced with everything else, so they cost no collective.

        Args:
            product, square: this rank's part of ⟨r, Δθ⟩ and ‖Δθ‖²; None where the update is not known.
            retain_norm: ‖r‖, over all ranks.
            suffix: of the names.
        """
        if product is None or square is None or retain_norm is None:
            for name in UPDATE:
                self.record(f"{name}{suffix}", None)
            return
        self.record(f"dot_update_retain{suffix}", product, reduce="sum")
        self.record(f"_update_square{suffix}", square, reduce="sum")
        self.retain_norms[suffix] = retain_norm

    def _finish_updates(self) -> None:
        for suffix, retain_norm in self.retain_norms.items():
            norm, product = self.values[f"_update_square{suffix}"] ** 0.5, self.values[f"dot_update_retain{suffix}"]
            self.values[f"update_norm{suffix}"] = norm
            self.values[f"cos_update_retain{suffix}"] = product / (norm * retain_norm) if norm * retain_norm else 0.0
        self.retain_norms = {}

    def flush(self, step: int) -> Json:
        """Reduce and write the recorded metrics, and return them; a value that is not finite becomes None.

        Raises:
            FatalError: on all ranks, if the row before this one could not be written.
        """
        self.record("_refused", float(self.refusal is not None), reduce="max")
        for reduce, tensors in self.pending.items():
            stacked = torch.stack(list(tensors.values()))
            dist.all_reduce(stacked, _REDUCTIONS[reduce])
            self.values.update(zip(tensors, stacked.tolist(), strict=True))
        if self.values["_refused"]:
            self.raise_refusal()
        self._finish_updates()
        values = {
            name: None if value is None or not math.isfinite(value) else value for name, value in self.values.items()
        }
        self.values, self.pending = {}, {}
        if self.is_writer:
            written = {name: value for name, value in values.items() if not name.startswith("_")}
            row = {"step": step, **written}
            self.rows.add(row)
            try:
                with disk_errors(self.log):
                    self.lines.write(json.dumps(row) + "\n")
                with disk_errors(self.events):
                    self.board.write(self.rows.all)
            except FatalError as error:
                self.refusal = error
            self.trackers.write(step, written)
            self.show(step, written)
        return values

    def show(self, step: int, values: Json) -> None:
        """The line of progress: the losses of a step, and the last probe."""
        self.probed = probes_in(values) or self.probed
        shown = {"forget": "forget_loss", "retain": "retain_loss", "conflict": "conflict_fraction"}
        if step:
            self.progress.update(step, {label: values.get(name) for label, name in shown.items()} | short(self.probed))
        else:
            text = ", ".join(f"{label} {value:.3g}" for label, value in short(self.probed).items())
            console.logger.info("before training: %s", text)

    def raise_refusal(self) -> None:
        """Raise on all ranks why the newest row could not be written on rank 0, if it could not."""
        with raise_on_all_ranks():
            if self.refusal is not None:
                raise self.refusal

    def sync(self) -> None:
        """Flush the log to disk, before a checkpoint: a run that is killed later does not log these steps again."""
        self.raise_refusal()
        with raise_on_all_ranks(), disk_errors(self.log):
            if self.is_writer:
                sync(self.log)
        with raise_on_all_ranks(), disk_errors(self.events):
            if self.is_writer:
                self.board.writer.flush()

    def finish(self, card: str) -> None:
        """Write the results and the model card (Markdown) after the last step, and close the log."""
        self.raise_refusal()
        with raise_on_all_ranks(), disk_errors(self.events):
            if self.is_writer:
                self.progress.close()
                self.board.end(self.rows.steps, results(self.rows.steps))
                self.board.writer.add_text("model_card", card)
                self.board.writer.flush()  # closing alone reports no failure
                self.board.writer.close()
        with raise_on_all_ranks(), disk_errors(self.log):
            if self.is_writer:
                self.lines.close()
        if self.is_writer:
            self.trackers.finish(results(self.rows.steps), len(self.rows.steps))

    def summarise(self, seconds: float) -> None:
        """Print a summary once the model is exported. seconds: wall time of this process."""
        if not self.is_writer:
            return
        found = results(self.rows.steps)
        took = timedelta(seconds=round(seconds))
        rows = [("steps", f"{len(self.rows.steps)}, of which {found['skipped']:.0f} skipped; {took} this time")]
        for task in ("forget", "retain"):
            ends = [found.get(name) for name in (f"{task}_loss_start", f"{task}_loss")]
            if any(end is not None for end in ends):
                words = ("not finite" if end is None else f"{end:.4g}" for end in ends)
                rows.append((f"{task} loss", " -> ".join(words)))
        for name, what in COSINES.items():
            if name in found:
                rows.append((f"{what}, mean", f"{found[name]:+.3f}"))
        if "conflict_fraction" in found:
            rows.append(("elements in conflict", f"{found['conflict_fraction']:.1%}"))
        for name, value in short(self.probed).items():
            first = short(self.probes[0][1]).get(name, math.nan)
            rows.append((f"probe: {name}", f"{first:.3g} -> {value:.3g}"))
        rows.append(("tokens a second, median", f"{found['tokens_per_second']:,.0f}"))
        rows.append(("peak memory of a rank", f"{found['peak_memory_gib']:.2f} GiB"))
        final, exports = self.folder / "final", self.folder / "exports"
        rows += [("model", str(final)), ("log", str(self.folder / "log.txt"))]
        model = self.folder if exports.is_dir() else final  # every export on the way, if there are any
        forgets, retains = (
            any(row.get(f"{task}_loss") is not None for row in self.rows.steps) for task in ("forget", "retain")
        )
        suite = "corpus" if forgets and retains else "SUITE"  # `corpus` scores the run's own corpora, and needs both
        found_in = ("--model", str(model), "--suite", suite, "--output", str(self.folder / "evaluation.json"))
        rows.append(("chat", f"python -m eval.chat --model {shlex.quote(str(self.folder))}"))
        rows.append(("next", f"python -m eval.run {shlex.join(found_in)}"))
        console.logger.info("%s\n%s", "unlearned" if forgets else "trained", console.table(rows))


def results(history: Sequence[Json]) -> dict[str, float]:
    """The results of a run. history: all rows of `metrics.jsonl`, at least one.

    Losses are means over the last tenth of the steps (`_start`: the first tenth), geometry over all steps, time is a
    median; extraction strengths are those of the last probe. A metric without a value in any step is absent.
    """

    def of(name: str, rows: Sequence[Json] = history) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    tenth = -(-len(history) // 10)
    means = {
        f"{task}_loss{part}": of(f"{task}_loss", rows)
        for task in ("forget", "retain")
        for part, rows in (("_start", history[:tenth]), ("", history[-tenth:]))
    }
    means |= {name: of(name) for name in (*COSINES, "conflict_fraction")}
    found = {name: sum(values) / len(values) for name, values in means.items() if values}
    for name in PROBED:
        task, _, measure = name.partition("_")
        if probed := of(f"{PREFIX}{task}/{measure}"):
            found[name] = probed[-1]
    found["skipped"] = sum(of("skipped"))
    found |= {name: statistics.median(of(name)) for name in ("seconds", "tokens_per_second")}
    found["peak_memory_gib"] = max(of("peak_memory_bytes")) / GIB
    return found


def _keep_rows(file: Path, start: int) -> Rows:
    """Truncate a log to its rows up to step `start`, atomically, and return them.

    Without a step, the row before the first is dropped too, because the probe is made again.
    """
    if not file.exists():
        return Rows()
    earlier, rows = list[str](), list[tuple[str, Json]]()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True) if start else [], 1):
        earlier.append(line)
        rows.append((f"{file}, line {number}", json.loads(line)))
        if rows[-1][1]["step"] == start:  # the next line may be cut short
            break
    write_whole(file, "".join(earlier))
    return read_rows(rows)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated by torch on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
