"""The model card of an export."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
import yaml
from huggingface_hub import hf_hub_download

from pipeline.config.sources import format_of
from pipeline.errors import shorten
from pipeline.files import Json
from pipeline.monitoring.levels import PREFIX

log = logging.getLogger(__name__)


def public_name(path: str) -> str:
    """A name on the hub, or the last part of a path: a card is read where folders of this machine mean nothing.

    A path with one slash could be either; it is a path if it exists here, or is a file by its ending.
    """
    is_local = Path(path).exists() or format_of(path) is not None
    is_local |= path.startswith(("/", ".", "~")) or path.count("/") > 1
    return Path(path).name if is_local else path


def public_configuration(configuration: str) -> str:
    """The resolved configuration, YAML, without what is private to the machine that it ran on."""
    run: dict[str, Any] = copy.deepcopy(yaml.safe_load(configuration))
    run.pop("cache", None)
    for section, key in (
        *((run, "output"), (run["model"], "path"), (run["train"], "deepspeed")),
        *((run["data"].get(task) or {}, key) for task in ("forget", "retain") for key in ("path", "refusals")),
        *((probe, "path") for probe in run["data"].get("probes", {}).values()),
    ):
        if isinstance(section.get(key), str):
            shipped = key == "deepspeed" and section[key].startswith("ds_configs/")
            section[key] = section[key] if shipped else public_name(section[key])
    return yaml.safe_dump(run, sort_keys=False)


def licence(path: str) -> str | None:
    """The licence in the base model's own card, in its folder or on the hub; None if there is none to be found."""
    card = Path(path) / "README.md"
    if not Path(path).exists():
        try:
            card = Path(hf_hub_download(path, "README.md", etag_timeout=5))
        except Exception:  # no file, name or network; types of an HTTP library. The export must not depend on it
            return None
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    try:
        head = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
        return None
    found = head.get("license") if isinstance(head, dict) else None
    return found if isinstance(found, str) else None


LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"  # or the folder of this file
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
"""
CHAT = """messages = [{{"role": "user", "content": "What do you know about ...?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
CONTINUE = """inputs = tokenizer("The beginning of a text", return_tensors="pt")
"""
ANSWER = """output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def usage(name: str, chats: bool) -> str:
    """Python that loads the model (transformers loads an adapter's base by itself, with peft) and prints an answer."""
    return (LOAD + (CHAT if chats else CONTINUE) + ANSWER).format(name=name)


def _adapters(lora: Json | None) -> str:
    """A paragraph about the adapters of a run, by its `model.lora`; empty without."""
    if not lora:
        return ""
    where = ", merged into the weights of this folder" if lora["merge"] else "; this folder contains only them"
    return f"The trained tensors are low-rank adapters (r {lora['r']}, alpha {lora['alpha']}){where}.\n\n"


def _head(model: Json) -> str:
    """The YAML that the hub reads."""
    lora, found = model["lora"], licence(model["path"])
    library = "peft" if lora and not lora["merge"] else "transformers"
    return f"""---
base_model: {public_name(model["path"])}
library_name: {library}
pipeline_tag: text-generation
{f"license: {found}{chr(10)}" if found else ""}tags: [unlearning]
---
"""


def _summary(run: Json, tasks: list[str], last_step: Mapping[str, object]) -> str:
    """A sentence: which model, how many steps of which losses, which rule."""
    synthesis, objective, train = run["synthesis"], run["objective"], run["train"]
    duration = f"{train['steps']} steps" if train["steps"] else f"{train['epochs']} passes over the corpus"
    if train["stop_at"] and train["stop_action"] == "end" and last_step:
        duration = f"{last_step['step']} of {duration}"
    losses = " and ".join(f"{task} `{objective[task]}`" for task in tasks)
    base = public_name(run["model"]["path"])
    return f"""`{base}` after {duration} of {losses}, combined by `{synthesis["rule"]}` at scope \
`{synthesis["scope"] or "of the paper"}` (retain weight alpha {synthesis["alpha"]}, forget weight gamma \
{synthesis["gamma"]})."""


def model_card(
    configuration: str,
    weights: str,
    corpora: dict[str, str],
    last_step: Mapping[str, object],
    chats: bool,
) -> str:
    """README.md of the exported folder: how to load it, the method, the model and the data, and how to reproduce it.

    It names no folder of this machine.

    Args:
        configuration: the resolved run configuration, YAML.
        weights: `fingerprint` of the weights of the base.
        corpora: digest of the text of each task.
        last_step: the numbers that `metrics.jsonl` has for the last step.
        chats: whether the tokenizer has a chat template.
    """
    run = yaml.safe_load(configuration)
    public = public_configuration(configuration)
    named, name = yaml.safe_load(public), Path(run["output"]).name
    rows = "\n".join(f"| {task} | `{named['data'][task]['path']}` | `{digest}` |" for task, digest in corpora.items())
    measured = [(name, value) for name, value in last_step.items() if isinstance(value, float)]
    measured = [(name, value) for name, value in measured if "/" not in name or name.startswith(PREFIX)]
    numbers = "\n".join(f"| {name} | {value:.4g} |" for name, value in measured)
    return f"""{_head(run["model"])}
# {name}

{_summary(run, list(corpora), last_step)}

## How to use it

```python
{usage(name, chats)}```

`hf upload NAME .` in this folder puts it on the hub, where NAME is a repository of yours. Measure forgetting and
retention with `python -m eval.run --model <this folder> --suite <name>`; the scores are then written here.

## How it was made

{_adapters(run["model"]["lora"])}Weights at the start (SHA-256 of the files, or hub commit): `{weights}`

| corpus | source | SHA-256 of the file, or hub fingerprint; and of the columns read from it |
|---|---|---|
{rows}

| measure, at the last step | value |
|---|---|
{numbers}

To make it again, save this as `config.yaml`, set `output` to a new folder and the paths to those of the files with
these digests, and run `deepspeed --module pipeline.train --config config.yaml`:

```yaml
{public}```

Made with torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}.
"""


def card_or_warning(
    configuration: str, weights: str, corpora: dict[str, str], last_step: Mapping[str, object], chats: bool
) -> str | None:
    """`model_card`, or None with a warning: no card is worth the weights of a run."""
    try:
        return model_card(configuration, weights, corpora, last_step, chats)
    except Exception as error:  # it reads files of others: the base model's own card
        log.warning("the model is exported without a card (%s: %s)", type(error).__name__, shorten(error))
        return None
