"""Weights from a model's files: each tensor of the model is in the files, and each tensor of the files in the model."""

from __future__ import annotations

import gc
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.peft_utils import find_adapter_config_file

from pipeline.config.files import is_path_alone
from pipeline.zero.compat import forget_models

SHOWN = 3  # names in a message

LoadReport = dict[str, Any]  # what `from_pretrained` reports: sets of names, and of names with two shapes


def release_memory() -> None:
    """Release the memory of models that are no longer used. No sharded model may be inside a forward pass."""
    forget_models()
    gc.collect()  # models reference themselves in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class WrongWeights(ValueError):
    """The files of a model cannot be read, or do not fit the model that its `config.json` describes."""


def load_whole(path: str | Path, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained(path, **options)`, refused if a tensor is missing or unexpected.

    transformers fills a missing tensor with random numbers and ignores an unexpected one; under ZeRO-3 it does not look
    for unexpected ones at all. Buffers, tied tensors, and what the model's class declares optional may be missing.
    `save_pretrained` of the model writes the tensor names of the files that it was loaded from, under any ZeRO stage.

    Args:
        path: a model, or an adapter, whose base is loaded and checked first; a folder or a hub name.

    Raises:
        WrongWeights: missing, unexpected or differently shaped tensors, by name; a file that may not be read.
        Exception: whatever `from_pretrained` raises.
    """
    adapter = None if (Path(path) / "config.json").is_file() else find_adapter_config_file(str(path))
    base = str(path)
    if adapter is not None:
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if is_path_alone(base) and not Path(base).is_dir():
            raise WrongWeights(
                f"{adapter} names as base_model_name_or_path the folder {base}, which is not there; write the place of "
                "the base model there"
            )
    refuse_unreadable(base)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel | None = None
    found: LoadReport = {}
    fault: str | None = None
    failure: Exception | None = None
    try:  # ignore mismatches here: the error of transformers would not name the tensor that has another shape
        model, found = auto.from_pretrained(base, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # under ZeRO-3 it raises a mismatch all the same, on the rank that reads the tensors
        if not is_deepspeed_zero3_enabled() and "size mismatch" not in str(error):
            raise
        failure, fault = error, " ".join(str(error).split())[:300]
    if is_deepspeed_zero3_enabled():  # whatever one rank met, all leave here together
        faults: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
        fault = next((one for one in faults if one is not None), None)
        if failure is not None and "size mismatch" not in str(failure):
            raise failure
        if fault is not None and "size mismatch" not in fault:
            raise WrongWeights(f"another rank could not load the weights in {base}: {fault}")
    if model is None or fault is not None:
        raise WrongWeights(f"the weights in {base} are not the model's: {fault}")
    names = tensor_names(base, getattr(model.config, "_commit_hash", None))
    unplaced = restore_names_on_saving(model, names)
    refuse_others(base, model, {**found, "unexpected_keys": found["unexpected_keys"] | unplaced})
    if adapter is not None:
        refuse_unreadable(str(path))
        safetensors = {key: options[key] for key in ("use_safetensors",) if key in options}
        refuse_others(str(path), model, model.load_adapter(str(path), **safetensors).to_dict())
    return model


def refuse_unreadable(path: str) -> None:
    """Raises:
    WrongWeights: this user may not read a file of the folder `path`; the libraries would report it as missing.
    """
    for file in sorted(Path(path).glob("*")) if os.path.isdir(path) else []:
        if file.is_file() and not os.access(file, os.R_OK):
            raise WrongWeights(f"{file} is not readable for this user; its owner can run chmod +r on it")


def missing_package(path: str | Path) -> str | None:
    """The reason why a tokenizer could not be loaded, where a package is missing that the libraries do not name."""
    if find_spec("sentencepiece") is not None:
        return None
    found = [
        cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
        for name in ("tokenizer.json", "tokenizer.model")
    ]
    if found[0] is not None or found[1] is None:
        return None
    return "its tokenizer is a tokenizer.model alone, which the package sentencepiece reads: pip install sentencepiece"


def tensor_names(path: str, commit: str | None) -> list[str]:
    """Names of the tensors in the files that transformers loads."""
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        found = [
            cached_file(path, name, _commit_hash=commit, _raise_exceptions_for_missing_entries=False)
            for name in (whole, index)
        ]
        if found[0] is not None:
            return list(load_state_dict(found[0], map_location="meta"))
        if found[1] is not None:
            return list(json.loads(Path(found[1]).read_text(encoding="utf-8"))["weight_map"])
    return []


def restore_names_on_saving(model: Any, names: list[str]) -> set[str]:
    """Make `model.save_pretrained` write `names`, as they are in the source; return those that no tensor has.

    transformers renames while loading (Gemma 3's `language_model.model` is its `model.language_model`) and records the
    rules it used, to reverse them. Under ZeRO-3 it records all rules, used or not. It never records that it added the
    prefix of the base model to the names of a source without one (`h.0` for `transformer.h.0`, as GPT-2's).
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, tensors = model.base_model_prefix, model.state_dict()
    unplaced, prefixed = set(), set()
    for name in sorted(names, key=dot_natural_key):
        renamed = rename_source_key(name, renamings, converters)[0]
        placed = rename_source_key(name, renamings, converters, prefix, tensors)[0]
        unplaced |= {name} - ({name} if placed in tensors else set())
        prefixed |= {placed} if placed == f"{prefix}.{renamed}" else set()
    used = [rule for rule in rules if rule.was_used()]
    model._weight_conversions = [*used, *([PrefixChange(prefix_to_add=prefix)] if prefixed else [])]
    ignored = LoadStateDictInfo(set(), unplaced, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(ignored)  # removes the names that the model's class declares unused
    return ignored.unexpected_keys


def refuse_others(path: str, model: PreTrainedModel, found: LoadReport) -> None:
    """Raises:
    WrongWeights: `found`, as `from_pretrained` reports it, contains more than missing buffers.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(found["missing_keys"] & parameters)
    unexpected = sorted(found["unexpected_keys"])
    shapes = [f"{name} {list(theirs)}, not {list(ours)}" for name, theirs, ours in sorted(found["mismatched_keys"])]
    faults = [
        f"{len(names)} {fault} ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"
        for names, fault in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if names
    ]
    if not faults:
        return
    prefixes = {name.removesuffix(tensor) for tensor in missing for name in unexpected if name.endswith(tensor)}
    prefix = next((one for one in prefixes if {one + tensor for tensor in missing} <= set(unexpected)), None)
    remedy = "they must fit config.json: take the folder as it was published or exported"
    if prefix:
        remedy = f"remove {prefix!r} from the beginning of their names"
    raise WrongWeights(f"the weights in {path} are not the model's: tensors {', '.join(faults)}; {remedy}")
