"""Dropout of a model: off by default, and back in the exported configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)

from pipeline.errors import InputError


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
