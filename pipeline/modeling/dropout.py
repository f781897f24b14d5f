"""Dropout of a model: off by default, and restored in the exported configuration."""

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
    """Set every dropout rate of `shape` to `rate`, nested configurations included, and return it.

    The rate at which whole layers or paths are dropped is another quantity: it becomes 0.

    Raises:
        InputError: the configuration does not accept `rate` at one of them.
    """
    for part, name in list(_dropouts(shape)):
        wanted = rate if "dropout" in name or "pdrop" in name else 0.0
        try:
            setattr(part, name, wanted or type(getattr(part, name))(0))  # some accept integers only
        except StrictDataclassFieldValidationError:
            raise InputError(
                f"model.dropout: {name} of {shape.model_type} does not take {wanted} in transformers "
                f"{transformers.__version__}; set 0, or null to leave it as it is"
            ) from None
    return shape


def _dropouts(shape: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    """(configuration, name) of each probability of dropping something: resid_pdrop, attention_dropout, ..."""
    for name, value in vars(shape).items():
        if isinstance(value, PreTrainedConfig):
            yield from _dropouts(value)
        elif "drop" in name and type(value) in (int, float) and 0 <= value <= 1:
            yield shape, name


def restore_dropout(model: PreTrainedModel, stock: PreTrainedConfig) -> None:
    """Restore the dropout of `stock` in the configuration of `model` that an export writes.

    The modules of `model` still read the configuration that they were built with, which is another object.
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
