"""Load a causal language model sharded from the start, choose what trains, export a Hugging Face folder."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.pytorch_utils import Conv1D

from pipeline.config import InputError, Lora, Model
from pipeline.corpus import file_digest
from pipeline.forward import blocks_of, text_parameters
from pipeline.weights import WrongWeights, load_whole, missing_package


def load_shape(config: Model) -> PreTrainedConfig:
    """`config.json` of the model.

    Raises:
        InputError: neither a model folder nor a model of the hub, or one that needs its own code to run without
            `trust_remote_code`.
    """
    path = config.path
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise InputError(f"model.path: there is no folder {path}")
    if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise _holds_an_adapter(path)
    try:  # stated always: left open, transformers asks a terminal
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model.path: {path!r} comes with code of its own, which runs only with model.trust_remote_code; "
                "read it first"
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model.path: {path!r} is neither a model folder nor a model of the hub: {reason}") from None


def _holds_an_adapter(path: str) -> InputError:
    return InputError(f"model.path: {path!r} holds an adapter; export it with model.lora.merge, or name its base")


def load_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, once it is clear that there is a model.

    Raises:
        InputError: neither a model folder nor a model of the hub, or no tokenizer beside it, or one that needs its own
            code to run without `trust_remote_code`.
    """
    load_shape(config)
    try:
        return AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = missing_package(config.path) or " ".join(str(error).split())[:300]
        raise InputError(f"model.path: no tokenizer can be loaded from {config.path!r}: {reason}") from None


def check_layer(config: Model, layer: int) -> None:
    """Raises:
    InputError: the model has no decoder block number `layer`.
    """
    path, count = config.path, load_shape(config).get_text_config().num_hidden_layers
    if layer >= count:
        raise InputError(f"objective.layer: {layer}, but {path} has {count} decoder blocks, 0 to {count - 1}")


def check_router_loss(config: Model) -> None:
    """A retain task would have to add the load-balancing loss that such a model asks for, and this program does not.

    That loss multiplies shares of tokens by mean probabilities, both over a batch: the mean over micro-batches, as
    other trainers take it, is another number for every way to cut the batch, and the exact one needs all routing
    decisions of all ranks before the first backward pass.

    Raises:
        InputError: a mixture of experts whose configuration asks for its load-balancing loss.
    """
    shape = load_shape(config).get_text_config()
    if getattr(shape, "output_router_logits", False) and getattr(shape, "router_aux_loss_coef", None) != 0:
        raise InputError(
            f"model.path: config.json of {config.path!r} asks for a load-balancing loss (output_router_logits), which "
            "is not added to the retain loss here; to train without it, set output_router_logits to false in a copy of "
            "the model"
        )


