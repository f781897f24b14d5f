"""Values of keys that the user leaves open: those of the run that `--resume` continues, or those that fit the machine.

What depends on data and model (packing, learning rate) is chosen once those can be read: `pipeline.startup.choose`.
"""

from __future__ import annotations

import os

from pipeline.config.schema import RunConfig
from pipeline.files import Json

OPEN = {
    "model": {"dtype": "auto"},
    "data": {"packing": "auto"},
    "optimizer": {"lr": None},
    "train": {"deepspeed": "auto"},
}  # each key with the value that leaves it open


def as_before(config: RunConfig, before: Json) -> RunConfig:
    """The configuration whose open keys have the values of `before`, the `config.yaml` of the run that it continues.

    A run is the same on another machine only if nothing is chosen anew.
    """
    for section, keys in OPEN.items():
        values, chosen = getattr(config, section), before.get(section)
        found = {
            key: chosen[key]
            for key, nothing in keys.items()
            if getattr(values, key) == nothing and isinstance(chosen, dict) and key in chosen
        }
        config = config.model_copy(update={section: values.model_copy(update=found)})
    return config


def fit_machine(config: RunConfig, on_gpu: bool | None = None) -> RunConfig:
    """The configuration with `model.dtype` and `train.deepspeed` decided.

    Args:
        on_gpu: whether the run is for GPUs; None: if this machine has one.
    """
    model, train = config.model, config.train
    if "auto" not in (model.dtype, train.deepspeed):
        return config
    on_gpu = has_gpu() if on_gpu is None else on_gpu
    if model.dtype == "auto":
        model = model.model_copy(update={"dtype": "bfloat16" if on_gpu else "float32"})
    if train.deepspeed == "auto":
        train = train.model_copy(update={"deepspeed": f"ds_configs/{'zero3' if on_gpu else 'cpu'}.json"})
    return config.model_copy(update={"model": model, "train": train})


def has_gpu() -> bool:
    """Whether training would run on a GPU: DeepSpeed's own variable decides, or else torch."""
    if "DS_ACCELERATOR" in os.environ:
        return os.environ["DS_ACCELERATOR"] != "cpu"
    import torch  # takes seconds: only where the configuration leaves it open, once its text is right

    return torch.cuda.is_available()
