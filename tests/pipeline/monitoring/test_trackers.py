"""What W&B and Comet hold of a run of two ranks, and of its resumption, read back from the files they write offline.

Both are packages of `tests/requirements-slow.txt`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.schema import REPOSITORY
from tests.conftest import World

pytestmark = pytest.mark.slow
STEPS, KEPT = 4, 2


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, cut back to its checkpoint after 2 of 4 steps and resumed; beside it what the monitors of both wrote."""
    folder = tmp_path_factory.mktemp("outlets")
    monitors = {
        "wandb": {"enabled": True, "project": "unlearning", "group": "rules"},
        "comet": {"enabled": True, "online": False, "project": "unlearning"},
    }
    zero = {**json.loads((REPOSITORY / "ds_configs/cpu.json").read_text()), **monitors}
    (folder / "zero.json").write_text(json.dumps(zero))
    config = world.write(
        folder / "run.yaml",
        folder / "run",
        train={"steps": STEPS, "checkpoint_every": KEPT, "deepspeed": str(folder / "zero.json")},
        synthesis={"gamma": 0.5, "layer_geometry_every": 1},
        method="ga_sago",
    )
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "COMET_"))}
    environment = {**ours, "PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    environment |= {"COMET_OFFLINE_DIRECTORY": str(folder / "comet"), "COMET_ERROR_TRACKING_ENABLE": "false"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += ["-m", "pipeline.train", "--config", str(config)]
    for more in ([], ["--resume"]):
        done = subprocess.run(
            [*line, *more], cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if not more:
            shutil.rmtree(folder / "run" / "final")
            shutil.rmtree(folder / "run" / "checkpoints" / f"step-{STEPS:06d}")
            shutil.copy(folder / "run" / "metrics.jsonl", folder / "first.jsonl")
    return folder


def expected(file: Path, after: int = 0) -> dict[tuple[str, int], float]:
    """(name, step) -> value, of the steps after `after` that a metrics.jsonl has, without layers."""
    rows = [json.loads(line) for line in file.read_text().splitlines()][after:]
    return {
        (name, row["step"]): value
        for row in rows
        for name, value in row.items()
        if name != "step" and "/" not in name and value is not None
    }


def check_result(name: str, value: float, rows: dict[tuple[str, int], float]) -> None:
    """Of four steps the last tenth is one; cosines are means."""
    if name.endswith("_loss"):
        assert value == pytest.approx(rows[name, STEPS], rel=1e-9)
    else:
        assert value == pytest.approx(sum(rows[name, step] for step in range(1, STEPS + 1)) / STEPS, rel=1e-9)


GIVEN = {"rule": "sago", "scope": "element", "gamma": 0.5, "lr": 1e-3, "method": "ga_sago", "seed": 0, "steps": STEPS}
RESULTS = ("forget_loss", "retain_loss", "cos_forget_retain", "conflict_fraction")


def records(file: Path) -> Iterator[bytes]:
    """A .wandb file is a LevelDB log after 7 bytes of its own: blocks of 32 KiB; a record whole or in parts, 1 to 4."""
    data, block, whole = file.read_bytes(), 2**15, b""
    assert data[:4] == b":W&B"
    at = 7
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_has_each_step_once_and_what_runs_are_compared_by(folder: Path) -> None:
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # one run, told in two parts
    parts = zip(files, (folder / "first.jsonl", folder / "run" / "metrics.jsonl"), (0, KEPT), strict=True)
    for file, logged, after in parts:
        told: dict[tuple[str, int], float] = {}
        given: dict[str, Any] = {}
        found: dict[str, Any] = {}
        name, project, group, ended = "", "", "", None
        for data in records(file):
            record = proto.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for key in [key for key in row if not key.startswith("_")]:
                    assert (key, row["_step"]) not in told
                    told[key, row["_step"]] = row[key]
            elif kind == "run":
                name, project, group = record.run.display_name, record.run.project, record.run.run_group
            elif kind == "config":
                given |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.config.update}
            elif kind == "summary":
                found |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
            elif kind == "exit":
                ended = record.exit.exit_code
        assert told == pytest.approx(expected(logged, after), rel=1e-12)
        assert (name, project, group, ended) == ("run", "unlearning", "rules", 0)
        assert {key: given.get(key) for key in GIVEN} == GIVEN
        for key in RESULTS:
            check_result(key, found[f"result/{key}"], expected(logged))


def test_comet_has_each_step_once_and_what_runs_are_compared_by(folder: Path) -> None:
    written = []
    for file in (folder / "comet").glob("*.zip"):
        with zipfile.ZipFile(file) as archive:
            messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
            written.append((json.loads(archive.read("experiment.json")), messages))
    written.sort(key=lambda one: one[0]["start_time"])
    assert len(written) == 2 and len({about["offline_id"] for about, _ in written}) == 1  # one run, told in two parts
    parts = zip(written, (folder / "first.jsonl", folder / "run" / "metrics.jsonl"), (0, KEPT), strict=True)
    for (about, messages), logged, after in parts:
        assert about["project_name"] == "unlearning"
        told: dict[tuple[str, int], float] = {}
        given: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for message in messages:
            payload = message["payload"]
            if message["type"] == "metric_msg":
                metric = payload["metric"]
                key = metric["metricName"], metric["step"]
                if not key[0].startswith(("sys.", "process ")):  # of Comet's own
                    assert key not in told
                    told[key] = float(metric["metricValue"])
            elif message["type"] == "parameter_msg":
                given[payload["param"]["paramName"]] = payload["param"]["paramValue"]
            elif message["type"] == "log_other":
                others[payload["key"]] = payload["value"]
        results = {key: told.pop(key) for key in list(told) if key[0].startswith("result/")}
        assert told == pytest.approx(expected(logged, after), rel=1e-12)
        assert {key: yaml.safe_load(str(given.get(key))) for key in GIVEN} == GIVEN
        assert others["Name"] == "run"
        for key in RESULTS:
            check_result(key, results[f"result/{key}", STEPS], expected(logged))
