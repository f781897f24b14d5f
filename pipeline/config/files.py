"""Where a configuration file lies: at a path, or among the recipes and DeepSpeed files that this program ships."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import REPOSITORY
from pipeline.errors import InputError


@dataclass(frozen=True)
class Shipped:
    """Files that come with the program, one for each name."""

    folder: str  # in a clone, relative to its root; pyproject.toml installs it as `pipeline/<last part>`
    suffix: str

    @property
    def path(self) -> Path:
        installed = REPOSITORY / "pipeline" / Path(self.folder).name
        return installed if installed.is_dir() else REPOSITORY / self.folder

    def names(self) -> list[str]:
        return sorted(file.stem for file in self.path.glob(f"*{self.suffix}"))

    def find(self, given: str | Path) -> Path | None:
        """The shipped file of a name (`zero3`) or of a clone's path (`ds_configs/zero3.json`), if there is one."""
        by_name = str(given) in self.names()
        by_path = Path(given).parent == Path(self.folder) and Path(given).suffix == self.suffix
        file = self.path / f"{Path(given).stem}{self.suffix}"
        return file if (by_name or by_path) and file.is_file() else None


def is_path_alone(text: str) -> bool:
    """Whether a text that may be a path or a name on the hub (`model`, `owner/model`) can only be a path."""
    return text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1


RECIPES = Shipped("launch/recipes", ".yaml")
DEEPSPEED_FILES = Shipped("ds_configs", ".json")


def find_file(given: str | Path, key: str, shipped: Shipped) -> Path:
    """A file at a path, which may be relative to the working folder; else the shipped file of that name.

    Raises:
        InputError: neither exists; the message names the absolute path that was tried and the shipped names.
    """
    if Path(given).is_file():
        return Path(given)
    found = shipped.find(given)
    if found is None:
        tried = Path(given).absolute()
        reason = f"{tried} is a folder" if tried.is_dir() else f"there is no file {tried}"
        raise InputError(f"{key}: {reason}; give the path of a file, or a shipped name: {', '.join(shipped.names())}")
    return found
