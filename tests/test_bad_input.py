"""Unusable input: the real command ends with status 2 and one line that names the culprit, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import train
from pipeline.distributed import process_group
from tests.conftest import World
from tests.distributed import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
GOOD = '{"text": "kara lovi mito nesu"}\n'


@dataclass(frozen=True)
class Case:
    """One run that must be refused. `{folder}` is the case's own folder, where `files` are."""

    arguments: list[str] = field(default_factory=list)  # after --config, so that they win
    expected: tuple[str, ...] = ()  # in the line; (without the folder's name)
    files: dict[str, str] = field(default_factory=dict)
    config: bool = True  # else no --config


# Refused from the text of the configuration: the command answers at once.
EARLY = {
    "unknown key": Case(["--train.stepz", "3"], ("'train.stepz'", "'steps'")),
    "old name of a key": Case(["--optimizer.clip", "1.0"], ("'optimizer.clip'", "'optimizer.max_grad_norm'")),
    "unknown section": Case(["--synthsis.rule", "sago"], ("'synthsis'", "'synthesis'")),
    "wrong type": Case(["--train.steps", "ten"], ("train.steps", "'ten'")),
    "unknown rule": Case(["--synthesis.rule", "pcgard"], ("synthesis.rule", "'pcgard'", "'pcgrad'")),
    "bad scope": Case(["--synthesis.scope", "tensor"], ("synthesis.scope", "'tensor'", "module")),
    "unknown objective": Case(["--objective.forget", "nppo"], ("objective.forget", "'nppo'", "'npo'")),
    "negative steps": Case(["--train.steps", "-3"], ("train.steps", "-3")),
    "steps and epochs": Case(["--train.steps", "3", "--train.epochs", "2"], ("train.steps", "--train.epochs null")),
    "dpo without what to prefer": Case(["--objective.forget", "dpo"], ("data.forget.preferred",)),
    "idk without questions": Case(["--objective.forget", "idk"], ("data.forget", "idk", "prompt")),
    "dpo_idk without questions": Case(["--objective.forget", "dpo_idk"], ("data.forget", "dpo_idk", "prompt")),
    "batch does not divide": Case(["--train.batch_size", "7"], ("train.batch_size 7", "multiple of 2")),
    "both tasks none": Case(["--objective.forget", "none", "--objective.retain", "none"], ("objective.forget", "none")),
    "missing data file": Case(["--data.retain.path", "{folder}/no.jsonl"], ("data.retain.path", "no.jsonl")),
    "missing DeepSpeed file": Case(["--train.deepspeed", "{folder}/no.json"], ("train.deepspeed", "no.json")),
    "broken DeepSpeed file": Case(
        ["--train.deepspeed", "{folder}/ds.json"], ("ds.json", "line 2"), {"ds.json": '{\n"zero_optimization": {,}}'}
    ),
    "broken YAML": Case([], ("run.yaml", "line 2", "YAML"), {"run.yaml": "output: x\nmodel: {path: [}\n"}),
    "no --config": Case(["--train.steps", "3"], ("--config",), config=False),
    "missing configuration": Case(["--config", "{folder}/no.yaml"], ("--config", "no.yaml")),
    "output holds a run": Case([], ("output", "already holds a run"), {"run/metrics.jsonl": "{}\n"}),
    "output is a file": Case([], ("output", "file"), {"run": "not a folder"}),
    "unknown method": Case(["--method", "sagoo"], ("'sagoo'",)),
    "option without value": Case(["--train.steps"], ("--train.steps", "value")),
}

