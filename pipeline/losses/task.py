"""The two tasks of a run: a sampler over a corpus, the loss taken on its batches, and the reference model's outputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import DEFAULT_STEPS, RunConfig
from pipeline.config.schema import Objective as Settings
from pipeline.data.batches import Batch, BatchSampler
from pipeline.data.encode import FORMAT_VERSION, TokenOptions
from pipeline.data.tokenize import Sequences, counted, log_usage, num_shared, tokenize
from pipeline.distributed import errors as rank_errors
from pipeline.errors import InputError
from pipeline.losses.objectives import OBJECTIVES, LossInputs, Objective, steering_vector
from pipeline.modeling.checks import pad_token
from pipeline.modeling.decoder import has_trainable_params_up_to
from pipeline.modeling.outputs import HiddenStates, ModelForward, TokenLosses, forward
from pipeline.modeling.reference import ReferenceWeights, cache_file, sequence_nll

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Forgetting, or retention."""

    name: str
    sampler: BatchSampler
    objective: Objective
    settings: Settings
    reference: Callable[[Batch], Tensor] | None = None  # the reference model's output, if the objective needs one
    steering: Tensor | None = None  # [H], for rmu

    def loss_denominator(self, step: int) -> int:
        """The number of terms in the global batch of `step`, by which the sum of `loss_terms` is divided."""
        return self.sampler.loss_denominator(step, self.objective.normalize_by)

    def loss_terms(self, engine: ModelForward, batch: Batch) -> Tensor:
        """0-dim: the sum over a micro-batch of the terms whose mean over the global batch is the loss."""
        reference = self.reference_output(batch)  # before the forward with a graph
        if self.objective.hidden:
            states = forward(engine, batch, HiddenStates(self.settings.layer))
            return self.terms_of(batch, reference, hidden_states=states)
        return self.terms_of(batch, reference, forward(engine, batch, self.losses_wanted(reference)))

    def reference_output(self, batch: Batch) -> Tensor | None:
        """What the objective needs of the reference model for `batch`, if anything."""
        return self.reference(batch) if self.reference is not None else None

    def losses_wanted(self, reference: Tensor | None) -> TokenLosses:
        """The token losses that an objective without hidden states is computed from."""
        if self.objective.reference != "logits":
            return TokenLosses(term=self.objective.term)
        penalty = self.settings.beta if self.objective.logit_penalty else 0.0
        return TokenLosses(reference, penalty, self.objective.term)

    def terms_of(
        self,
        batch: Batch,
        reference: Tensor | None,
        token_losses: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor:
        """0-dim: the sum of the terms, from what a forward pass of `batch` returned."""
        return self.objective.terms(
            LossInputs(
                labels=batch.labels,
                mask=batch.attention_mask,
                beta=self.settings.beta,
                delta=self.settings.delta,
                token_losses=token_losses,
                hidden_states=hidden_states,
                reference=reference,
                steering=self.steering,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                divergence=self.settings.divergence,
            )
        )


def open_sampler(config: RunConfig, task: str, tokenizer: PreTrainedTokenizerBase) -> BatchSampler:
    """The batches of the corpus of `task`; the first rank of each machine tokenises it, the others read its file.

    Raises:
        InputError: see `pipeline.data.tokenize` and `target_tokens`.
    """
    objective, data = OBJECTIVES[getattr(config.objective, task)], config.data
    assert data.packing != "auto", "pipeline.startup.choose decides it"
    options = TokenOptions(data.max_length, data.packing, data.long_documents, objective.pairing)
    sequences, preferred = rank_errors.local_main_first(
        lambda: tokenize(
            getattr(data, task),
            task,
            tokenizer,
            options,
            cache=Path(config.cache),
            show_progress=dist.get_rank() == 0,
        )
    )
    if preferred is not None and objective.replaces:
        sequences, preferred = preferred, None
    if dist.get_rank() == 0:
        plain = sequences.prompts is None and preferred is None
        log_usage(task, sequences, data.max_length, truncates=plain and data.long_documents == "truncate")
        _warn_of_repeats(task, sequences, config.train.batch_size, data.max_length)
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
        target=target_tokens(config.objective.target, tokenizer) if objective.has_target else (),
    )


