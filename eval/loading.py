"""Load a model for evaluation, whole or sharded. Nothing that comes with it runs code unless the user allows it."""

from __future__ import annotations

import argparse
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.files import read_json
from pipeline.config.files import DEEPSPEED_FILES, find_file
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DeviceMap = str | dict[str, str]  # what `from_pretrained` takes


@dataclass(frozen=True)
class Trust:
    """Which parts of a model that can run code are allowed: by default none, as in training."""

    allow_pickle: bool = False
    remote_code: bool = False

    def options(self) -> dict[str, bool]:
        """Arguments of `from_pretrained`. Code is always stated: without it, transformers prompts the terminal."""
        # Without `use_safetensors`, transformers loads a pickle if there is nothing else.
        safetensors = {} if self.allow_pickle else {"use_safetensors": True}
        return {"trust_remote_code": self.remote_code, **safetensors}


NO_TRUST = Trust()


def add_trust_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `trust_of` reads."""
    parser.add_argument(
        "--allow-pickle", action="store_true", help="load weights that are not safetensors: pickles can run code"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def trust_of(arguments: argparse.Namespace) -> Trust:
    return Trust(allow_pickle=arguments.allow_pickle, remote_code=arguments.trust_remote_code)


def is_model(folder: Path) -> bool:
    """Whether `folder` holds a model, or an adapter, with which transformers loads the base model."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def load(
    folder: Path, ds_config: Json | None = None, trust: Trust = NO_TRUST, device_map: DeviceMap | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in the dtype it was saved in, on the GPU if there is one, and its tokenizer.

    With `ds_config` each rank loads a shard of the model, and forward passes gather it layer by layer.

    Args:
        device_map: `auto` spreads the layers over the GPUs of this machine and, what they do not hold, main memory and
            disk (accelerate); or where each module goes.

    Raises:
        InputError: the model cannot be loaded, or not without something that `trust` does not allow.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    from pipeline.modeling.weights import WrongWeights, load_whole, release_memory

    release_memory()
    logging.disable_progress_bar()  # a run has many models; each suite shows its progress
    try:
        if find_adapter_config_file(str(folder)):
            # Else transformers loads a pickled adapter from the hub, whatever `use_safetensors` is.
            cached_file(str(folder), "adapter_model.safetensors")
        else:  # before the tokenizer, which warns of a configuration that it does not know
            AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
        if ds_config is not None:
            return load_sharded(folder, ds_config, trust), tokenizer
        if device_map is not None:
            return load_spread(folder, trust, device_map), tokenizer
        model: Any = load_whole(folder, dtype="auto", **trust.options())
    except WrongWeights as error:
        raise InputError(str(error)) from None
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise refusal(folder, error, trust) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_spread(folder: Path, trust: Trust, device_map: DeviceMap) -> PreTrainedModel:
    """The model over several devices; what is on disk alone lies in a folder that lives as long as the model.

    Raises:
        OSError, ValueError: it cannot be loaded.
    """
    from pipeline.modeling.weights import load_whole

    offloaded = tempfile.TemporaryDirectory(prefix="offloaded-")
    spread: dict[str, Any] = {"device_map": device_map, "offload_folder": offloaded.name}
    model = load_whole(folder, dtype="auto", **trust.options(), **spread)
    weakref.finalize(model, offloaded.cleanup)
    return model


def refusal(folder: Path, error: Exception, trust: Trust) -> InputError:
    """The error to raise if transformers does not load the model in `folder`; it names the option that would help."""
    from pipeline.modeling.weights import missing_package

    reason = missing_package(folder) or str(error).splitlines()[0]
    if not trust.remote_code and "trust_remote_code" in str(error):
        return InputError(
            f"the model in {folder} comes with code of its own, which runs only with --trust-remote-code; read it first"
        )
    if "adapter_model.safetensors" in reason:
        return InputError(f"the adapter in {folder} has no adapter_model.safetensors, and no other file is read")
    if not trust.allow_pickle and "safetensors" in reason:
        reason += "; if you trust its other files, which can run code, give --allow-pickle"
    if not folder.exists():
        return InputError(f"there is no folder {folder.absolute()}, and the hub gives no {folder}: {reason}")
    return InputError(f"cannot load the model in {folder}: {reason}; else export it again")


def check_trust(folder: Path, trust: Trust) -> None:
    """Raises InputError if `load` would need something that `trust` does not allow; reads no weights."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
        if not trust.allow_pickle and not any(folder.glob("*.safetensors")):
            raise OSError("it has no file *.safetensors")
    except (OSError, ValueError, ImportError) as error:
        raise refusal(folder, error, trust) from error


def load_sharded(folder: Path, ds_config: Json, trust: Trust) -> PreTrainedModel:
    """The model under ZeRO-3 without an optimizer; raises OSError or ValueError if it cannot be loaded."""
    import deepspeed
    from transformers import AutoConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from pipeline.distributed.process_group import skip_shm_op
    from pipeline.modeling.weights import load_whole

    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            "an adapter cannot be loaded sharded; export it with model.lora.merge, or leave --ds-config out"
        )
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    dtype = str(shape.dtype).removeprefix("torch.")
    zero = {key: value for key, value in ds_config["zero_optimization"].items() if key != "offload_optimizer"}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires it, although nothing trains
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    skip_shm_op()
    zero3 = HfDeepSpeedConfig(config)  # while it lives, from_pretrained loads under deepspeed.zero.Init
    model = load_whole(folder, dtype="auto", **trust.options())
    model.zero3 = zero3  # so that generate() also continues until the answers of the last rank end
    deepspeed.initialize(model=model, config=config)  # hooks its modules
    return model


def read_ds_config(path: Path) -> Json:
    """A DeepSpeed file. Only `zero_optimization` is used; raises InputError unless it is stage 3."""
    path = find_file(path, "--ds-config", DEEPSPEED_FILES)
    config = read_json(path)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise InputError(f"--ds-config {path}: zero_optimization.stage must be 3, which alone shards a model's weights")
    return config
