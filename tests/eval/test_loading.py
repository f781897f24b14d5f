"""What a model folder may bring that can run code, in both commands that load models: nothing unless asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import loading, robustness
from eval.attacks import run as attack_run
from eval.attacks import training
from eval.files import write_jsonl
from eval.loading import Trust
from eval.results.metrics import choose
from eval.sweep.runs import Plan
from pipeline.config.load import resolve, to_yaml
from pipeline.errors import InputError
from tests.conftest import World

REPOSITORY = Path(__file__).resolve().parents[2]
PROBES = [{"split": "retain", "kind": "QA", "prompt": "kara lo", "answer": "mi"}]
# A model with code of its own: a Llama under another name. Whoever imports it leaves a file behind.
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({trace!r}).touch()
class StrangeConfig(LlamaConfig):
    model_type = "stranger"
class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


def pickle_weights(folder: Path, stem: str) -> None:
    """`STEM.bin` in the place of `STEM.safetensors`; a model's is called pytorch_model.bin."""
    weights = folder / f"{stem}.safetensors"
    torch.save(load_file(weights), folder / f"{'pytorch_model' if stem == 'model' else stem}.bin")
    weights.unlink()


def make_adapter(base: Path, folder: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


@pytest.fixture
def pickled(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A model, or an adapter with its base, whose weights are a pickle, and the logits that it has as safetensors."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(world.folder / "model", base)
    make_adapter(base, adapter)
    folder = base if request.param == "model" else adapter
    right = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([[3, 5, 7]])).logits
    pickle_weights(base, "model")
    return folder, right


@pytest.mark.parametrize("pickled", ["model", "base of an adapter"], indirect=True)
def test_pickles_are_refused_unless_asked_for(pickled: tuple[Path, torch.Tensor]) -> None:
    folder, right = pickled
    with pytest.raises(InputError, match="--allow-pickle") as caught:
        loading.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    model: Any = loading.load(folder, trust=Trust(allow_pickle=True))[0]
    assert torch.equal(model(input_ids=torch.tensor([[3, 5, 7]])).logits, right)


def test_a_pickled_adapter_is_refused(world: World, tmp_path: Path) -> None:
    make_adapter(world.folder / "model", tmp_path / "adapter")
    pickle_weights(tmp_path / "adapter", "adapter_model")
    for trust in (Trust(), Trust(allow_pickle=True)):
        with pytest.raises(InputError, match=r"the adapter in .*adapter has no adapter_model\.safetensors"):
            loading.load(tmp_path / "adapter", trust=trust)


def make_strange(world: World, folder: Path, trace: Path) -> Path:
    """The fixture's model, of a kind that only the code beside it knows, which leaves `trace`."""
    shutil.copytree(world.folder / "model", folder)
    code = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeForCausalLM"}
    shape = json.loads((folder / "config.json").read_text()) | {"model_type": "stranger", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "strange.py").write_text(CODE.format(trace=str(trace)))
    return folder


def command(module: str, *arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    """The command with somebody at the terminal who says yes to everything."""
    line = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(home / "modules")}
    return subprocess.run(
        line, cwd=REPOSITORY, env=environment, input="y\n" * 9, capture_output=True, text=True, timeout=100
    )


def test_code_of_a_model_runs_only_where_asked_for(world: World, tmp_path: Path) -> None:
    trace, output = tmp_path / "ran", tmp_path / "answer.json"
    folder = make_strange(world, tmp_path / "strange", trace)
    write_jsonl(tmp_path / "probes.jsonl", PROBES)
    arguments = ("--model", folder, "--suite", "bios", "--data", tmp_path, "--output", output)
    done = command("eval.run", *arguments, home=tmp_path)
    assert not trace.exists() and not output.exists()
    progress, *refusal = done.stderr.splitlines()
    assert progress.startswith("evaluating ") and len(refusal) == 1 and refusal[0].startswith("error: "), done.stderr
    assert done.returncode == 2
    assert str(folder) in done.stderr and "--trust-remote-code" in done.stderr and "[y/N]" not in done.stdout
    done = command("eval.run", *arguments, "--trust-remote-code", home=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert trace.exists() and json.loads(output.read_text())["suites"]["bios"]["counts"] == {"retain": {"QA": 1}}


# ---------------------------------------------------------------------------------------------------------------------
# Commands that load what a training run made


@pytest.fixture
def finished(world: World, tmp_path: Path) -> Path:
    """`run/`: a run whose configuration allows everything, as a stranger's may."""
    folder = tmp_path / "run"
    shutil.copytree(world.folder / "model", folder / "final")
    allowed = {"trust_remote_code": True, "allow_pickle": True}
    config = world.write(tmp_path / "recipe.yaml", folder, model=allowed)
    (folder / "config.yaml").write_text(to_yaml(resolve(config)))
    write_jsonl(tmp_path / "probes.jsonl", PROBES)
    return folder


def attack(finished: Path, *more: object) -> list[str]:
    given = ("--run", finished, "--suite", "bios", "--data", finished.parent, *more)
    return [*map(str, given)]


@pytest.mark.parametrize("what", ["final", "original"])
@pytest.mark.parametrize("kind", ["pickle", "code"])
def test_a_run_is_attacked_by_the_same_rules(what: str, kind: str, world: World, finished: Path) -> None:
    """Before an attack trains anything: the refusal is not the end of a long wait."""
    trace, folder = finished.parent / "ran", finished / "final" if what == "final" else finished.parent / "original"
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "code":
        make_strange(world, folder, trace)
    else:
        shutil.copytree(world.folder / "model", folder)
        pickle_weights(folder, "model")
    if what == "original":
        config = yaml.safe_load((finished / "config.yaml").read_text())
        config["model"]["path"] = str(folder)
        (finished / "config.yaml").write_text(yaml.safe_dump(config))
    before = sorted(finished.rglob("*"))
    flag = {"pickle": "--allow-pickle", "code": "--trust-remote-code"}[kind]
    with pytest.raises(InputError, match=flag) as caught:
        robustness.parse_command_line(attack(finished))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not trace.exists() and sorted(finished.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (False, False)),
        (["--allow-pickle"], (True, False)),
        (["--trust-remote-code"], (False, True)),
    ],
)
def test_an_attack_trains_with_what_its_command_allows(
    flags: list[str], expected: tuple[bool, bool], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with what the configuration of the run says, which came with the run."""

    def train_nothing(line: list[str], log: Path) -> int:
        shutil.copytree(finished / "final", log.with_suffix("") / "final")
        return 0

    monkeypatch.setattr(training, "call", train_nothing)
    plan, *_ = robustness.parse_command_line(attack(finished, *flags))
    (made,) = attack_run.attacks_of(plan, ["retain"])
    training.train(plan, made)
    model = yaml.safe_load((plan.folder / "retain.yaml").read_text())["model"]
    assert (model["allow_pickle"], model["trust_remote_code"]) == expected


def test_a_sweep_evaluates_its_runs_as_it_trained_them(finished: Path) -> None:
    fields = {"config": Path("recipe.yaml"), "overrides": (), "suites": ("bios",), "data": None, "target": None}
    fields |= {"output": finished.parent, "methods": (), "seeds": (), "axes": (), "ranks": 1, "trials": 1}
    plan = Plan(**fields, measure=choose(["bios"], level=0.1))
    assert {"--allow-pickle", "--trust-remote-code"} < set(plan.evaluation(finished))
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["model"] |= {"trust_remote_code": False, "allow_pickle": False}
    (finished / "config.yaml").write_text(yaml.safe_dump(config))
    assert not {"--allow-pickle", "--trust-remote-code"} & set(plan.evaluation(finished))
