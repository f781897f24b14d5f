"""Runs for a report, made by hand; their points are such that matched scores can be computed in the head."""

import json
from pathlib import Path
from typing import Any

import yaml

from eval.results import grouping, trajectories
from eval.results.metrics import MEASURES, ForgetRetainMetric

BIOS = MEASURES[0]
Points = list[tuple[int, float, float]]  # step, forget, retain
REACHES: Points = [(10, 0.5, 0.9), (20, 0.0, 0.7), (30, 0.2, 0.8)]  # 0.1 is 4/5 of the way: step 18, retain 0.74
ON_THE_DOT: Points = [(10, 0.3, 0.8), (20, 0.1, 0.6)]  # step 20, retain 0.6
NEVER: Points = [(10, 0.9, 0.99), (20, 0.4, 0.95)]


def entry(step: int, forget: float, retain: float) -> dict[str, Any]:
    metrics = {"forget": {"FB": forget, "all": forget}, "retain": {"FB": retain, "all": retain}}
    return {"step": step, "suites": {"bios": {"metrics": metrics}}}


def make_run(
    folder: Path, points: Points, *, seed: int = 0, rule: str = "sago", lr: float = 1e-3, **extra: Any
) -> Path:
    """A run of three steps whose third was skipped: no cosines there."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "objective": {"forget": "ga", "retain": "nll"},
        "synthesis": {"rule": rule, "scope": None, "alpha": 1.0, "gamma": 1.0, **extra},
        "optimizer": {"lr": lr},
        "train": {"steps": 3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for step, cosine in ((1, 0.2), (2, 0.6), (3, None)):
        row: dict[str, Any] = {"step": step, "forget_loss": -float(step), "retain_loss": 1 / step}
        row["skipped"] = cosine is None
        row |= {"cos_forget_retain": cosine and -cosine, "cos_combined_forget": cosine, "cos_combined_retain": cosine}
        rows.append(row | {"conflict_fraction": None if rule == "sum" else cosine})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {"trajectory": [entry(*point) for point in points], "command": "python -m eval.run --model it"}
    evaluation |= {"versions": {"torch": "9.9"}, "dtype": "float32"}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def read(*folders: Path, measure: ForgetRetainMetric = BIOS) -> dict[str, list[trajectories.Run]]:
    runs = [trajectories.prepare(trajectories.read_run(folder), measure, None) for folder in folders]
    return grouping.group_runs(runs)


def alter(folder: Path, key: str, value: Any) -> Path:
    """Set one key, dotted, of a run's config.yaml."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section[part] = section.get(part) or {}
        section = section[part]
    section[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def spoil(path: Path, content: str | None) -> None:
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
