"""Run folders as training and evaluation leave them, made by hand."""

import json
from pathlib import Path
from typing import Any

import yaml

Suites = dict[str, dict[str, Any]]  # suite -> metrics


def make_run(folder: Path, exports: list[Suites], *, rule: str = "sago", seed: int = 0, **steps: Any) -> Path:
    """A run whose exports are 10 steps apart; `steps` are lists of further logged numbers, one a step."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "model": {"path": "some/model"},
        "objective": {"forget": "npo", "retain": "nll"},
        "synthesis": {"rule": rule, "alpha": 1.0, "gamma": 1.0},
        "optimizer": {"lr": 1e-3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    needed = ("forget_loss", "retain_loss", "cos_forget_retain", "cos_combined_forget", "cos_combined_retain")
    length = max([3, *map(len, steps.values())])
    rows = [{"step": n, **dict.fromkeys(needed, 0.5)} for n in range(1, length + 1)]
    for key, values in steps.items():
        for row, value in zip(rows, values, strict=False):
            row[key.replace("__", "/")] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [
        {"step": 10 * n, "suites": {suite: {"metrics": metrics, "protocol": "asked"} for suite, metrics in of.items()}}
        for n, of in enumerate(exports, start=1)
    ]
    (folder / "evaluation.json").write_text(json.dumps({"trajectory": entries}))
    return folder