# Refused once the texts and the model are looked at.
LATE = {
    "layer beyond the model": Case(
        ["--objective.forget", "rmu", "--objective.layer", "9"], ("objective.layer: 9", "2 decoder blocks")
    ),
    "sequences longer than the model": Case(
        ["--data.max_length", "4096", "--data.forget.path", "{folder}/long.jsonl"],
        ("data.max_length", "up to 4096 tokens", "2048 positions"),
        {"long.jsonl": '{"text": "' + "q" * 9000 + '"}\n'},
    ),
    "RMU of tensors above its layer": Case(
        ["--objective.forget", "rmu", "--objective.layer", "0", "--model.trainable", "[lm_head]"],
        ("model.trainable", "layer 0", "no tensor"),
    ),
    "malformed line": Case(
        ["--data.forget.path", "{folder}/bad.jsonl"],
        ("data.forget", "bad.jsonl", "line 4"),
        {"bad.jsonl": GOOD * 3 + '{"text": "oops\n' + GOOD},
    ),
    "missing field": Case(["--data.retain.field", "body"], ("data.retain", "line 1", "'body'", "'text'")),
    "number for a text": Case(
        ["--data.forget.path", "{folder}/bad.jsonl"],
        ("data.forget", "line 2", "'text'", "int"),
        {"bad.jsonl": GOOD + '{"text": 3}\n'},
    ),
    "empty corpus": Case(
        ["--data.forget.path", "{folder}/empty.jsonl"], ("data.forget", "empty.jsonl"), {"empty.jsonl": ""}
    ),
    "less than a block": Case(
        ["--data.packing", "blocks", "--data.max_length", "4000"], ("data.forget", "4000", "data.max_length")
    ),
    "missing model folder": Case(["--model.path", "{folder}/no-model"], ("model.path", "no-model")),
    "a folder that holds no model": Case(["--model.path", "{folder}"], ("model.path",)),
    "missing model of the hub": Case(["--model.path", "nobody/no-such-model"], ("model.path", "nobody/no-such-model")),
    "missing data set of the hub": Case(
        ["--data.retain.path", "nobody/no-such-data"], ("retain.path", "nobody/no-such-data")
    ),
    "a load-balancing loss": Case(
        ["--model.path", "{folder}/experts"],
        ("model.path", "experts", "load-balancing", "output_router_logits to false"),
        {"experts/": "model", "experts/config.json": '{"model_type": "mixtral", "output_router_logits": true}'},
    ),
    "nothing to train": Case(["--model.trainable", "['no_such_tensor']"], ("model.trainable", "'no_such_tensor'")),
    "truncated weights": Case(  # a copy, cut short below
        ["--model.path", "{folder}/truncated"], ("model.path", "truncated"), {"truncated/": "model"}
    ),
}

# What DeepSpeed itself refuses of its file, some of it only when it sees the model: content, and what the line names.
OF_DEEPSPEED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"zero_optimization": {"stage": 2, "reduce_bucket": 5}}, ("reduce_bucket",)),
    "unknown key of stage 3": ({"zero_optimization": {"stage": 3, "offload": True}}, ("offload", "Extra inputs")),
    "wrong type": ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, ("reduce_bucket_size", "'big'")),
    "wrong type of groups": ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "two"}}, ("'two'",)),
    "wrong type without ZeRO": ({"flops_profiler": {"enabled": "often"}}, ("TypeError",)),
    "removed": ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ("mics_shard_size",)),
    "a mix it does not have": (
        {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}},
        ("float32", "bfloat16"),
    ),
}
LATE |= {
    f"DeepSpeed: {name}": Case(
        ["--train.deepspeed", "{folder}/ds.json"],
        ("train.deepspeed", "ds.json", "DeepSpeed refuses it", *words),
        {"ds.json": json.dumps(content)},
    )
    for name, (content, words) in OF_DEEPSPEED.items()
}
LATE["DeepSpeed: fp16 on a CPU"] = Case(["--model.dtype", "float16"], ("model.dtype: float16", "not supported"))

# The same as a command of its own, with its own imports, to see that the shortcuts taken for the others are none.
EARLY_ALONE = ("unknown key", "no --config", "output holds a run")
LATE_ALONE = "malformed line"


def prepare(case: Case, folder: Path, world: World) -> list[str]:
    """The arguments of the command, in a folder made for it."""
    folder.mkdir()
    world.write(folder / "run.yaml", folder / "run", train={"steps": 1, "batch_size": 4})
    for name, content in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            shutil.copytree(world.folder / content, folder / name)
            weights = folder / name / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1000])
        else:
            (folder / name).write_text(content)
    arguments = [argument.replace("{folder}", str(folder)) for argument in case.arguments]
    return [*(["--config", str(folder / "run.yaml")] if case.config else []), *arguments]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def environment() -> dict[str, str]:
    """Of a process that no launcher started."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def check_refused(case: Case, folder: Path, status: int, stdout: str, stderr: str, before: dict[str, Any]) -> str:
    """Returns the one line."""
    shown = f"{stdout[-2000:]}\n{stderr[-4000:]}"
    assert "Traceback" not in stdout + stderr, shown
    assert status == 2, shown
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, shown
    assert not [line for line in stdout.splitlines() if line.startswith("error:")]
    named = lines[0].replace(str(folder), "")  # the folder's name repeats the case's
    for part in case.expected:
        assert part in named, shown
    assert snapshot(folder) == before  # nothing written
    return lines[0]


@pytest.mark.parametrize("name", EARLY)
def test_refused_from_the_configuration(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's function in this process. A case that is not refused fails, and this process does not end."""
    case, folder = EARLY[name], tmp_path / "case"
    arguments = prepare(case, folder, world)
    before = snapshot(folder)
    for variable in LAUNCHED:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(process_group, "start", lambda *_: pytest.fail("not refused"))
    monkeypatch.setattr(process_group, "leave", lambda status: status)
    status = train.main(arguments)
    stdout, stderr = capsys.readouterr()
    line = check_refused(case, folder, status, stdout, stderr, before)
    assert stderr.splitlines() == [line] and not stdout  # nothing but the line


