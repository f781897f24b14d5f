"""What DeepSpeed's monitors get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.load import resolve
from pipeline.errors import InputError
from pipeline.monitoring.trackers import _cut
from tests.conftest import World
from tests.pipeline.monitoring.base import rows


def test_csv_monitor_has_the_numbers_of_each_step_once(told: dict[str, Any]) -> None:
    """And nothing of DeepSpeed's own, which counts samples that are not this program's."""
    logged = rows(told["run"])
    names = {name for name in logged[0] if name != "step" and "/" not in name}
    assert set(told["csv"]) == names
    for name in ("forget_loss", "cos_forget_retain", "lr"):
        header, *body = told["csv"][name]
        assert header == ["step", name] and [int(step) for step, _ in body] == [1, 2, 3, 4]
        assert [float(value) for _, value in body] == pytest.approx([row[name] for row in logged], rel=1e-4)


def test_tensorboard_of_deepspeed_has_each_step_once(told: dict[str, Any]) -> None:
    found = EventAccumulator(str(told["theirs"])).Reload()
    assert len(list(told["theirs"].iterdir())) == 2  # the run's, and of its resumption
    for name in ("forget_loss", "cos_forget_retain", "seconds"):
        events = found.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3, 4]
        assert [event.value for event in events] == pytest.approx([row[name] for row in rows(told["run"])], rel=1e-5)


def test_rows_of_later_steps_leave_a_csv_file(tmp_path: Path) -> None:
    """From the end alone: another run may have written above. A row that a full disk cut short goes with them."""
    file = tmp_path / "lr.csv"
    file.write_bytes(b"step,lr\r\n1,0.1\r\n9,0.1\r\n2,0.2\r\n3,0.3\r\n4,0.4\r\n")
    _cut(file, 2)
    assert file.read_bytes() == b"step,lr\r\n1,0.1\r\n9,0.1\r\n2,0.2\r\n"
    file.write_bytes(b"step,lr\r\n1,0.1\r\n1")
    _cut(file, 2)
    assert file.read_bytes() == b"step,lr\r\n1,0.1\r\n"
    assert [one.name for one in tmp_path.iterdir()] == ["lr.csv"]


@pytest.mark.parametrize(
    ("monitors", "message"),
    [
        ({"comet": {"enabled": True}}, "comet_ml"),
        ({"wandb": {"enabled": True}}, "package wandb"),
        ({"csv_monitor": True}, "'csv_monitor' must hold an object"),
    ],
)
def test_a_monitor_that_cannot_work_is_refused(
    monitors: dict[str, Any], message: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where the package is missing
    (tmp_path / "zero.json").write_text(json.dumps(monitors))
    config = world.write(tmp_path / "run.yaml", tmp_path / "run", train={"deepspeed": str(tmp_path / "zero.json")})
    with pytest.raises(InputError, match=message):
        deepspeed_config(resolve(config))


def test_monitors_are_given_every_step_and_the_name_of_the_run(world: World, tmp_path: Path) -> None:
    given = {"comet": {"enabled": False}, "csv_monitor": {"job_name": "mine"}, "tensorboard": {}}
    (tmp_path / "zero.json").write_text(json.dumps(given))
    config = world.write(tmp_path / "run.yaml", tmp_path / "run", train={"deepspeed": str(tmp_path / "zero.json")})
    found = deepspeed_config(resolve(config))
    assert found["comet"] == {"enabled": False, "samples_log_interval": 1, "experiment_name": "run"}
    assert found["csv_monitor"] == {"job_name": "mine"} and found["tensorboard"] == {"job_name": "run"}
