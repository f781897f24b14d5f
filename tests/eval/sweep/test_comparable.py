"""A sweep compares what measures the same, as a report does: its runs with each other, and with the target."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from eval.results.comparison import collect
from eval.results.metrics import choose
from eval.results.trajectories import read_target
from eval.sweep import runs
from eval.sweep.axes import run_folder
from eval.sweep.runs import Plan
from pipeline.errors import InputError
from tests.eval.pretender import Pretender
from tests.eval.runs import make_run

BOTH = ("--methods", "plain", "sago", "--seeds", 0)


@pytest.fixture
def rows_of(pretender: Pretender, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """{method: digest of the rows on which its runs are evaluated}, to be changed by a test."""
    digests = {"plain": "1a", "sago": "1a"}

    def call(line: Sequence[str], log: Path) -> int:
        status = pretender(line, log)
        if "eval.run" in line:
            file = Path(dict(pairwise(line))["--output"])
            evaluation = json.loads(file.read_text())
            for entry in evaluation["trajectory"]:
                entry["suites"]["bios"]["sources"] = {"forget": digests[file.parents[2].name]}
            file.write_text(json.dumps(evaluation))
        return status

    monkeypatch.setattr(runs, "call", call)
    return digests


def test_runs_that_were_evaluated_on_other_rows_are_refused(
    rows_of: dict[str, str],
    pretender: Pretender,
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows_of["sago"] = "2b"
    folders = (run_folder(tmp_path / "out", method, {}, 0) for method in ("plain", "sago"))
    one, other = (folder / "evaluation.json" for folder in folders)
    message = f"suite bios does not measure the same in {one} and in {other}, which differ in the rows of forget; "
    assert command(*BOTH) == 2
    assert message in capsys.readouterr().err
    pretender.lines.clear()
    assert command(*BOTH[:-1], 0, 1) == 2 and pretender.lines == [], "nothing more is trained"
    assert message in capsys.readouterr().err


def test_a_target_that_was_evaluated_on_other_rows_is_refused_after_the_first_run(
    rows_of: dict[str, str],
    pretender: Pretender,
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "target.json"
    for digest, status, calls in (("2b", 2, 2), ("1a", 0, 4)):
        result = {"metrics": {"forget": {"all": 0.9}, "retain": {"all": 0.9}}, "sources": {"forget": digest}}
        target.write_text(json.dumps({"suites": {"bios": result}}))
        pretender.lines.clear()
        assert command(*BOTH, "--target", target, "--output", tmp_path / digest) == status
        assert len(pretender.lines) == calls
        message = f"suite bios does not measure the same in {target} and in {tmp_path / digest / 'runs' / 'plain'}/"
        assert (message in capsys.readouterr().err) == (status == 2)


def test_probes_of_the_target_are_not_read_where_each_run_has_its_own(tmp_path: Path) -> None:
    """The probe before the first step is of the target model, on the rows of the run."""
    target = tmp_path / "target.json"
    result = {"metrics": {"forget": {"extraction_strength": 1.0}, "retain": {"extraction_strength": 1.0}}}
    target.write_text(json.dumps({"suites": {"probes": {**result, "sources": {"forget": "2b"}}}}))
    for seed in (0, 1):
        folder = make_run(run_folder(tmp_path, "mine", {}, seed), [], seed=seed)
        (folder / "evaluation.json").unlink()
        (folder / "final").mkdir()
        (folder / "digests.json").write_text(json.dumps({"data.probes.forget.path": "1a"}))
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(f"{config}data: {{probes: {{forget: {{path: f.jsonl}}}}}}\n")
        rows = [{"step": 0}, *map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
        for row, score in zip(rows, (1.0, 0.6, 0.3, 0.0), strict=True):
            row |= {"probe/forget/extraction_strength": score, "probe/retain/extraction_strength": 0.8}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = Plan(
        config=tmp_path / "recipe.yaml",
        overrides=(),
        suites=("probes",),
        data=None,
        measure=choose(["probes"], retain="probes.retain.extraction_strength"),
        target=read_target(target),
        output=tmp_path,
        methods=("mine",),
        seeds=(0, 1),
        axes=(),
        ranks=1,
        trials=1,
        target_file=target,
    )
    (group,) = collect(plan)
    assert [member.seed for member in group.members] == [0, 1]
    log = run_folder(tmp_path, "mine", {}, 1) / "metrics.jsonl"
    log.write_text(log.read_text().split("\n", 1)[1])
    with pytest.raises(InputError, match=rf"suite probes does not measure the same in {target} and in "):
        collect(plan)
    collect(replace(plan, target=None, target_file=None))
