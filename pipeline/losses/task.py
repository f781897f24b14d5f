"""The two tasks of a run: a walk over a corpus, the loss taken on it, and what the frozen original says of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import DEFAULT_STEPS, RunConfig
from pipeline.config.schema import Objective as Settings
from pipeline.data.batches import Batch, BatchSampler
from pipeline.data.encode import FORM
from pipeline.data.tokenize import num_shared, say_usage, tokenize
from pipeline.distributed import errors as rank_errors
from pipeline.errors import InputError
from pipeline.losses.objectives import OBJECTIVES, LossInputs, Objective, steering_vector
from pipeline.modeling.checks import pad_token
from pipeline.modeling.decoder import has_trainable_params_up_to
from pipeline.modeling.reference import ReferenceWeights, cache_file, sequence_nll

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Forgetting, or retention."""

    name: str
    stream: BatchSampler
    objective: Objective
    settings: Settings
    original: Callable[[Batch], Tensor] | None = None  # what the frozen original says of a batch, if that is asked
    steering: Tensor | None = None  # [H], for rmu

    def num_terms(self, step: int) -> int:
        return self.stream.num_terms(step, self.objective.per)

    def loss_terms(self, engine: Any, batch: Batch) -> Tensor:
        """0-dim: the sum over a micro-batch of the terms whose mean over the global batch is the loss."""
        objective, settings = self.objective, self.settings
        original = self.original(batch) if self.original is not None else None  # its forward comes before our own
        if objective.hidden:
            question: dict[str, Any] = {"layer": settings.layer}
        elif objective.asks == "logits":
            lower = settings.beta if objective.lowers else 0.0
            question = {"labels": batch.labels, "soft": original, "lower": lower}
        else:
            question = {"labels": batch.labels}
        states = engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **question)
        beta, delta = settings.beta, settings.delta
        return objective.terms(
            LossInputs(states, batch.labels, batch.attention_mask, original, beta, delta, self.steering)
        )


def open_sampler(config: RunConfig, task: str, tokenizer: PreTrainedTokenizerBase) -> BatchSampler:
    """The walk over the corpus of `task`; the first rank of each machine tokenises, the others read its file.

    Raises:
        InputError: see `data.tokenize`.
    """
    objective = OBJECTIVES[getattr(config.objective, task)]
    sequences, preferred = rank_errors.local_main_first(
        lambda: tokenize(
            getattr(config.data, task),
            task,
            tokenizer,
            max_length=config.data.max_length,
            packing=config.data.packing,
            cache=Path(config.cache),
            show_progress=dist.get_rank() == 0,
            pairing=objective.pairing,
            long_documents=config.data.long_documents,
        )
    )
    if preferred is not None and objective.replaces:
        sequences, preferred = preferred, None
    if dist.get_rank() == 0:
        plain = sequences.prompts is None and preferred is None
        truncates = plain and config.data.long_documents == "truncate"
        say_usage(task, sequences, config.data.max_length, truncates)
    if len(sequences) < config.train.batch_size and dist.get_rank() == 0:
        log.warning(
            f"data.{task} has {len(sequences)} sequences, fewer than train.batch_size {config.train.batch_size}: "
            "every step sees some of them more than once"
        )
    return BatchSampler(
        sequences,
        seed=config.seed,
        task=("forget", "retain").index(task),
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        pad=pad_token(config.model, tokenizer),
        preferred=preferred,
    )


def warn_of_overlap(streams: dict[str, BatchSampler]) -> None:
    """Log how many documents of the forget corpus stand in the retain corpus too, if any do."""
    if len(streams) < 2:
        return
    forget, retain = (streams[task].sequences for task in ("forget", "retain"))
    if shared := num_shared(forget, retain):
        log.warning(
            f"{shared} documents of data.forget are in data.retain too (but for case and white space): each is "
            "forgotten and retained at once; remove them from one of the two"
        )


def num_steps(config: RunConfig, streams: dict[str, BatchSampler]) -> int:
    """Optimizer steps of the run; epochs count passes over the forget set, or over the only one there is."""
    if config.train.epochs is None:
        return config.train.steps or DEFAULT_STEPS
    size = len(streams[config.tasks[0]].sequences)
    return math.ceil(config.train.epochs * size / config.train.batch_size)


def make_tasks(
    config: RunConfig, streams: dict[str, BatchSampler], steps: int, engine: Any, identity: dict[str, str]
) -> list[Task]:
    """The tasks, in the order they are accumulated, with what the frozen original says where an objective asks.

    Args:
        steps: of the run; a sequence that none of them visits is never asked about.
        identity: of the model's weights and of the tokenizer, for the cache.

    Raises:
        InputError: an objective reads hidden states that no trained tensor reaches.
    """
    objectives, settings = {name: OBJECTIVES[getattr(config.objective, name)] for name in streams}, config.objective
    frozen = ReferenceWeights(engine) if any(o.asks in ("logits", "hidden") for o in objectives.values()) else None
    tasks = []
    for name, objective in objectives.items():
        original = steering = None
        if objective.asks == "likelihoods":
            original = partial(_of_batch, reference_nll(config, streams[name], steps, engine, identity))
        elif frozen is not None and objective.asks == "logits":
            original = frozen.logits
        elif frozen is not None and objective.asks == "hidden":
            original = partial(frozen.hidden, layer=settings.layer)
        if objective.hidden:
            if not has_trainable_params_up_to(engine.module, settings.layer):
                raise InputError(
                    f"model.trainable: objective.{name} reads the hidden states after layer {settings.layer} "
                    "(objective.layer), and no tensor up to there trains"
                )
            width = engine.module.config.get_text_config().hidden_size
            steering = steering_vector(width, settings.steering_coeff, config.seed).to(engine.device)
        tasks.append(Task(name, streams[name], objective, settings, original, steering))
    return tasks


def _of_batch(known: Tensor, batch: Batch) -> Tensor:
    """[B] or [2B] of known [answers, sequences]: the first answers of the batch, then the second."""
    return known[:, batch.index].flatten()


def reference_nll(config: RunConfig, stream: BatchSampler, steps: int, engine: Any, identity: dict[str, str]) -> Tensor:
    """[answers, sequences of the corpus] nll_ref on the training device; two answers where one is preferred."""
    found = []
    for sequences in [stream.sequences] + ([stream.preferred] if stream.preferred is not None else []):
        packing = [config.data.packing, config.data.max_length, config.data.long_documents, FORM]
        parts = {**identity, "dtype": config.model.dtype, "text": sequences.digest, "packing": packing}
        nll = sequence_nll(
            engine,
            sequences,
            stream.indices_used(steps),
            micro_batch_size=config.train.micro_batch_size,
            pad=stream.pad,
            file=cache_file(Path(config.cache), parts) if dist.get_rank() == 0 else None,
        )
        found.append(nll.to(engine.device))
    return torch.stack(found)
