"""An installed program: a wheel and an editable installation, used from a folder that is not the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config.schema import REPOSITORY
from tests.conftest import World

pytestmark = pytest.mark.slow  # builds and installs the package twice
SOURCES = ("pipeline", "eval", "launch", "ds_configs", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation"]


@dataclass(frozen=True)
class Installed:
    python: Path
    home: Path  # where the package must be imported from

    def run(self, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A fresh environment with this program in it, which borrows the packages of the present one."""
    folder = tmp_path_factory.mktemp(f"install-{request.param}")
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, folder / name)
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=100)
    python = venv / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    source = ["--editable", str(folder)]
    if request.param == "wheel":
        subprocess.run([*PIP, "wheel", *OFFLINE, "-w", str(folder / "dist"), str(folder)], check=True, timeout=300)
        source = [str(*(folder / "dist").glob("*.whl"))]
    subprocess.run([*PIP, "--python", str(python), "install", *OFFLINE, *source], check=True, timeout=300)
    return Installed(python, packages if request.param == "wheel" else folder)


def test_the_library_is_imported_from_the_installation(installed: Installed, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import requires; from pipeline.synthesis import synthesize; import pipeline, eval\n"
        "from pipeline.config.files import RECIPES; import torch\n"
        "f, r = torch.tensor([1., 2.]), torch.tensor([3., -1.])\n"
        "print(pipeline.__file__, eval.__file__, RECIPES.path, len(requires('unlearning')), sep='\\n')\n"
        "print(synthesize([f], [r], rule='sum', alpha=1.0, gamma=2.0)[0].tolist())"
    )
    done = installed.run("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    *paths, dependencies, combined = done.stdout.splitlines()
    assert all(Path(path).is_relative_to(installed.home) for path in paths), paths
    wanted = [line for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert int(dependencies) == len(wanted)
    assert combined == "[5.0, 3.0]"  # 3 + 2 * 1, -1 + 2 * 2


def test_a_shipped_recipe_trains_in_the_callers_folder(installed: Installed, world: World, tmp_path: Path) -> None:
    """`bios` by its name, with its relative paths, its DeepSpeed file, and a refusal."""
    (tmp_path / "runs" / "quickstart" / "bios").mkdir(parents=True)
    for task in ("forget", "retain"):
        rows = [json.dumps({"text": text}) + "\n" for text in world.documents(task)]
        (tmp_path / "runs" / "quickstart" / "bios" / f"{task}.jsonl").write_text("".join(rows))
    small = ["--model.path", str(world.folder / "model"), "--train.steps", "2", "--train.batch_size", "2"]
    small += ["--train.micro_batch_size", "2", "--train.export_every", "0", "--data.max_length", "32"]
    method = ["--config", "bios", "--method", "ga_sago", "--cache", "cache", "--output", "runs/mine"]
    done = installed.run("-m", "pipeline.train", *method, *small, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert [step["skipped"] for step in steps] == [0, 0]
    assert (tmp_path / "runs" / "mine" / "final" / "model.safetensors").is_file()
    refused = installed.run("-m", "pipeline.train", *method, "--train.deepspeed", "zero4", folder=tmp_path)
    assert refused.returncode == 2 and str(tmp_path / "zero4") in refused.stderr


def test_the_other_commands_answer(installed: Installed, tmp_path: Path) -> None:
    for module in ("eval.run", "eval.report", "eval.frontier", "pipeline.plan"):
        done = installed.run("-m", module, "--help", folder=tmp_path)
        assert done.returncode == 0 and "usage:" in done.stdout, (module, done.stderr)
