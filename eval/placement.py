"""Where a model lies while it is evaluated: whole on each rank, over the GPUs of a machine, or a share on each rank."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eval.batch_size import AUTO
from eval.loading import load, read_ds_config, trust_of
from eval.vllm_model import check_vllm, load_vllm
from pipeline.distributed.environment import world_from_environment
from pipeline.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loader = Callable[[Path], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `loader_of` reads."""
    add = parser.add_argument
    add("--ds-config", type=Path, metavar="FILE.json", help="a ZeRO-3 file: each rank holds a share of the model")
    add("--device-map", choices=("auto",), help="one process spreads the model over the GPUs of this machine")
    add("--backend", choices=("vllm",), help="vLLM, and not transformers, runs the model, in one process")


def loader_of(arguments: argparse.Namespace, suites: Sequence[str]) -> Loader:
    """What loads a model as the options have it.

    Raises:
        InputError: options that contradict each other, a suite or the number of ranks.
    """
    sharded = arguments.ds_config is not None
    if sharded and arguments.batch_size == AUTO:
        raise InputError(
            "--batch-size auto does not go with --ds-config: a rank without memory would leave the others waiting for "
            "its share of the weights; give a number"
        )
    if arguments.device_map is not None:
        if sharded:
            raise InputError("--device-map and --ds-config both place the weights; leave one out")
        refuse_ranks("--device-map")
        if "probes" in suites:
            raise InputError(
                "--device-map does not go with suite probes, which reads the weights of the output layer itself; shard "
                "the model by --ds-config"
            )
    if arguments.backend == "vllm":
        if sharded or arguments.device_map is not None:
            raise InputError("--backend vllm places the weights itself; leave --ds-config and --device-map out")
        refuse_ranks("--backend vllm")
        check_vllm(suites)
        return partial(load_vllm, trust=trust_of(arguments))
    ds_config = read_ds_config(arguments.ds_config) if sharded else None
    return partial(load, ds_config=ds_config, trust=trust_of(arguments), device_map=arguments.device_map)


def refuse_ranks(option: str) -> None:
    """Raises InputError if a launcher started several processes for an option by which one process has all GPUs."""
    if (ranks := world_from_environment()[1]) > 1:
        raise InputError(f"{option} gives all GPUs of a machine to one process, and there are {ranks}; start one")
