"""The command on a small run, and what it logged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.reporting.board import write_to_board
from pipeline.config.schema import REPOSITORY

STEPS = 4


def train(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.train", "--config", str(config), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluate(run: Path, scores: dict[int, float]) -> None:
    """What `eval.run` does once it has scored the exports of a run; of the last step, final/."""
    models: list[tuple[int | None, Path]] = []
    entries = []
    for step, score in scores.items():
        folder = run / "final" if step == max(scores) else run / "exports" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        models.append((step, folder))
        metrics = {"forget": {"all": score, "city": 0.9}, "retain": {"all": 1 - score}}
        entries.append({"step": step, "model": str(folder), "suites": {"bios": {"metrics": metrics}}})
    write_to_board(models, entries)


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} as TensorBoard reads it."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
