"""The log of a run, `metrics.jsonl`, as every reader sees it: rows of steps, and one before them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from eval import run
from eval.attacks.training import read_curve
from eval.evaluation import find_models
from eval.results.trajectories import read_run
from pipeline.errors import InputError
from tests.eval.runs import make_run

PROBE = {"probe/forget/extraction_strength": 0.9, "probe/retain/extraction_strength": 0.8}
ENTRY = {"step": 1, "model": "m", "suites": {"bios": {"metrics": {}}}}


def written(folder: Path, *rows: object) -> Path:
    """A run folder with a final model whose log has these rows."""
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump({"objective": {"forget": "npo", "retain": "nll"}}))
    return folder


READERS: dict[str, Callable[[Path], object]] = {
    "eval.run, models": find_models,
    "eval.run, the model before": lambda folder: run.before_unlearning(folder, [ENTRY], {}),
    "an attack": read_curve,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("step", [None, "2", True, 1.5, 0, 1], ids=str)
def test_a_row_whose_step_does_not_follow_is_refused_by_every_reader(
    reader: Callable[[Path], object], step: object, tmp_path: Path
) -> None:
    """Row 0 is the first or nowhere: behind a step it is the beginning of another log."""
    folder = written(tmp_path / "run", {"step": 0, **PROBE}, {"step": 1, **PROBE}, {"step": step, **PROBE})
    with pytest.raises(InputError, match=r"metrics.jsonl, line 3: needs an object with step, .*; repair or remove"):
        reader(folder)


def test_a_report_refuses_it_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [{"bios": {"forget": {"all": 0.5}, "retain": {"all": 0.5}}}])
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 0, **PROBE}) + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl, line 4: needs an object with step"):
        read_run(folder)


def test_a_log_without_a_row_of_a_step(tmp_path: Path) -> None:
    """A run that ended before its first step has no step of which `final/` could be the model, and one that never
    logged anything has no probe before the first step; neither is an error."""
    empty, before = written(tmp_path / "empty"), written(tmp_path / "before", {"step": 0, **PROBE})
    assert run.before_unlearning(empty, [ENTRY], {}) == ("the model before the first step", {})
    assert read_curve(empty) == []
    for folder in (empty, before):
        with pytest.raises(InputError, match="holds no exported model yet"):
            find_models(folder)
    _, scores = run.before_unlearning(before, [ENTRY], {})
    assert scores == {"step": 0.0, "probes.forget.extraction_strength": 0.9, "probes.retain.extraction_strength": 0.8}
    assert [(row["step"], sorted(row)) for row in read_curve(before)] == [(0, ["forget", "relearned", "step"])]