def check_positions(config: Model, longest: int) -> None:
    """Raises:
    InputError: the model has fewer positions than a sequence of `longest` tokens.
    """
    positions = getattr(load_shape(config).get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise InputError(
            f"data.max_length: sequences have up to {longest} tokens, but {config.path} has {positions} positions; "
            f"set {positions} or less"
        )


def pad_token(config: Model, tokenizer: PreTrainedTokenizerBase) -> int:
    """What sequences are padded with: the tokenizer's token, or 0 where it has none that the model embeds.

    It is masked everywhere, so any will do; a tokenizer that got one after training names an id beyond the embedding.
    """
    token: Any = tokenizer.pad_token_id
    return token if token is not None and token < load_shape(config).get_text_config().vocab_size else 0


def check_tokens(config: Model, key: str, largest: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises:
    InputError: `largest`, of the token ids of corpus `key`, has no row in the model's embedding.
    """
    rows = load_shape(config).get_text_config().vocab_size
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"data.{key}: token {token!r} has id {largest}, but the embedding of {config.path} has {rows} rows; take "
            "the tokenizer (and chat template) that the model was trained with"
        )


def load_model(config: Model, deepspeed_config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """The model in `config.dtype`, partitioned while it loads (ZeRO-3 never holds it whole), with what trains chosen.

    transformers keeps the experts of a block in one tensor, which all ranks touch in every micro-batch. A model whose
    experts are modules of their own would make ZeRO-3 wait for ranks that route elsewhere: name the class of the block
    in the DeepSpeed file, `"zero_optimization": {"leaf_module": {"classes": ["package.module.Block"]}}`.

    Args:
        seed: the initial adapters are a function of it alone, the same on any number of ranks.

    Raises:
        InputError: unreadable weights, an attention that cannot be had here, a pattern that names nothing.
    """
    zero3 = HfDeepSpeedConfig(deepspeed_config)  # while it lives, from_pretrained loads under deepspeed.zero.Init
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    shape = load_shape(config)
    if config.dropout is not None:
        options["config"] = set_dropout(copy.deepcopy(shape), config.dropout)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if not config.allow_pickle:
        options["use_safetensors"] = True  # without it, transformers takes a pickle where there is nothing else
    try:
        model = load_whole(config.path, dtype=getattr(torch, config.dtype), **options)
    except WrongWeights as error:
        raise InputError(f"model.path: {error}") from None
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:  # RuntimeError: shapes differ
        reason = " ".join(str(error).split())[:300]
        if config.attn_implementation and (isinstance(error, ImportError) or "attn_implementation" in reason):
            wanted = config.attn_implementation
            raise InputError(f"model.attn_implementation: {wanted!r} cannot be had here: {reason}") from None
        if not config.allow_pickle and "safetensors" in reason:
            reason += "; if you trust its other files, which can run code, set model.allow_pickle: true"
        raise InputError(f"model.path: cannot load {config.path!r}: {reason}") from None
    finally:
        del zero3
    if hasattr(model, "peft_config"):
        raise _holds_an_adapter(config.path)
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = config.dropout  # a rate that is written in the model's code
        restore_dropout(model, shape)
    choose_what_trains(model, config, seed)
    if config.torch_compile:
        stage = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        text = text_parameters(model)
        if stage == 3 and not all(p.requires_grad for name, p in model.named_parameters() if name in text):
            raise InputError(
                "model.torch_compile: under ZeRO stage 3 the backward of a compiled block finds frozen tensors "
                "released; use a lower stage, or let everything train (no model.lora, no model.train)"
            )
        for block in blocks_of(model):
            # ZeRO-3 gathers by hooks around each module: one pair around the block leaves its inside one graph
            deepspeed.utils.set_z3_leaf_module(block, True)
            block.forward = torch.compile(block.forward)
    torch.manual_seed(seed + dist.get_rank())  # dropout: each rank its own
    model.train()
    return model


def set_dropout(shape: PreTrainedConfig, rate: float) -> PreTrainedConfig:
    """`shape` itself, with `rate` at every dropout that it names, nested configurations included.

    The dropping of whole layers or paths has no rate in common with that of elements: it is off.

    Raises:
        InputError: a configuration that takes no such number there.
    """
    for part, name in list(_dropouts(shape)):
        wanted = rate if "dropout" in name or "pdrop" in name else 0.0
        try:
            setattr(part, name, wanted or type(getattr(part, name))(0))  # some take nothing but integers
        except StrictDataclassFieldValidationError:
            raise InputError(
                f"model.dropout: {name} of {shape.model_type} does not take {wanted} in transformers "
                f"{transformers.__version__}; set 0, or null to leave it as it is"
            ) from None
    return shape


def _dropouts(shape: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    """The probabilities of dropping something. Models name them as they like: resid_pdrop, attention_dropout, ..."""
    for name, value in vars(shape).items():
        if isinstance(value, PreTrainedConfig):
            yield from _dropouts(value)
        elif "drop" in name and type(value) in (int, float) and 0 <= value <= 1:
            yield shape, name


def restore_dropout(model: PreTrainedModel, stock: PreTrainedConfig) -> None:
    """Let the exported config.json have the dropout of `stock`, as in the model's folder.

    The modules of `model` keep the configuration that they were built with: some read their rates from it.
    """
    model.config = copy.deepcopy(model.config)
    _copy_dropout(stock if type(stock) is type(model.config) else stock.get_text_config(), model.config)


def _copy_dropout(source: PreTrainedConfig, target: PreTrainedConfig) -> None:
    for name, value in vars(source).items():
        other = getattr(target, name, None)
        if isinstance(value, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            _copy_dropout(value, other)
        elif "drop" in name and other is not None:
            setattr(target, name, value)


def choose_what_trains(model: PreTrainedModel, config: Model, seed: int) -> None:
    """Freeze what does not train, or attach adapters; recompute activations if asked to. Also on the meta device.

    What trains is of the text decoder, embedding or output layer: towers for images or sound stay as they are.

    Raises:
        InputError: a pattern that names nothing.
    """
    if config.lora is None:
        text = text_parameters(model)
        names = [name for name, _ in model.named_parameters() if name in text]
        for pattern in config.train:
            if not any(re.search(pattern, name) for name in names):
                raise InputError(
                    f"model.train: {pattern!r} is found in no tensor name of the text decoder; names look like "
                    f"{names[0]!r}"
                )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in text and any(re.search(pattern, name) for pattern in config.train))
    else:
        torch.manual_seed(seed)
        attach_adapters(model, config.lora)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def attach_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Put an adapter on each targeted linear layer of the text decoder and freeze everything else.

    The model computes what it did before.

    Adapters have the dtype of the layer they sit on: DeepSpeed keeps the fp32 copies that the optimizer needs, and
    would cast fp32 adapters of a half-precision model anyway.

    Raises:
        InputError: a target that names no linear layer, or an output layer that cannot be merged.
    """
    text = text_parameters(model)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    output = [name for name, module in modules if module is model.get_output_embeddings()]
    linear = [name for name, _ in modules if f"{name}.weight" in text or name in output]  # a tied one has another name
    targets: list[str] = []
    for target in lora.targets or []:
        found = [name for name in linear if re.fullmatch(rf"(.*\.)?({target})", name)]
        if not found:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f"model.lora.targets: {target!r} names no linear layer of the text decoder; "
                f"their names end in: {endings}"
            )
        targets += found
    if lora.targets is None:  # peft's own "all-linear" would also reach into tensors of experts
        targets = [name for name in linear if name not in output]
    if lora.merge and model.config.get_text_config().tie_word_embeddings and set(output) & set(targets):
        raise InputError(
            f"model.lora.merge: {output[0]!r} shares its weights with the input embedding, which has no adapter; "
            "remove it from model.lora.targets, or export the adapter"
        )
    base = str(model.name_or_path)
    adapters = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (a float does as well)
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
    )
    inject_adapter_in_model(adapters, model)
    others = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)} ^ set(targets)
    if others:
        raise InputError(
            f"model.lora.targets: peft understands one of them as {min(others)!r}, which is no linear layer of that "
            "name; name layers of the attention"
        )


