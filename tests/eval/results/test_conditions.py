"""Scores are compared if they measure the same: the protocol, the rows, their number; and nothing else refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import report
from eval.evaluation import digests_of_sets
from eval.files import exit_status
from eval.results.common import common_suites
from eval.results.method import method_of
from eval.results.trajectories import read_run
from pipeline.errors import InputError
from tests.eval.reported import alter
from tests.eval.runs import make_run

Result = dict[str, Any]


def suite(**changes: Any) -> Result:
    """Suite mmlu as eval.run writes it."""
    own = {"metrics": {"acc": {"all": 0.5}}, "counts": {"questions": {"all": 30}, "cut": {"all": 0}}, "shots": 5}
    own |= {"protocol": "task mmlu, 5-shot; most likely of A to D; mean over questions; questions of data"}
    return own | {"sources": {"all": "1a"}, "task_versions": {"mmlu": 2}} | changes


def evaluated(folder: Path, *exports: Result, rule: str = "sago", seed: int = 0) -> Path:
    """A run whose exports, 10 steps apart, have these suites beside wmdp_bio."""
    make_run(folder, [], rule=rule, seed=seed)
    wmdp = {"metrics": {"acc": {"all": 0.2}}, "protocol": "wmdp"}
    entries = [{"step": 10 * n, "suites": {"wmdp_bio": wmdp, **of}} for n, of in enumerate(exports, start=1)]
    (folder / "evaluation.json").write_text(json.dumps({"trajectory": entries}))
    return folder


def shared(*folders: Path) -> list[str]:
    return common_suites([read_run(folder) for folder in folders], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0, "protocol": "task mmlu, 0-shot"}, r"shots \(5 and 0\);"),
        ({"protocol": "task mmlu, 5-shot; in a chat template"}, "protocol;"),
        ({"sources": {"all": "2b"}}, "the rows of all;"),
        ({"counts": {"questions": {"all": 20}}, "sources": {}}, r"the number of rows of all \(30 and 20\);"),
        ({"task_versions": {"mmlu": 1}}, r"task_versions.mmlu \(2 and 1\);"),
        ({"limit": 10}, r"limit \(null and 10\);"),
        ({"forget_set": "forget01"}, r'forget_set \("forget10" and "forget01"\);'),
    ],
)
def test_what_is_measured_otherwise_is_refused(tmp_path: Path, changes: Result, message: str) -> None:
    one = evaluated(tmp_path / "a", {"mmlu": suite(limit=None, forget_set="forget10")})
    other = evaluated(tmp_path / "b", {"mmlu": suite(limit=None, forget_set="forget10") | changes}, rule="sum")
    files = rf"{one}/evaluation.json and in {other}/evaluation.json"
    with pytest.raises(
        InputError, match=rf"suite mmlu does not measure the same in {files}, which differ in {message}"
    ):
        shared(one, other)


def test_what_changes_no_score_is_compared(tmp_path: Path) -> None:
    """An earlier version recorded less; rows may lie elsewhere, be cut, or have no score in a broken export."""
    elsewhere = suite(protocol=suite()["protocol"].replace("data", "/mnt/data"))
    broken = suite(counts={"questions": {"all": 12}, "cut": {"all": 3}}, sources={})
    general = {"lm_eval": {"metrics": {"piqa": {"acc": 0.7}}, "limit": None, "protocol": {"piqa": "version 1"}}}
    runs = [
        evaluated(tmp_path / "a", {"mmlu": suite()}, {"mmlu": suite()}),
        evaluated(tmp_path / "earlier", {"mmlu": {"metrics": {"acc": {"all": 0.4}}}}, rule="sum"),
        evaluated(tmp_path / "elsewhere", {"mmlu": elsewhere, **general}, rule="pcgrad"),
        evaluated(tmp_path / "broken", {"mmlu": suite()}, {"mmlu": broken}, {}, rule="blur"),
    ]
    assert shared(*runs[:3]) == ["wmdp_bio", "mmlu"]
    assert shared(*runs) == ["wmdp_bio"], "its last export has no mmlu"


def test_a_suite_that_only_some_runs_have_is_compared_among_them(tmp_path: Path) -> None:
    limits = (None, 10, 10)
    runs = [
        evaluated(tmp_path / str(n), {"lm_eval": {"metrics": {"piqa": {"acc": 0.7}}, "limit": limit}}, seed=n)
        for n, limit in enumerate(limits)
    ]
    without = evaluated(tmp_path / "none", {}, rule="sum")
    assert shared(without, *runs[1:]) == ["wmdp_bio"]
    with pytest.raises(InputError, match=r"suite lm_eval .* limit \(null and 10\)"):
        shared(without, *runs)


def test_the_command_refuses_runs_and_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(evaluated(tmp_path / rule, {"mmlu": suite()}, rule=rule)) for rule in ("sago", "sum")]
    target, output = tmp_path / "target.json", tmp_path / "report"
    for changes, status in (({"shots": 0}, 2), ({}, 0)):
        results = {"wmdp_bio": {"metrics": {"acc": {"all": 0.7}}}, "mmlu": suite(**changes)}
        target.write_text(json.dumps({"model": "m", "suites": results}))
        monkeypatch.setattr(sys, "argv", ["report", *runs, "--output", str(output), "--target", str(target)])
        assert exit_status(report.main) == status
        assert output.exists() == (status == 0)
        error = capsys.readouterr().err
        if status:
            assert f"suite mmlu does not measure the same in {target} and in {runs[0]}" in error


def test_a_set_that_a_mean_pools_counts_where_it_is_not(tmp_path: Path) -> None:
    """F-All is the mean of what is there; without the passages (FM) only their own scores are missing."""
    counts = {"F-FB": 5, "F-QA": 5, "F-AA": 5, "FM": 9}
    whole, less, fewer = (
        {"rwku": {"metrics": {"sago": {"F-All": 0.5}}, "counts": {**counts, **absent}}}
        for absent in ({}, {"FM": 0}, {"F-AA": 0})
    )
    runs = [evaluated(tmp_path / str(n), of, seed=n) for n, of in enumerate((whole, less, fewer))]
    assert shared(*runs[:2]) == ["wmdp_bio", "rwku"]
    with pytest.raises(InputError, match=r"the number of rows of F-AA \(5 and 0\)"):
        shared(runs[0], runs[2])


def probed(folder: Path, path: str, *, limit: int = 64, seed: int = 0, **digests: str) -> Path:
    """A run that was measured by probes alone, before its first step too."""
    make_run(folder, [], seed=seed)
    (folder / "evaluation.json").unlink()
    alter(folder, "data.forget.path", "corpus.jsonl")
    alter(folder, "data.probes.forget", {"path": path, "limit": limit, "split": "train"})
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{"step": 0}, *map(json.loads, lines)]
    for row, forget in zip(rows, (1.0, 0.5, 0.05, 0.0), strict=True):
        row |= {"probe/forget/extraction_strength": forget, "probe/retain/probability": 0.8}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if digests:
        named = {f"data.probes.{name}.path": digest for name, digest in digests.items()}
        (folder / "digests.json").write_text(json.dumps({"data.forget.path": "1a-2b", **named}))
    return folder


def test_probes_of_other_rows_are_refused(tmp_path: Path) -> None:
    """64 rows of forget01 and 500 of world_facts are two measures, whatever both are named."""
    one, other = probed(tmp_path / "a", "forget01.jsonl"), probed(tmp_path / "b", "world.jsonl", limit=500, seed=1)
    files = rf"{one}/metrics.jsonl and in {other}/metrics.jsonl"
    message = (
        r'the source of forget.limit \(64 and 500\), the source of forget.path \("forget01.jsonl" and "world.jsonl"\);'
    )
    with pytest.raises(
        InputError, match=rf"suite probes does not measure the same in {files}, which differ in {message}"
    ):
        shared(one, other)
    with pytest.raises(InputError, match="limit"):
        shared(one, probed(tmp_path / "c", "forget01.jsonl", limit=32, seed=2))
    assert shared(one, probed(tmp_path / "d", "forget01.jsonl", seed=3)) == ["probes"]


def test_probes_are_known_by_content_where_training_recorded_it(tmp_path: Path) -> None:
    """The same 40 rows in another place, whatever the limit above 40; other rows under the same path are others."""
    one = probed(tmp_path / "a", "here/probes.jsonl", limit=64, forget="5f-first-40")
    moved = probed(tmp_path / "b", "there/probes.jsonl", limit=128, seed=1, forget="5f-first-40")
    assert shared(one, moved) == ["probes"]
    edited = probed(tmp_path / "c", "here/probes.jsonl", limit=64, seed=2, forget="6e-first-40")
    with pytest.raises(InputError, match="which differ in the rows of forget;"):
        shared(one, edited)
    assert read_run(one).method == read_run(edited).method, "where a run is measured makes no method"
    assert "data.probes.forget.path" not in dict(method_of({}, {"data.probes.forget.path": "5f"}))


def test_an_evaluation_on_other_probes_than_those_of_the_training_is_refused(tmp_path: Path) -> None:
    run = probed(tmp_path / "a", "here.jsonl", forget="5f-first-40")
    for digest, suites in (("5f-first-40", ["probes"]), ("6e-first-40", None)):
        result = {"metrics": {"forget": {"extraction_strength": 0.3}}, "sources": {"forget": digest}}
        (run / "evaluation.json").write_text(json.dumps({"trajectory": [{"step": 2, "suites": {"probes": result}}]}))
        if suites:
            assert shared(run) == suites
            continue
        with pytest.raises(InputError, match=rf"{run}/metrics.jsonl and in {run}/evaluation.json"):
            shared(run)


def test_the_digest_of_a_set_is_of_its_rows_alone() -> None:
    rows = [{"set": "forget", "question": "q"}, {"set": "retain", "question": "r"}, {"set": "forget", "question": "s"}]
    found = digests_of_sets(rows)
    assert {*found} == {"forget", "retain"} and found["forget"] != found["retain"]
    beside = [{**row, "reference": 0.5, "target_utility": 0.6} for row in rows]
    assert digests_of_sets(beside) == found, "what other models answered is known later than the target's scores"
    assert digests_of_sets(rows[:2])["retain"] == found["retain"]
    assert digests_of_sets(rows[:2])["forget"] != found["forget"]


def test_runs_must_share_a_suite(tmp_path: Path) -> None:
    """The message has a run for each list of suites, and those of the target."""
    suites = {"a": ["mmlu", "wmdp_cyber"], "b": ["mmlu", "wmdp_cyber"], "c": ["tofu"]}
    exports = {name: {suite: {"x": 0.5} for suite in of} for name, of in suites.items()}
    a, b, c = (read_run(make_run(tmp_path / name, [of])) for name, of in exports.items())
    with pytest.raises(InputError, match="these runs have no suite in common") as caught:
        common_suites([a, b, c], None)
    assert f"({a.folder}: mmlu, wmdp_cyber; {c.folder}: tofu); evaluate all on the same" in str(caught.value)
    with pytest.raises(InputError, match=r"these runs and --target have .*: tofu; --target: bios\); evaluate all"):
        common_suites([c], {"step": 0.0, "bios.forget.all": 1.0, "bios.retain.all": 1.0})
