"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import deepspeed
import torch
import transformers
import yaml

from pipeline.files import Json


def _adapters(lora: Json | None) -> str:
    """A paragraph about the adapters of a run, by its `model.lora`; empty without."""
    if not lora:
        return ""
    where = ", merged into the weights of this folder" if lora["merge"] else "; this folder contains only them"
    return f"The trained tensors are low-rank adapters (r {lora['r']}, alpha {lora['alpha']}){where}.\n\n"


def model_card(
    configuration: str, base: str, weights: str, corpora: dict[str, str], last_step: Mapping[str, object]
) -> str:
    """README.md of the exported folder: the method, the model and the data, and how to reproduce it.

    Args:
        configuration: the resolved run configuration, YAML.
        base: `model.path`. weights: `fingerprint` of its weights.
        corpora: digest of the text of each task.
        last_step: the numbers that `metrics.jsonl` has for the last step.
    """
    run = yaml.safe_load(configuration)
    synthesis, objective, train = run["synthesis"], run["objective"], run["train"]
    duration = f"{train['steps']} steps" if train["steps"] else f"{train['epochs']} passes over the corpus"
    tasks = " and ".join(f"{task} `{objective[task]}`" for task in corpora)
    rows = "\n".join(f"| {task} | `{run['data'][task]['path']}` | `{digest}` |" for task, digest in corpora.items())
    lora = run["model"]["lora"]
    library = "peft" if lora and not lora["merge"] else "transformers"
    measured = [(name, value) for name, value in last_step.items() if isinstance(value, float) and "/" not in name]
    numbers = "\n".join(f"| {name} | {value:.4g} |" for name, value in measured)
    return f"""---
base_model: {base}
library_name: {library}
pipeline_tag: text-generation
tags: [unlearning]
---

# {Path(run["output"]).name}

`{base}` after {duration} of {tasks}, combined by `{synthesis["rule"]}` at scope \
`{synthesis["scope"] or "of the paper"}` (retain weight alpha {synthesis["alpha"]}, forget weight gamma \
{synthesis["gamma"]}).

{_adapters(lora)}Weights at the start (SHA-256 of the files, or hub commit): `{weights}`

| corpus | source | SHA-256 of the file, or hub fingerprint; and of the columns read from it |
|---|---|---|
{rows}

## Last step
| measure | value |
|---|---|
{numbers}

Measure forgetting and retention with `python -m eval.run --model <this folder> --suite <name>`.

## How to reproduce it
Save this as `config.yaml`, set `output` to a new folder, and run
`deepspeed --module pipeline.train --config config.yaml`:

```yaml
{configuration}```

Made with torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}.
"""
