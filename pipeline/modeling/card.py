"""The model card of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
import yaml


def model_card(configuration: str, base: str, weights: str, corpora: dict[str, str], last_step: dict[str, Any]) -> str:
    """README.md of the exported folder: what was done to which model with which data, and how to do it again.

    Args:
        configuration: the resolved run configuration, YAML.
        base: `model.path`. weights: `fingerprint` of the weights it held.
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
    adapters = f"What trained are low-rank adapters (r {lora['r']}, alpha {lora['alpha']})" if lora else ""
    if lora:
        adapters += ", merged here into the weights.\n\n" if lora["merge"] else "; this folder holds them alone.\n\n"
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

{adapters}Weights it started from (SHA-256 of the files, or hub commit): `{weights}`

| corpus | source | SHA-256 of the file, or hub fingerprint; and of what was read from it |
|---|---|---|
{rows}

## Last step
| measure | value |
|---|---|
{numbers}

What it forgot and what it kept is measured by `python -m eval.run --model <this folder> --suite <name>`.

## To make it again
Save this as `config.yaml`, set `output` to a new folder, and run
`deepspeed --module pipeline.train --config config.yaml`:

```yaml
{configuration}```

Made with torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}.
"""