@pytest.mark.parametrize("name", EARLY_ALONE)
def test_refused_from_the_configuration_as_a_command(name: str, world: World, tmp_path: Path) -> None:
    """A process of its own, started by nobody."""
    case, folder = EARLY[name], tmp_path / "case"
    arguments = prepare(case, folder, world)
    before = snapshot(folder)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train", *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    line = check_refused(case, folder, done.returncode, done.stdout, done.stderr, before)
    assert done.stderr.splitlines() == [line] and not done.stdout


# Per line of stdin: what `python -m pipeline.train` would do, in a fork that has torch imported already.
FORKING = """
import json, os, runpy, sys
import datasets, deepspeed, torch, transformers
import pipeline.data.tokenize, pipeline.losses.task, pipeline.modeling.load, pipeline.zero.combiner
for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(case["folder"])
        for descriptor, file in ((1, case["stdout"]), (2, case["stderr"])):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["pipeline.train", *case["arguments"]]
        runpy.run_module("pipeline.train", run_name="__main__", alter_sys=True)
        sys.exit("the command returned")
    print(json.dumps([case["name"], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    folder: Path
    status: int
    stdout: str
    stderr: str
    before: dict[str, Any]

    def check(self, case: Case) -> str:
        return check_refused(case, self.folder, self.status, self.stdout, self.stderr, self.before)


@pytest.fixture(scope="module")
def late(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All of LATE, one after another."""
    root, logs = tmp_path_factory.mktemp("late"), tmp_path_factory.mktemp("logs")
    jobs = []
    for number, (name, case) in enumerate(LATE.items()):
        arguments = prepare(case, root / str(number), world)
        streams = {stream: str(logs / f"{number}.{stream}") for stream in ("stdout", "stderr")}
        jobs.append({"name": name, "folder": str(root / str(number)), "arguments": arguments, **streams})
    before = {job["name"]: snapshot(Path(job["folder"])) for job in jobs}
    done = subprocess.run(
        [sys.executable, "-c", FORKING], input="".join(json.dumps(job) + "\n" for job in jobs),
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    statuses = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert set(statuses) == set(LATE), done.stderr[-4000:]
    ended = {}
    for name, job in ((job["name"], job) for job in jobs):
        stdout, stderr = (Path(job[stream]).read_text() for stream in ("stdout", "stderr"))
        ended[name] = Ended(Path(job["folder"]), statuses[name], stdout, stderr, before[name])
    return ended


@pytest.mark.parametrize("name", LATE)
def test_refused_from_the_data_or_the_model(name: str, late: dict[str, Ended]) -> None:
    late[name].check(LATE[name])


def test_the_command_alone_says_the_same(world: World, tmp_path: Path, late: dict[str, Ended]) -> None:
    case, folder = LATE[LATE_ALONE], tmp_path / "case"
    arguments = prepare(case, folder, world)
    before = snapshot(folder)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train", *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    line = Ended(folder, done.returncode, done.stdout, done.stderr, before).check(case)
    in_fork = late[LATE_ALONE]
    assert line.replace(str(folder), "") == in_fork.check(case).replace(str(in_fork.folder), "")


def test_two_ranks_under_the_launcher_refuse_with_one_voice(world: World, tmp_path: Path) -> None:
    """The line comes once, not once a rank, and the launcher hands the status on."""
    launcher = shutil.which("deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert launcher is not None, "DeepSpeed comes with its launcher"
    case, folder = LATE["malformed line"], tmp_path / "case"
    arguments = prepare(case, folder, world)
    before = snapshot(folder)
    done = subprocess.run(
        [
            launcher, "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
            "--module", "pipeline.train", *arguments,
        ],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    Ended(folder, done.returncode, done.stdout, done.stderr, before).check(case)


def test_the_run_that_all_this_is_made_from_is_not_itself_refused(world: World, tmp_path: Path) -> None:
    """Else every case would pass for the wrong reason."""
    from pipeline.config.deepspeed import accumulation, deepspeed_config
    from pipeline.config.load import resolve

    prepare(Case(), tmp_path / "case", world)
    config = resolve(tmp_path / "case" / "run.yaml")
    assert accumulation(config, 1) == accumulation(config, 2) * 2 == 2
    assert deepspeed_config(config)["zero_optimization"]["stage"] == 3
    assert yaml.safe_load((tmp_path / "case" / "run.yaml").read_text())["cache"] == str(world.folder / "cache")
    assert not (world.folder / "cache").is_relative_to(tmp_path)
