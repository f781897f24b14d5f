"""The attacks: adversarial questions, and all of them on a run with two ranks."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from safetensors import safe_open

from eval import bios, robustness
from eval.attacks import spec, training
from eval.files import read_jsonl, write_jsonl
from eval.suites import biographies
from eval.suites import bios as bios_suite
from pipeline.config.load import resolve, to_yaml
from tests.distributed import run_distributed
from tests.interrupted import run_in_process


def test_adversarial_questions_of_bios() -> None:
    benchmark = biographies.generate(0)
    plain, adversarial = bios_suite.adversarial(benchmark.probes)
    assert len(plain) == 80 * 6 and len(adversarial) == 5 * len(plain)
    assert all(probe in benchmark.probes and probe["kind"] == "QA" for probe in plain)
    assert bios_suite.adversarial(benchmark.probes) == (plain, adversarial)
    everything = set("".join(benchmark.all).split("\n"))
    for at, probe in enumerate(adversarial):
        own = plain[at // 5]
        assert (probe["split"], probe["answer"]) == (own["split"], own["answer"])
        assert probe["prompt"] != own["prompt"] and probe["answer"] not in probe["prompt"]
        person = bios_suite.group_of(own)
        assert person is not None
        if probe["kind"] == "case":
            assert person not in probe["prompt"] and person.lower() in probe["prompt"].lower()
        else:
            assert person in probe["prompt"]
        if probe["kind"] == "paraphrase":
            assert probe["prompt"].split("\n")[0] not in everything
        if probe["kind"] == "in_context":
            others = [
                line for line in probe["prompt"].split("\n") if line.startswith("Question") and person not in line
            ]
            retained = " ".join(one["prompt"] for one in plain if one["split"] == "retain")
            assert len(others) == 2 and all(line in retained for line in others)
        if probe["kind"] == "context":
            facts = probe["prompt"].split("\n")[0]
            assert facts.count(person) == 2 and all(
                f"{fact}." in " ".join(benchmark.all) for fact in facts[:-1].split(". ")
            )


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its status."""
    monkeypatch.setattr(robustness, "end_on_terminate", lambda: None)  # the test runner keeps its own
    monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, arguments)])
    return robustness.exit_status(robustness.main)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return partial(run_command, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, memorise: Callable[[list[str]], tuple[Any, Any]]) -> Path:
    """A run on ten forgotten and two retained persons; its start knows their cities, its `final/` knows nothing."""
    tmp_path = tmp_path_factory.mktemp("finished")
    benchmark = biographies.generate(0)
    people = list(dict.fromkeys(map(bios_suite.group_of, benchmark.probes)))
    chosen = {*people[:10], *people[50:52]}
    probes = [p for p in benchmark.probes if bios_suite.group_of(p) in chosen and " live" in p["prompt"]]
    write_jsonl(tmp_path / "probes.jsonl", probes)
    model, tokenizer = memorise([f"{probe['prompt']} {probe['answer']}\n" for probe in probes])
    model.save_pretrained(tmp_path / "original")
    bios.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "run" / "final")
    for folder in ("original", "run/final"):
        tokenizer.save_pretrained(tmp_path / folder)
    for split in ("forget", "retain"):
        corpus = ({"text": f"{p['prompt']} {p['answer']}\n"} for p in probes if p["split"] == split)
        write_jsonl(tmp_path / f"{split}.jsonl", corpus)
    recipe = {
        "output": str(tmp_path / "run"),
        "cache": str(tmp_path / "cache"),
        "model": {"path": str(tmp_path / "original"), "dtype": "float32"},
        "data": {
            "packing": "documents",
            **{split: {"path": str(tmp_path / f"{split}.jsonl")} for split in ("forget", "retain")},
        },
        "objective": {"forget": "ga"},
        "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "deepspeed": "ds_configs/cpu.json"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(resolve(tmp_path / "recipe.yaml")))
    return tmp_path


def copy_of_run(finished: Path, folder: Path) -> Path:
    """What the run names by path is shared."""
    shutil.copytree(finished / "run", folder / "run")
    shutil.copy(finished / "probes.jsonl", folder)
    return folder / "run"


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    return copy_of_run(finished, tmp_path)


class Attacked(NamedTuple):
    """A run after all attacks on it."""

    run: Path
    arguments: tuple[object, ...]  # of the command
    launched: list[str]  # logs of the trainings, in order
    printed: str
    answer: dict[str, Any]  # robustness.json

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        return {entry["name"]: entry for entry in self.answer["attacks"]}


@pytest.fixture(scope="module")
def attacked(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    """By the command, whose trainings have two ranks of the pool; one is launched as it is by a slow test."""
    run = copy_of_run(finished, tmp_path_factory.mktemp("attacked"))
    launched = list[str]()

    def run_in_pool(line: list[str], log: Path) -> int:
        launched.append(log.name)
        given = line[line.index("pipeline.train") + 1 :]
        run_distributed(run_in_process, int(line[line.index("--num_gpus") + 1]), given)
        return 0

    arguments = ("--run", run, "--suite", "bios", "--data", run.parent, "--steps", 3, "--lr", 0.003)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(training, "call", run_in_pool)
        assert run_command(patch, *arguments) == 0
    return Attacked(run, arguments, launched, printed.getvalue(), json.loads((run / "robustness.json").read_text()))


def test_all_attacks_on_two_ranks(attacked: Attacked) -> None:
    assert attacked.launched == ["relearn.training", "retain.training"]
    answer, entries = attacked.answer, attacked.entries
    assert tuple(entries) == spec.BY_DEFAULT
    assert answer["dtype"] == "float32" and answer["suite"] == "bios" and answer["seed"] == 0
    assert all(name in attacked.printed for name in spec.BY_DEFAULT) and "held_out_nll" in attacked.printed
    for name in ("retain", "int8", "int4", "nf4"):
        entry = entries[name]
        assert entry["original"]["forget.all"] > 0.9 > 0.2 > entry["before"]["forget.all"]
        assert entry["before"] == entries["int8"]["before"] and entry["after"]["forget_nll"] > 0
    changes = [abs(entries[n]["after"]["forget_nll"] - entries[n]["before"]["forget_nll"]) for n in ("int8", "int4")]
    assert 0 < changes[0] < changes[1]
    assert entries["retain"]["after"]["forget_nll"] < entries["retain"]["before"]["forget_nll"] - 0.1
    assert {"forget.QA", "forget.all", "retain.QA", "retain.all"} == set(entries["probes"]["before"])
    assert {"forget.case", "retain.in_context"} < set(entries["probes"]["after"])


@pytest.mark.slow  # two ranks that import everything anew
def test_an_attack_launches_its_training(run_folder: Path, command: Callable[..., int]) -> None:
    arguments = ("--run", run_folder, "--suite", "bios", "--data", run_folder.parent, "--steps", 2, "--lr", 0.003)
    assert command(*arguments, "--attacks", "relearn") == 0
    found = json.loads((run_folder / "robustness.json").read_text())
    assert [entry["name"] for entry in found["attacks"]] == ["relearn"]
    assert (run_folder / "robustness" / "relearn" / "final" / "config.json").exists()


def test_trainings_of_attacks_start_from_the_export_on_their_own_texts(attacked: Attacked) -> None:
    relearned, folder = attacked.entries["relearn"], attacked.run / "robustness"
    assert len(relearned["groups"]) == 1 and relearned["excluded_probes"] == 2  # one person of ten: FB and QA
    assert relearned["documents"] == 2 and relearned["held_out_documents"] == 18
    assert relearned["settings"]["steps"] == 3 and relearned["settings"]["lr"] == 0.003
    written = [row["text"] for row in read_jsonl(folder / "relearn.jsonl")]
    assert {bios_suite.group_of({"text": text}) for text in written} == set(relearned["groups"])
    assert relearned["after"]["held_out_nll"] < relearned["before"]["held_out_nll"] - 0.1
    assert relearned["original"]["held_out_nll"] < 1 < relearned["before"]["held_out_nll"]
    trained = resolve(folder / "relearn" / "config.yaml")
    assert trained.model.path == str(attacked.run / "final")
    assert trained.tasks == ["retain"] and trained.train.steps == 3
    assert len(read_jsonl(folder / "relearn" / "metrics.jsonl")) == 3
    retained, original = (resolve(run / "config.yaml") for run in (folder / "retain", attacked.run))
    assert retained.data.retain == original.data.retain


def test_what_is_there_is_not_repeated_and_other_settings_are_refused(
    attacked: Attacked,
    finished: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is missing is done, and alone."""

    def never(*_: Any) -> int:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(training, "call", never)
    entries, output = attacked.entries, attacked.run / "robustness.json"
    others = [entry for name, entry in entries.items() if name != "int4"]
    output.write_text(json.dumps({**attacked.answer, "attacks": others}))
    assert command(*attacked.arguments) == 0
    again = {entry["name"]: entry for entry in json.loads(output.read_text())["attacks"]}
    same = {name: again[name] for name in entries if name != "int4"}
    assert same == {name: entry for name, entry in entries.items() if name != "int4"}
    assert again["int4"]["after"] == entries["int4"]["after"] and list(again)[-1] == "int4"
    before = output.read_bytes()
    for changed, message in (
        (("--steps", 4), "relearn with steps 3"),
        (("--seed", 1), "of other seed 0 instead of 1"),
    ):
        capsys.readouterr()
        assert command(*attacked.arguments, *changed) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error and "--output" in error
    shutil.copy(finished / "original" / "model.safetensors", attacked.run / "final")
    assert command(*attacked.arguments) == 2 and "of other weights" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_failing_training_is_one_line(
    run_folder: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(line: list[str], log: Path) -> int:
        assert line[-2:] == ["--train.batch_size", "3"]
        Path(f"{log}.err").write_text("noise\nerror: train.batch_size 3 does not divide\n")
        return 2

    monkeypatch.setattr(training, "call", fail)
    line = ("--run", run_folder, "--suite", "bios", "--data", run_folder.parent, "--", "--train.batch_size", 3)
    assert command(*line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "training relearn failed: train.batch_size 3 does not divide" in error
    assert not (run_folder / "robustness.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attacks", "relern"], "nearest is 'relearn'"),
        (["--suite", "bois"], "nearest is 'bios'"),
        (["--suite", "lm_eval"], "measures general ability"),
        (["--run", "nowhere"], "cannot read nowhere/config.yaml"),
        (["--data", "nowhere"], "python -m eval.bios"),
        (["--steps", 0], "--steps 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--seed", -1], "--seed -1"),
        (["--ranks", 0], "--ranks 0"),
        (["--batch-size", 0], "--batch-size 0"),
        (["--group", "person"], "row 1 of the forget corpus has only text"),
        (["--output", "answer.txt"], "ends in .json"),
        (["--", "--seed", 3], "override --seed"),
    ],
)
def test_unusable_input(
    run_folder: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    before = sorted(run_folder.rglob("*"))
    given = ("--run", run_folder, "--suite", "bios", "--data", run_folder.parent)
    assert command(*given, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert sorted(run_folder.rglob("*")) == before


def test_what_a_run_does_not_allow(
    run_folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["data"]["retain"] = None
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    given = ("--run", run_folder, "--suite", "bios", "--data", run_folder.parent, "--attacks")
    assert command(*given, "retain") == 2 and "has no retain corpus; leave it out" in capsys.readouterr().err
    (run_folder / "final" / "adapter_config.json").write_text("{}")
    assert command(*given, "int8") == 2 and "model.lora.merge" in capsys.readouterr().err
    shutil.rmtree(run_folder / "final")
    assert command(*given, "int8") == 2 and "has no final/" in capsys.readouterr().err


@pytest.mark.parametrize("lr", [None, 0.02])
def test_all_weights_are_not_trained_at_the_rate_of_adapters(
    lr: float | None, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate that wrecks the model makes it look robust: what is gone then does not return."""
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["model"]["lora"], config["optimizer"]["lr"] = {"r": 4, "merge": True}, 0.006
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    given = ["--run", str(run_folder), "--suite", "bios", "--data", str(run_folder.parent)]
    plan, *_ = robustness.parse_command_line(given if lr is None else [*given, "--lr", str(lr)])
    with safe_open(run_folder / "final" / "model.safetensors", "pt") as weights:
        size = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    fitting = float(f"{1e-5 * (8e9 / size) ** 0.4:.0e}")  # of docs/guides/own-corpus.md for full weights
    assert plan.lr == (lr or fitting) and fitting < 0.001
    assert (f"--lr {fitting:g}" in capsys.readouterr().out) == (lr is None)
