"""Which runs are seeds of one method."""

import json
import shutil
from pathlib import Path

import pytest

from eval.results import method
from eval.results.grouping import plain_of
from pipeline.config.load import resolve
from pipeline.errors import InputError
from tests.conftest import World
from tests.eval.reported import REACHES, alter, make_run, read, spoil


def test_grouping_is_by_method_and_not_by_seed(tmp_path: Path) -> None:
    groups = read(
        make_run(tmp_path / "a", REACHES, seed=1),
        make_run(tmp_path / "b", REACHES, seed=0, geometry=True),  # measures more, computes the same
        make_run(tmp_path / "c", REACHES, rule="sum", lr=1e-3),
        make_run(tmp_path / "d", REACHES, rule="sum", lr=3e-3),
    )
    assert {name: [run.folder.name for run in runs] for name, runs in groups.items()} == {
        "ga+nll sago": ["b", "a"],
        "ga+nll sum optimizer.lr=0.001": ["c"],
        "ga+nll sum optimizer.lr=0.003": ["d"],
    }


def test_sum_with_the_same_settings_is_found_beside_a_rule_with_keys_of_its_own(tmp_path: Path) -> None:
    """`sum` reads none of them, and its configuration may not have them."""
    own = {
        "cagrad": ("c", 0.3),
        "bloop": ("new_share", 0.5),
        "upgrad": ("preference", 0.7),
        "sago": ("zero_forget", "retain"),
    }
    rules = [make_run(tmp_path / rule, REACHES, rule=rule) for rule in own]
    for folder, (key, value) in zip(rules, own.values(), strict=True):
        alter(folder, f"synthesis.{key}", value)
    plain, other = (make_run(tmp_path / f"sum {lr}", REACHES, rule="sum", lr=lr) for lr in (1e-3, 3e-3))
    groups = read(*rules, plain, other)
    found = {runs[0].rule: plain_of(name, groups) for name, runs in groups.items() if runs[0].rule != "sum"}
    assert found == dict.fromkeys(own, "ga+nll sum optimizer.lr=0.001")


METHOD = {  # each of them makes another model of the same data
    "model.lora": {"r": 8, "alpha": 16.0},
    "model.path": "another/base",
    "model.dtype": "bfloat16",
    "train.steps": 50,
    "train.batch_size": 16,
    "optimizer.schedule": "cosine",
    "optimizer.max_grad_norm": 0.5,
    "data.max_length": 99,
    "data.a_key_of_tomorrow": True,
}
SAME = {  # the same numbers, elsewhere, or saved and measured otherwise
    "output": "elsewhere",
    "cache": "there",
    "method": "a_name",
    "train.micro_batch_size": 2,
    "train.checkpoint_every": 7,
    "train.keep_checkpoints": 3,
    "train.export_every": 9,
    "train.max_skipped": 3,
    "train.probe_every": 3,
    "train.stop_action": "export",
    "train.schedule": "joint",
    "model.gradient_checkpointing": True,
    "model.allow_pickle": True,
    "train.timeout_minutes": 1.5,
    "synthesis.geometry": True,
    "synthesis.layer_geometry_every": 5,
    "synthesis.update_geometry": False,
    "synthesis.stash_device": "host",
}


def test_what_is_not_the_same_method_is_not_averaged(tmp_path: Path) -> None:
    """One run for each key, each by itself, beside two seeds of one method that differ in everything that is none."""
    plain = [make_run(tmp_path / "plain", REACHES, seed=0), make_run(tmp_path / "again", REACHES, seed=1)]
    for key, value in SAME.items():
        alter(plain[1], key, value)
    others = [
        alter(make_run(tmp_path / key, REACHES, seed=number), key, value)
        for number, (key, value) in enumerate(METHOD.items(), start=2)
    ]
    groups = read(*plain, *others)
    by_folder = {run.folder.name: name for name, runs in groups.items() for run in runs}
    assert len(groups) == 1 + len(METHOD) and by_folder["plain"] == by_folder["again"]
    assert {name: len(runs) for name, runs in groups.items()}[by_folder["plain"]] == 2
    for key, value in METHOD.items():
        leaves = value if isinstance(value, dict) else {"": value}
        for leaf, x in leaves.items():
            assert f"{key}{'.' * bool(leaf)}{leaf}={x}" in by_folder[key]


def test_a_run_of_an_earlier_version_is_a_seed_of_the_same_method(tmp_path: Path) -> None:
    """Its configuration lacks the keys that came later, whose defaults are what it did."""
    early, late, other = (make_run(tmp_path / name, REACHES, seed=n) for n, name in enumerate("abc"))
    for folder, share in ((late, 1.0), (other, 2.0)):
        alter(folder, "objective.dual_step_size", share)
        alter(folder, "synthesis.c", None)
    groups = read(early, late, other)
    assert sorted([run.folder.name for run in runs] for runs in groups.values()) == [["a", "b"], ["c"]]


def test_keys_that_make_no_method_are_keys(world: World) -> None:
    """A renamed key would quietly split seeds."""
    config = resolve(world.write(world.folder / "grouping.yaml", "runs/x")).model_dump()
    known = {f"{s}.{k}" for s, keys in config.items() if isinstance(keys, dict) for k in keys} | {*config}
    assert {*method.NOT_METHOD} == {*SAME, "seed"} <= known
    assert {f"data.forget.{k}" for k in method.COVERED_BY_DIGEST} <= {
        f"data.forget.{k}" for k in config["data"]["forget"]
    }


def test_content_decides_and_not_the_path(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4

    def run(called: str, seed: int, place: str, model: str, **corpus: str) -> Path:
        folder = alter(make_run(tmp_path / called, REACHES, seed=seed), "model.path", place)
        for key, value in {"path": "a.jsonl", **corpus}.items():
            alter(folder, f"data.forget.{key}", value)
        (folder / "digests.json").write_text(json.dumps({"model.path": model, "data.forget.path": digest}))
        return folder

    moved = read(run("a", 0, "here", digest), run("b", 1, "there", digest, path="b.jsonl", name="x", split="y"))
    assert list(moved) == ["ga+nll sago"] and len(moved["ga+nll sago"]) == 2
    other = digest[::-1]
    anew = read(run("c", 0, "here", digest), run("d", 1, "here", other))
    assert list(anew) == ["ga+nll sago model.path=01234567", "ga+nll sago model.path=fedcba98"]
    two = read(run("e", 0, "here", digest), run("f", 1, "there", other))
    assert list(two) == ["ga+nll sago model.path=here", "ga+nll sago model.path=there"]
    spoil(tmp_path / "e" / "digests.json", "[]")
    with pytest.raises(InputError, match=r"digests\.json is not as training writes it"):
        read(tmp_path / "e")


def test_one_run_twice_is_no_second_seed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", REACHES)
    shutil.copytree(folder, tmp_path / "copy")
    for twice in ((folder, folder), (folder, tmp_path / "copy")):
        with pytest.raises(InputError, match="one method and one seed"):
            read(*twice)