def gather_weights(model: torch.nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """All tensors of a sharded model on the CPU of rank 0 (elsewhere empty), one tensor at a time on the device."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.named_buffers() if name in model.state_dict()}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights if dist.get_rank() == 0 else {}


def merge_adapters(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + alpha/r B A, computed in fp32, for each adapted W: `weights` by the names that `model` had without adapters.

    Args:
        weights: all tensors of `model`, as `gather_weights` names them.
    """
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (weights[f"{name}.lora_{side}.default.weight"].float() for side in "AB")  # [r, in], [out, r]
            change = layer.scaling["default"] * (b @ a)
            before = merged[f"{name}.weight"]  # [out, in], but a Conv1D's is [in, out]
            change = change.T if isinstance(layer.get_base_layer(), Conv1D) else change
            merged[f"{name}.weight"] = (before.float() + change).to(before.dtype)
    return merged


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    lora: Lora | None = None,
    card: str | None = None,
) -> None:
    """Write `folder` for `AutoModelForCausalLM.from_pretrained`: safetensors, tokenizer, model card.

    The safetensors are a model's, or with `lora` and without `lora.merge` an adapter's as peft writes it.
    Complete or not there at all: it is written beside its place and then renamed. Every rank must call.
    """
    adapter_alone = lora is not None and not lora.merge
    weights = gather_weights(model, trained_only=adapter_alone)
    if dist.get_rank() == 0:
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        if adapter_alone:
            write_adapter(model, weights, unfinished)
        else:
            model.save_pretrained(unfinished, state_dict=weights if lora is None else merge_adapters(model, weights))
        tokenizer.save_pretrained(unfinished)
        if card is not None:
            (unfinished / "README.md").write_text(card, encoding="utf-8")
        written = unfinished / ("adapter_config.json" if adapter_alone else "config.json")
        for file in unfinished.iterdir():  # safetensors writes for this user alone, Python as the umask says
            shutil.copymode(written, file)
        shutil.rmtree(folder, ignore_errors=True)  # an export of a run that was cut off and resumed
        os.replace(unfinished, folder)
    dist.barrier()


def write_adapter(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """`weights` of the adapters of `model`, in the files that peft reads."""
    folder.mkdir(parents=True)
    adapter = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in adapter.items()}  # as in peft's own wrapper
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))


def weight_digests(model: PreTrainedModel, known: Path) -> dict[str, list[Any]]:
    """[bytes, mtime in ns, SHA-256] of each weight file of a local model folder, by path; empty for a hub's.

    Hashes gigabytes for a large model, so every rank must call: each reads a part of the files.

    Args:
        known: what was returned before, as JSON, or no file. A file of the same path, size and mtime is not read again.
    """
    folder = Path(str(model.config.name_or_path))
    if not folder.is_dir():
        return {}
    try:
        before = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) + [folder / "config.json"]
    found: list[Any] = [None] * dist.get_world_size()
    mine = {}
    for file in files[dist.get_rank() :: dist.get_world_size()]:
        path, state = str(file.resolve()), file.stat()
        same = before.get(path, [])[:2] == [state.st_size, state.st_mtime_ns]
        mine[path] = before[path] if same else [state.st_size, state.st_mtime_ns, file_digest(file)]
    dist.all_gather_object(found, mine)
    return {path: entry for part in found for path, entry in part.items()}


def fingerprint(model: PreTrainedModel, digests: dict[str, list[Any]]) -> str:
    """Identifies the weights that were loaded: the hub's commit, or one digest of a folder's `weight_digests`."""
    if not digests:
        return f"{model.config.name_or_path}@{getattr(model.config, '_commit_hash', None)}"
    lines = sorted(f"{Path(path).name} {sha256}\n" for path, (_, _, sha256) in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
