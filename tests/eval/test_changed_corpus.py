"""A corpus that is not the run's any more: its file has changed, or another file lies at a relative path."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from eval import loading
from eval.attacks import spec
from eval.attacks.run import attacks_of
from eval.suites import corpus, probes
from pipeline.config.load import resolve
from pipeline.errors import InputError
from tests.conftest import World


def test_a_corpus_that_is_no_longer_the_runs_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(tmp_path)
    digests = {}
    for task in ("forget", "retain"):
        content = (world.folder / f"{task}.jsonl").read_bytes()
        (tmp_path / f"{task}.jsonl").write_bytes(content)
        digests[f"data.{task}.path"] = f"{hashlib.sha256(content).hexdigest()}-columns-and-refusals"
    data = {task: {"path": f"{task}.jsonl"} for task in ("forget", "retain")}
    config = resolve(world.write(run / "config.yaml", "run", data=data), reads_data=False).model_dump()
    found = corpus.load_probes(None, run=run)  # of an earlier version, without digests
    (run / "digests.json").write_text(json.dumps(digests))
    assert corpus.load_probes(None, run=run) == found
    plan = spec.Plan(run, config, "corpus", corpus, found, None, 1, 1.0, 0, (), 1, 1, tmp_path, loading.Trust())
    assert len(attacks_of(plan, ["int8", "retain"])) == 2
    for task, attack in (("forget", "int8"), ("retain", "retain")):
        file = tmp_path / f"{task}.jsonl"
        before = file.read_bytes()
        file.write_bytes(before + b'{"text": "kara"}\n')
        message = rf"data\.{task}\.path: {file.name} is not what {run} read"
        with pytest.raises(InputError, match=message):
            corpus.load_probes(None, run=run)
        with pytest.raises(InputError, match=message):
            attacks_of(plan, [attack])
        file.write_bytes(before)
    (tmp_path / "retain.jsonl").write_text("")
    shutil.copy(world.folder / "retain.jsonl", run / "heldout.jsonl")  # which are the documents that are scored
    assert corpus.load_probes(None, run=run) == found


def test_rows_of_probes_are_those_of_the_training(world: World, tmp_path: Path) -> None:
    run, own = tmp_path / "run", tmp_path / "own.txt"
    run.mkdir()
    own.write_text("kara lo\nmivi su\n")
    forget = world.folder / "forget.jsonl"
    digests = {"data.probes.own.path": own, "data.forget.path": forget}
    digests = {key: f"{hashlib.sha256(file.read_bytes()).hexdigest()}-columns-first-2" for key, file in digests.items()}
    (run / "digests.json").write_text(json.dumps(digests))
    data = {**world.configuration("")["data"], "probes": {"own": {"path": str(own)}}}
    config = world.write(run / "config.yaml", "run", data=data)
    assert {probe.set for probe in probes.load_probes(None, run=config)} == {"forget", "retain", "own"}
    own.write_text("kara lo\nmivi den\n")
    with pytest.raises(InputError, match=rf"data\.probes\.own\.path: {own} is not what {run} read"):
        probes.load_probes(None, run=config)
    elsewhere = shutil.copy(config, tmp_path / "mine.yaml")  # a configuration of no run measures what it names
    assert len(probes.load_probes(None, run=Path(elsewhere))) > 2
