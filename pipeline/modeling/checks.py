"""A model's configuration and tokenizer, and what they tell before weights are read: which runs are refused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from pipeline.config.files import is_path_alone
from pipeline.config.schema import Model
from pipeline.errors import InputError
from pipeline.modeling.weights import missing_package


def load_model_config(config: Model) -> PreTrainedConfig:
    """`config.json` of the model.

    Raises:
        InputError: neither a model folder nor a model of the hub, or one that needs its own code to run without
            `trust_remote_code`, or one with quantised weights.
    """
    path, missing = config.path, f"model.path: there is no folder {Path(config.path).absolute()}"
    if is_path_alone(path) and not Path(path).is_dir():
        raise InputError(f"{missing}; name the folder of a model, or a model of the hub as owner/name")
    if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise _holds_an_adapter(path)
    try:  # without trust_remote_code, transformers would ask on the terminal
        shape = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model.path: {path!r} comes with code of its own, which runs only with model.trust_remote_code: "
                "true; read it first"
            ) from None
        reason = " ".join(str(error).split())[:300]
        if Path(path).is_dir():
            raise InputError(f"model.path: {path!r} is not the folder of a model: {reason}") from None
        raise InputError(f"{missing}, and {path!r} cannot be had from the hub: {reason}") from None
    _refuse_quantised(path, shape)
    return shape


def _refuse_quantised(path: str, shape: PreTrainedConfig) -> None:
    """
    Raises:
        InputError: the files hold integers or 8-bit numbers with scales beside them, which an optimizer cannot step on.
            transformers would ask for the method's package, or unpack them into tensors that the files do not have.
    """
    for part in (shape, shape.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            found = settings if isinstance(settings, dict) else settings.to_dict()
            method = getattr(found.get("quant_method"), "value", found.get("quant_method"))
            raise InputError(
                f"model.path: the weights of {path!r} are quantised ({method}, in config.json), and only weights in "
                "float32, bfloat16 or float16 train; name the model that they were made of, with model.lora and "
                "model.load_in_4bit: true where memory is short"
            )


def _holds_an_adapter(path: str) -> InputError:
    return InputError(f"model.path: {path!r} holds an adapter; export it with model.lora.merge, or name its base")


def load_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, once it is clear that there is a model.

    Raises:
        InputError: neither a model folder nor a model of the hub, or no tokenizer beside it, or one that needs its own
            code to run without `trust_remote_code`.
    """
    load_model_config(config)
    try:
        return AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = missing_package(config.path) or " ".join(str(error).split())[:300]
        raise InputError(f"model.path: no tokenizer can be loaded from {config.path!r}: {reason}") from None


def check_writing(save: Callable[[str], object], what: str, path: str) -> None:
    """Write a part of an export without weights into a folder that goes again: what transformers refuses to write would
    be refused after all steps.

    Raises:
        InputError: it refuses `what`, which it has read from `path`.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            save(folder)
    except OSError:  # of a disk for temporary files, on which no export depends
        return
    except Exception as error:  # of validators of two libraries, or of code that came with the model
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"model.path: transformers reads the {what} of {path!r} and does not write it again, as an export must: "
            f"{reason}; correct it in a copy of the model"
        ) from None


def num_parameters(config: Model) -> int:
    """Parameters of the model, tied ones once, from `config.json` alone.

    Raises:
        InputError: see `load_model_config`; or transformers has no causal language model of this kind.
    """
    shape = load_model_config(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)
    except (ValueError, NotImplementedError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model.path: {config.path!r} cannot be built: {reason}; set optimizer.lr") from None
    return sum(parameter.numel() for parameter in model.parameters())


def check_layer(config: Model, layer: int) -> None:
    """Raises:
    InputError: the model has no decoder block number `layer`.
    """
    path, count = config.path, load_model_config(config).get_text_config().num_hidden_layers
    if layer >= count:
        raise InputError(f"objective.layer: {layer}, but {path} has {count} decoder blocks, 0 to {count - 1}")


def check_router_loss(config: Model) -> None:
    """Refuse a mixture of experts whose retain loss needs the load-balancing loss, which this program does not add.

    That loss multiplies shares of tokens by mean probabilities, both over a batch: the mean over micro-batches, as
    other trainers take it, is another number for every way to split the batch, and the exact one needs all routing
    decisions of all ranks before the first backward pass.

    Raises:
        InputError: a mixture of experts whose configuration asks for its load-balancing loss.
    """
    shape = load_model_config(config).get_text_config()
    if getattr(shape, "output_router_logits", False) and getattr(shape, "router_aux_loss_coef", None) != 0:
        raise InputError(
            f"model.path: config.json of {config.path!r} asks for a load-balancing loss (output_router_logits), which "
            "is not added to the retain loss here; to train without it, set output_router_logits to false in a copy of "
            "the model"
        )


def check_max_length(config: Model, longest: int) -> None:
    """Raises:
    InputError: the model has fewer positions than a sequence of `longest` tokens.
    """
    positions = getattr(load_model_config(config).get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise InputError(
            f"data.max_length: sequences have up to {longest} tokens, but {config.path} has {positions} positions; "
            f"set {positions} or less"
        )


def pad_token(config: Model, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id for padding: the tokenizer's, or 0 where it has none that the model embeds.

    It is masked everywhere, so any id is right. A padding token that was added after training has an id beyond the
    embedding.
    """
    token = tokenizer.pad_token_id
    return token if isinstance(token, int) and token < load_model_config(config).get_text_config().vocab_size else 0


def check_tokens(config: Model, key: str, largest: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises:
    InputError: `largest`, of the token ids of corpus `key`, has no row in the model's embedding.
    """
    rows = load_model_config(config).get_text_config().vocab_size
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"data.{key}: token {token!r} has id {largest}, but the embedding of {config.path} has {rows} rows; use "
            "the tokenizer (and chat template) that the model was trained with"
        )
