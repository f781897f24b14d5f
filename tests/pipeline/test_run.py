"""The command as users start it: launchers, the run folder, the exported model, the log."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import oracle
from tests.conftest import World
from tests.distributed import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
PROMISED = [
    *("step", "forget_loss", "retain_loss", "cos_forget_retain", "cos_combined_forget", "cos_combined_retain"),
    *("conflict_fraction", "grad_norm", "lr", "skipped", "seconds", "tokens_per_second", "peak_memory_bytes"),
]


def launch(*command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False)


def deepspeed(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    port = str(free_port())
    module = ("--module", "pipeline.train", *arguments)
    return launch("deepspeed", "--num_gpus", str(ranks), "--master_port", port, *module)


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of NPO with SAGO on two ranks that the `deepspeed` command started, blocks of tokens, all features on."""
    folder = tmp_path_factory.mktemp("run")
    config = world.write(
        folder / "recipe.yaml",
        folder / "unused",
        data={**world.configuration("")["data"], "packing": "blocks", "max_length": 16},
        optimizer={"schedule": "linear", "warmup_ratio": 0.5},
        synthesis={"layer_geometry_every": 3},
        train={"export_every": 3, "steps": 6},
    )
    recipe = yaml.safe_load(config.read_text())
    recipe["methods"] = {"npo_sago": {"objective": {"forget": "npo"}, "output": str(folder / "run")}}
    config.write_text(yaml.safe_dump(recipe))
    done = deepspeed("--config", str(config), "--method", "npo_sago", "--seed", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_every_promised_number(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(PROMISED) <= set(line)
        assert all(line[name] is not None and math.isfinite(line[name]) for name in PROMISED)
        assert line["skipped"] == 0 and line["peak_memory_bytes"] > 50e6 and line["tokens_per_second"] > 0
    # warm-up over half the steps, then linear decay, as transformers defines them
    assert [line["lr"] / 1e-3 for line in lines] == pytest.approx([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])


GROUPS = ("2_loss", "3_geometry", "4_training")  # of the board, in which it puts the numbers


def test_tensorboard_has_the_same_numbers_and_the_configuration(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lines = metrics(finished)
    for name in PROMISED[1:]:
        (tag,) = (tag for tag in events.Tags()["scalars"] if tag in {f"{group}/{name}" for group in GROUPS})
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([line[name] for line in lines])
    for layer in ("model.layers.0", "model.layers.1", "lm_head"):
        tag = f"conflict_fraction/{layer}"
        assert {e.step: e.value for e in events.Scalars(tag)} == pytest.approx({n: lines[n - 1][tag] for n in (3, 6)})
    (tag,) = (tag for tag in events.Tags()["tensors"] if tag.startswith("configuration"))
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "forget: npo" in text and "seed: 3" in text


def test_final_loads_and_generates(finished: Path, world: World) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(finished / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    original = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    assert model.dtype == torch.float32
    for (name, tensor), (_, before) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert not torch.equal(tensor, before), name
    out = model.generate(**tokenizer("kara lovi", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 1
    assert {path.name for path in (finished / "final").iterdir()} >= {"model.safetensors", "README.md"}


def test_model_card_says_what_was_done_with_what(finished: Path, world: World) -> None:
    card = (finished / "final" / "README.md").read_text()
    for task in ("forget", "retain"):
        assert hashlib.sha256((world.folder / f"{task}.jsonl").read_bytes()).hexdigest() in card
    assert "base_model: model\n" in card and "`npo`" in card and "`sago`" in card
    assert str(world.folder) not in card and str(finished.parent) not in card and "~/" not in card
    inside = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    config = yaml.safe_load((finished / "config.yaml").read_text())
    del config["cache"]
    config["output"], config["model"]["path"] = "run", "model"
    for task in ("forget", "retain"):
        config["data"][task]["path"] = f"{task}.jsonl"
    assert inside == config


def test_the_run_says_what_its_paths_held(finished: Path, world: World) -> None:
    """`digests.json`, by which reports know seeds of one method: each digest from the files themselves."""
    found = json.loads((finished / "digests.json").read_text())
    assert {*found} == {"model.path", "tokenizer", "data.forget.path", "data.retain.path", "train.deepspeed"}
    for task in ("forget", "retain"):
        source = hashlib.sha256((world.folder / f"{task}.jsonl").read_bytes()).hexdigest()
        assert found[f"data.{task}.path"].startswith(source)
    files = [world.folder / "model" / name for name in ("model.safetensors", "config.json")]
    lines = sorted(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
    assert found["model.path"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert found["data.forget.path"] in (finished / "final" / "README.md").read_text()


def test_exports_on_the_way_lead_to_final(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "exports").iterdir()) == ["step-000003", "step-000006"]
    halfway = load_file(finished / "exports" / "step-000003" / "model.safetensors")
    last = load_file(finished / "exports" / "step-000006" / "model.safetensors")
    final = load_file(finished / "final" / "model.safetensors")
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert any(not torch.equal(halfway[name], final[name]) for name in final)


def test_a_run_is_never_overwritten(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    again = launch(sys.executable, "-m", "pipeline.train", "--config", str(finished / "config.yaml"))
    assert again.returncode == 2 and str(finished) in again.stderr and "Traceback" not in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


@pytest.mark.slow  # the tests of the console start a run alone
@pytest.mark.parametrize("launcher", ["alone", "torchrun", "mpirun"])
def test_other_launchers_give_the_same_model(launcher: str, finished: Path, tmp_path: Path, world: World) -> None:
    """The resolved config.yaml of a run is itself a configuration, and says the same thing under every launcher."""
    program = ["-m", "pipeline.train", "--config", str(finished / "config.yaml"), "--output", str(tmp_path / "run")]
    if launcher == "torchrun":
        command = ["torchrun", "--standalone", "--nproc_per_node", "2", *program]
    elif launcher == "mpirun":
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        command = ["mpirun", *root, "--oversubscribe", "-np", "2", sys.executable, *program]
    else:
        command = [sys.executable, *program]
    done = launch(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    first = load_file(finished / "final" / "model.safetensors")
    second = load_file(tmp_path / "run" / "final" / "model.safetensors")
    if launcher == "alone":  # one rank sums in another order
        initial = load_file(world.folder / "model" / "model.safetensors")
        assert oracle.weight_change_error(second, first, initial) < 2e-4
    else:
        assert all(torch.equal(first[name], second[name]) for name in first)