def target_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids of `objective.target`, without those that a tokenizer puts around a text.

    Raises:
        InputError: there are none.
    """
    found = tokenizer(text, add_special_tokens=False).input_ids
    if not found:
        raise InputError(f"objective.target: the tokenizer of model.path makes no token of {text!r}; name another text")
    return tuple(found)


def _warn_of_repeats(task: str, sequences: Sequences, batch_size: int, max_length: int) -> None:
    """Warn of a corpus with fewer sequences than a batch, with the remedy that helps most."""
    if len(sequences) >= batch_size:
        return
    remedy = f"add text, or set train.batch_size to {len(sequences)} or less"
    documents = sequences.usage.documents if sequences.usage is not None else 0
    if sequences.block and documents > len(sequences):
        remedy = (
            f"set data.packing: documents, which makes a sequence of each of the {counted(documents, 'document')}, or "
            f"data.max_length below {max_length}; or {remedy}"
        )
    log.warning(
        f"data.{task} has {counted(len(sequences), 'sequence')}, fewer than train.batch_size {batch_size}: every "
        f"step uses sequences more than once; {remedy}"
    )


def warn_of_overlap(samplers: dict[str, BatchSampler]) -> None:
    """Log how many documents of the forget corpus are in the retain corpus too, if any are."""
    if len(samplers) < 2:
        return
    forget, retain = (samplers[task].sequences for task in ("forget", "retain"))
    if shared := num_shared(forget, retain):
        log.warning(
            f"data.retain contains {counted(shared, 'document')} of data.forget (but for case and white space): the "
            "run forgets and retains the same text; remove it from one of the two"
        )


def num_steps(config: RunConfig, samplers: dict[str, BatchSampler]) -> int:
    """Optimizer steps of the run; epochs count passes over the forget set, or over the only set there is."""
    if config.train.epochs is None:
        return config.train.steps or DEFAULT_STEPS
    size = len(samplers[config.tasks[0]].sequences)
    return math.ceil(config.train.epochs * size / config.train.batch_size)


def make_tasks(
    config: RunConfig, samplers: dict[str, BatchSampler], steps: int, engine: ModelForward, identity: dict[str, str]
) -> list[Task]:
    """The tasks, in the order in which they accumulate gradients, with the reference outputs that their losses need.

    Args:
        steps: of the run; sequences that none of them uses get no reference log-probability.
        identity: of the model's weights and of the tokenizer, for the cache of reference log-probabilities.

    Raises:
        InputError: an objective reads hidden states that depend on no trained tensor.
    """
    objectives, settings = {name: OBJECTIVES[getattr(config.objective, name)] for name in samplers}, config.objective
    needs_weights = any(objective.reference in ("logits", "hidden") for objective in objectives.values())
    weights = ReferenceWeights(engine) if needs_weights else None
    tasks = []
    for name, objective in objectives.items():
        reference = steering = None
        if objective.reference == "log_probs":
            nll = reference_nll(config, samplers[name], steps, engine, identity)
            reference = partial(_nll_of_batch, nll)
        elif weights is not None and objective.reference == "logits":
            reference = weights.logits
        elif weights is not None and objective.reference == "hidden":
            reference = partial(weights.hidden_states, layer=settings.layer)
        if objective.hidden:
            if not has_trainable_params_up_to(engine.module, settings.layer):
                raise InputError(
                    f"model.trainable: objective.{name} reads the hidden states after layer {settings.layer} "
                    "(objective.layer), and no tensor up to that layer is trained; name one in model.trainable"
                )
            width = engine.module.config.get_text_config().hidden_size
            steering = steering_vector(width, settings.steering_coeff, config.seed).to(engine.device)
        tasks.append(Task(name, samplers[name], objective, settings, reference, steering))
    return tasks


def _nll_of_batch(nll: Tensor, batch: Batch) -> Tensor:
    """[B] or [2B] of `nll` [answers, sequences]: the first answers of the batch, then the preferred ones."""
    return nll[:, batch.index].flatten()


def reference_nll(
    config: RunConfig, sampler: BatchSampler, steps: int, engine: ModelForward, identity: dict[str, str]
) -> Tensor:
    """[answers, sequences of the corpus] nll_ref on the training device; two answers where one is preferred."""
    found = []
    for sequences in [sampler.sequences] + ([sampler.preferred] if sampler.preferred is not None else []):
        packing = [config.data.packing, config.data.max_length, config.data.long_documents, FORMAT_VERSION]
        precision = [config.model.dtype, config.model.load_in_4bit]  # of files that `identity` knows as they lie there
        parts = {**identity, "precision": precision, "text": sequences.digest, "packing": packing}
        nll = sequence_nll(
            engine,
            sequences,
            sampler.indices_used(steps),
            micro_batch_size=config.train.micro_batch_size,
            pad=sampler.pad,
            file=cache_file(Path(config.cache), parts) if dist.get_rank() == 0 else None,
        )
        found.append(nll.to(engine.device))
    return torch.stack(found)
