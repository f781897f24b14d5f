"""What the tests of the plan share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.automatic import fit_machine
from pipeline.config.schema import RunConfig


def configuration_of(path: Path, **sections: Any) -> RunConfig:
    corpus = {"path": "some/corpus"}
    base: dict[str, Any] = {"output": "unused", "data": {"forget": corpus, "retain": corpus}, **sections}
    base["model"] = {"path": str(path), **base.get("model", {})}
    return fit_machine(RunConfig.model_validate(base), on_gpu=True)
