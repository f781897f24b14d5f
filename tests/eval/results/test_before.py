"""The scores of the model that a run began with: found in files that name it, and only where they measure the same."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.results.before import scores_before
from tests.eval.runs import make_run

METRICS = {"forget": {"all": 0.9}, "retain": {"all": 0.8}}


def entry(model: object, protocol: str = "asked", sources: str = "a") -> dict[str, Any]:
    result = {"metrics": METRICS, "protocol": protocol, "sources": {"forget": sources, "retain": "b"}}
    return {"step": None, "model": str(model), "suites": {"bios": result}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that began with runs/target/final."""
    base = tmp_path / "runs" / "target" / "final"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(b"weights")
    os.utime(base / "model.safetensors", (1000, 1000))
    folder = make_run(tmp_path / "runs" / "mine", [])
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"model": {"path": str(base)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def found(run: Path, entries: list[dict[str, Any]] | None = None) -> dict[str, dict[str, float]]:
    return scores_before(run, entries or [entry(run / "final") | {"step": 3}])


SCORES = {"bios": {"step": 0.0, "bios.forget.all": 0.9, "bios.retain.all": 0.8}}


@pytest.mark.parametrize("place", ["mine/before.json", "before.json", "target.json", "target/evaluation.json"])
def test_a_file_that_names_the_model_gives_its_scores(run: Path, place: str) -> None:
    base = run.parent / "target" / "final"
    assert found(run) == {}
    (run.parent / place).write_text(json.dumps(entry(base)))
    assert found(run) == SCORES


def test_a_run_that_made_the_model_gives_the_scores_of_its_last(run: Path) -> None:
    made = run.parent / "target"
    others = entry(made / "exports" / "step-000002") | {"step": 2}
    (made / "evaluation.json").write_text(json.dumps({"trajectory": [others, entry(made / "final") | {"step": 4}]}))
    assert found(run) == SCORES
    (made / "evaluation.json").write_text(json.dumps({"trajectory": [others]}))
    assert found(run) == {}


def test_a_model_of_the_hub_is_known_by_its_name(run: Path) -> None:
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run.parent / "target/final"), "a/b"))
    (run.parent / "before.json").write_text(json.dumps(entry("a/b")))
    assert found(run) == SCORES


def test_what_does_not_measure_the_same_or_another_model_is_no_row(run: Path) -> None:
    base = run.parent / "target" / "final"
    file = run.parent / "before.json"
    for other in (entry(run / "final"), entry(base, protocol="otherwise"), entry(base, sources="c"), [], {"model": 3}):
        file.write_text(json.dumps(other))
        assert found(run) == {}, other
    file.write_text("{broken")
    assert found(run) == {}
    file.write_text(json.dumps(entry(base)))
    os.utime(file, (900, 900))  # the weights were written later: it measured others
    assert found(run) == {}


def test_the_probe_before_the_first_step_is_of_that_model(run: Path) -> None:
    log = run / "metrics.jsonl"
    row = {"step": 0, "probe/forget/loss": 2.5, "probe/forget/probability": 0.25}
    log.write_text(json.dumps(row) + "\n" + log.read_text())
    scores = {"forget": {"loss": 1.0, "probability": 0.5}}
    probed: dict[str, Any] = {"step": 3, "model": str(run / "final"), "suites": {"probes": {"metrics": scores}}}
    known = {"probes": {"step": 0.0, "probes.forget.loss": 2.5, "probes.forget.probability": 0.25}}
    assert found(run, [probed]) == known
    probed["suites"]["probes"]["sources"] = {"forget": "other rows"}
    (run / "digests.json").write_text(json.dumps({"data.probes.forget.path": "these rows"}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] = {"probes": {"forget": {"path": "forget.txt"}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert found(run, [probed]) == {}
