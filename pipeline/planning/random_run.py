"""A run on an untrained Llama and random tokens, for measurements of a step that need no text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.schema import RunConfig
from pipeline.data.batches import BatchSampler
from pipeline.data.tokenize import Sequences
from pipeline.files import Json
from pipeline.losses.objectives import OBJECTIVES
from pipeline.losses.task import Task
from pipeline.modeling.outputs import ModelEngine
from pipeline.modeling.row_rules import install_rules
from pipeline.startup import make_engine
from pipeline.zero.joint import TaskRows

STEPS = 100  # of the learning rate's schedule; nobody makes so many


class RandomRun(NamedTuple):
    engine: ModelEngine
    forget: Task
    retain: Task
    rows: TaskRows  # of joint passes


def random_run(config: RunConfig, shape: Json) -> RandomRun:
    """The engine that the program would make of a Llama, with the same weights for every call; and `ga` and `nll`.

    Args:
        config: of which model.path and the corpora are not read.
        shape: arguments of `LlamaConfig`.
    """
    zero = deepspeed_config(config)
    keep = HfDeepSpeedConfig(zero)  # while it lives, models are built partitioned
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=getattr(torch, config.model.dtype))
    del keep
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    rows = TaskRows()
    install_rules(model, rows)  # outside of joint passes they change nothing
    engine = make_engine(config, zero, model, STEPS)
    forget, retain = (_random_task(config, shape["vocab_size"], number) for number in range(2))
    return RandomRun(engine, forget, retain, rows)


def _random_task(config: RunConfig, vocabulary: int, number: int) -> Task:
    """`ga` (0) or `nll` (1) on `data.max_length` random tokens a sequence, of this rank."""
    batch, tokens = config.train.batch_size, config.data.max_length
    name, objective = (("forget", "ga"), ("retain", "nll"))[number]
    dice = np.random.default_rng(number)
    ids = pa.array(dice.integers(0, vocabulary, 4 * batch * tokens).astype(np.int32))
    rows = pa.chunked_array([pa.ListArray.from_arrays([0, len(ids)], ids)])
    place = (config.train.micro_batch_size, dist.get_rank(), dist.get_world_size())
    sampler = BatchSampler(Sequences(rows, tokens, "random"), 0, number, batch, *place, 0)
    return Task(name, sampler, OBJECTIVES[objective], config.objective)
