"""A launcher that only pretends, for tests of `eval.frontier`."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

RECIPE = {
    "synthesis": {"alpha": 1.0, "gamma": 1.0},
    "methods": {"plain": {"synthesis": {"rule": "sum"}}, "sago": {"synthesis": {"rule": "sago"}}},
}


class Pretender:
    """Stands for `sweep_runs.call`: writes what the two commands would; the retain score is best at gamma 0.3."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []
        self.before: Callable[[int, Path, Path], int | None] = lambda number, folder, log: None

    def __call__(self, line: Sequence[str], log: Path) -> int:
        options = dict(pairwise(line))
        training = "pipeline.train" in line
        folder = Path(options["--output"] if training else options["--model"])
        self.lines.append([*line])
        status = self.before(len(self.lines), folder, log)
        if status is not None:
            return status
        if training:
            self.train(folder, options)
            return 0
        told = yaml.safe_load((folder / "config.yaml").read_text())
        retain = 1 - 0.2 * abs(math.log(told["synthesis"]["gamma"] / 0.3)) - 0.01 * told["seed"]
        trajectory = [
            {"step": step, "suites": {"bios": {"metrics": {"forget": {"all": forget}, "retain": {"all": retain}}}}}
            for step, forget in ((1, 0.5), (2, 0.05))
        ]
        Path(options["--output"]).write_text(json.dumps({"trajectory": trajectory, "command": "evaluate it"}))
        return 0

    def train(self, folder: Path, options: dict[str, str]) -> None:
        (folder / "final").mkdir(parents=True)
        gamma = float(options.get("--synthesis.gamma", 1))
        synthesis = {"alpha": 1.0, "gamma": gamma, **RECIPE["methods"][options["--method"]]["synthesis"]}
        told = {"seed": int(options["--seed"]), "model": {}, "objective": {"forget": "ga", "retain": "nll"}}
        (folder / "config.yaml").write_text(yaml.safe_dump({**told, "synthesis": synthesis, "optimizer": {"lr": 0.1}}))
        numbers = ("forget_loss", "retain_loss", "cos_forget_retain", "cos_combined_forget", "cos_combined_retain")
        rows = ({"step": step, **dict.fromkeys(numbers, gamma)} for step in (1, 2))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def told(self) -> list[tuple[str, str]]:
        """(what, run folder behind `runs`) of each call."""
        names = []
        for line in self.lines:
            options = dict(pairwise(line))
            training = "pipeline.train" in line
            folder = options["--output"] if training else options["--model"]
            names.append(("train" if training else "evaluate", folder.split("/runs/")[1]))
        return names


GRID = ("--methods", "plain", "sago", "--seeds", 0, 1, "--sweep", "synthesis.gamma=0.3,1")
