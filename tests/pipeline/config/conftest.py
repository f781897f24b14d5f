"""A run configuration, and a DeepSpeed configuration, from a few keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.load import resolve
from pipeline.config.schema import RunConfig
from tests.pipeline.config.base import Resolve, keys


@pytest.fixture
def config(tmp_path: Path) -> Resolve:
    """Resolve a file of the least keys with `changed` sections laid over them."""

    def make(*overrides: str, method: str | None = None, **changed: Any) -> RunConfig:
        base = keys(tmp_path)
        for section, values in changed.items():
            base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(base))
        return resolve(file, method, overrides)

    return make


@pytest.fixture
def deepspeed(config: Resolve, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`deepspeed_config` for a DeepSpeed file with this content."""

    def make(content: Any, **changed: Any) -> dict[str, Any]:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        train = {"deepspeed": str(file), **changed.pop("train", {})}
        model = {"dtype": "bfloat16", **changed.pop("model", {})}  # as a run on GPUs has it
        return deepspeed_config(config(train=train, model=model, **changed))

    return make
