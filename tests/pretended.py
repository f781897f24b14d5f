"""A copy of scripts of `launch/` in which `python` and `deepspeed` only pretend."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pipeline.config.schema import REPOSITORY


def make_clone(folder: Path, names: tuple[str, ...], *, python: str, deepspeed: str) -> Path:
    """The files or folders `names` of the repository and what scripts source, in an environment that is installed."""
    for name in (*names, "launch/environment.sh", "launch/ranks.sh", "requirements.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, folder / name)
        else:
            shutil.copy(REPOSITORY / name, folder / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name, script in (("deepspeed", deepspeed), ("python", python)):
        (folder / ".venv" / "bin" / name).write_text(script)
        (folder / ".venv" / "bin" / name).chmod(0o755)
    stamp = "cat requirements.txt requirements.txt | cksum | tr ' ' -"
    text = subprocess.check_output(["bash", "-c", stamp], cwd=folder, text=True).strip()
    (folder / ".venv" / f".installed-{text}").touch()
    return folder
