"""The configuration of the training of an attack, made of that of the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval import loading, robustness
from eval.attacks import spec, training
from eval.attacks.run import attacks_of
from eval.attacks.training import training_config
from eval.suites import corpus
from pipeline.config.load import resolve
from pipeline.errors import InputError
from tests.conftest import World

RUNS: dict[str, dict[str, Any]] = {
    "joint": {"train": {"schedule": "joint"}},
    "a key of cagrad": {"synthesis": {"rule": "cagrad", "scope": "layer", "c": 0.3}},
    "a key of bloop": {"synthesis": {"rule": "bloop", "new_share": 0.5, "alpha": 0.0}},
    "graddrop": {"synthesis": {"rule": "graddrop", "geometry": True}},
    "pdu": {"objective": {"forget": "pdu", "retain_loss_eps": 2.0}},
    "jensun": {"objective": {"forget": "jensun", "retain": "jsd"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_whatever_the_run_was_its_attack_trains_on_one_corpus_alone(name: str, world: World, tmp_path: Path) -> None:
    run = resolve(world.write(tmp_path / "run.yaml", tmp_path / "run", **RUNS[name])).model_dump()
    plan = spec.Plan(tmp_path, run, "corpus", corpus, [], None, 7, 1e-3, 5, (), 1, 1, tmp_path, loading.Trust())
    made = training_config(plan, run["data"]["forget"], tmp_path / "attack")
    (tmp_path / "attack.yaml").write_text(yaml.safe_dump(made))
    config = resolve(tmp_path / "attack.yaml")
    assert config.tasks == ["retain"] and config.data.retain is not None and config.data.forget is None
    assert config.data.retain.path == run["data"]["forget"]["path"]
    assert (config.train.steps, config.train.schedule, config.optimizer.lr, config.seed) == (7, "sequential", 1e-3, 5)
    assert (config.synthesis.rule, config.synthesis.alpha, config.train.deepspeed) == (
        *("sum", 1.0),
        run["train"]["deepspeed"],
    )


def test_an_attack_trains_on_visible_gpus(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that trains nothing needs none of them."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lines = list[list[str]]()
    monkeypatch.setattr(training, "call", lambda line, log: lines.append(line) or Path(f"{log}.err").touch() or 1)
    given = ["--run", str(run), "--suite", "probes", "--attacks", "int4"]
    assert robustness.parse_command_line(given)[1] == ["int4"]
    with pytest.raises(InputError, match=r"--ranks 2: .* 1 GPU"):
        robustness.parse_command_line([*given, "relearn_curve"])
    plan, names, *_ = robustness.parse_command_line([*given, "relearn_curve", "--ranks", "1"])
    plan.folder.mkdir()
    with pytest.raises(InputError, match="training relearn_curve failed"):
        training.train(plan, attacks_of(plan, names)[1])
    assert "--include localhost:3 --module pipeline.train" in " ".join(lines[0])
