"""lm-evaluation-harness with its forward passes shared over ranks: one piece of code for every suite that it scores.

The harness takes every rank for a process alone: each rank loads the tasks, writes all prompts and computes all means,
and the model alone (`SharedLM`) divides its batches. The batches are those of the harness, so that the scores are those
of its command line.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval.api.task
import lm_eval.evaluator_utils
import numpy as np
import torch
from lm_eval.api.metrics import acc_all, acc_all_stderr, mean, mean_stderr
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs, resolve_max_length
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.suites import scoring
from eval.suites.sharing import rank_and_size, share
from eval.vllm_model import VllmModel
from pipeline.errors import InputError

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # those of the harness's command line

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context ids, continuation ids)


def seed_generators() -> None:
    """Seed the generators that a task may draw from, as the harness's command line does before it loads tasks."""
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks as the harness loads them, and the states of the generators of Python and NumPy after that."""

    tasks: TaskDict
    states: tuple[Any, Any]

    @classmethod
    def now(cls, tasks: TaskDict) -> LoadedTasks:
        return cls(tasks, (random.getstate(), np.random.get_state()))


Base: Any = HFLM  # a decorator of the harness hides its type, and a class needs a base of a known one


class SharedLM(Base):
    """The harness's model with its batches shared over ranks, and a count of the sequences that did not fit."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, title: str) -> None:
        tokenizer = copy.deepcopy(tokenizer)  # to one without padding the harness adds a token
        if tokenizer.pad_token_id is not None and not scoring.is_embedded(model, tokenizer.pad_token_id):
            tokenizer.pad_token = None  # the harness takes another: the model has no row for this one
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._device = scoring.input_device(model)  # the harness takes that of the first weight
        self.title = title
        self.too_long = 0

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        """As in the harness, which looks for a BOS or EOS token at the start, also where the tokenizer has neither."""
        if add_special_tokens is None and self.prefix_token_id is None:
            add_special_tokens = True  # the default of every tokenizer
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)

    def require(self, token: int | None, name: str, needed: str) -> None:
        """Raises InputError if the tokenizer lacks a token; the harness would fail without a reason."""
        if token is None:
            raise InputError(
                f"{self.title}: the tokenizer has no {name} token, which tasks need that {needed}; add one to the "
                "tokenizer, or leave these tasks out"
            )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each request (context, continuation)."""
        if any(request.args[0] == "" for request in requests):
            self.require(self.prefix_token_id, "beginning-of-text or end-of-text", "score a text without a context")
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) per request, in their order.

        One sequence serves all requests that differ in their last token alone, as in the harness within one call. One
        call for each batch is therefore one forward pass, so all ranks get equally many. The batches are those of the
        harness, longest sequences first, except for the limit of tokens of `scoring`.
        """
        sequences: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"{self.title}: an answer has {len(continuation)} tokens, and the model's context takes 1 to "
                    f"{self.max_length}; repair the task's row that begins {str(texts and texts[0])[:60]!r}"
                )
            sequences[*context, *continuation[:-1]].append(i)
        order = sorted(sequences, key=lambda tokens: (-len(tokens), tokens))
        self.too_long += sum(len(tokens) > self.max_length for tokens in order)
        fitting = [tokens[-self.max_length :] for tokens in order]  # the harness cuts the beginning
        rows = scoring.batches(fitting, self.batch_size, scoring.MOST_TOKENS, longest_first=True)
        batches = [[i for row in batch for i in sequences[order[row]]] for batch in rows]
        return scoring.restore_order(batches, self.share_forwards(batches, requests))

    def share_forwards(self, batches: list[list[int]], requests: Sequence[Request]) -> list[list[tuple[float, bool]]]:
        """The harness's answers to each batch of indices of `requests`, one forward pass for each."""
        answer = super()._loglikelihood_tokens
        return share(batches, lambda batch: answer([requests[i] for i in batch], disable_tqdm=True), self.title)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each text, in windows of the model's context that overlap by no token.

        As in the harness, a batch holds consecutive windows, except for the limit of tokens of `scoring`.
        """
        self.require(self.prefix_token_id, "beginning-of-text or end-of-text", "score whole texts")
        windows: list[Request] = []
        ends = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in windows]
        batches = consecutive(lengths, self.batch_size, scoring.MOST_TOKENS)
        found = [one for some in self.share_forwards(batches, windows) for one, _ in some]
        return [sum(found[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The text that the model writes after each request (context, settings), cut where its settings say.

        A batch shares its settings and has the longest contexts first, as in the harness. Where the settings sample,
        each batch has a seed of its own, so that the texts depend neither on ranks nor on other batches.
        """
        self.require(self.eot_token_id, "end-of-text", "let the model write")
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        for request, length in zip(requests, lengths, strict=True):
            settings: Any = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            new = settings["max_gen_toks"]
            if new >= self.max_length:
                raise InputError(
                    f"{self.title}: {request.task_name} writes up to {new} tokens, and the model's context has "
                    f"{self.max_length}; set generation_kwargs.max_gen_toks in the task's YAML file"
                )
            self.too_long += length > self.max_length - new
        order = Collator(
            range(len(requests)),
            sort_fn=lambda i: (-lengths[i], requests[i].args[0]),
            group_by="gen_kwargs",
            group_fn=lambda i: requests[i].args[1],
        )
        batches: list[Any] = list(order.get_batched(n=self.batch_size))
        answer = super().generate_until

        def work(numbered: tuple[int, list[int]]) -> list[str]:
            number, batch = numbered
            torch.manual_seed(SEEDS["torch"] + number)
            return answer([requests[i] for i in batch], disable_tqdm=True)

        return scoring.restore_order(batches, share(list(enumerate(batches)), work, self.title))


class VllmLM(SharedLM):
    """The same with the log-probabilities of vLLM, which forms its own batches of the requests."""

    def __init__(self, model: VllmModel, tokenizer: PreTrainedTokenizerBase, title: str) -> None:
        TemplateLM.__init__(self)  # the harness's own model would need weights
        self.engine, self.tokenizer, self.title = model, tokenizer, title
        self.backend, self.enable_thinking = "causal", False
        self.add_bos_token, self.custom_prefix_token_id = None, None
        self._max_length = resolve_max_length(model.config, tokenizer, default=self._DEFAULT_MAX_LENGTH)
        self._rank, self._world_size, self._device = 0, 1, torch.device("cpu")  # of results
        self.batch_size_per_gpu, self.too_long = 1, 0

    def share_forwards(self, batches: list[list[int]], requests: Sequence[Request]) -> list[list[tuple[float, bool]]]:
        """As above. vLLM needs room for a token that it writes, so a prompt that does not fit loses one more."""
        order = [i for batch in batches for i in batch]
        whole = [[*requests[i][1], *requests[i][2]][-(self.max_length - 1) :] for i in order]
        found = []
        for i, places in zip(order, self.engine.score(whole), strict=True):
            own = places[-len(requests[i][2]) :]
            found.append((sum(value for value, _ in own), all(greedy for _, greedy in own)))
        results = iter(found)
        return [[next(results) for _ in batch] for batch in batches]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Raises InputError: the settings of a task are those of transformers."""
        raise InputError(
            f"{self.title}: in {requests[0].task_name} the model writes, and here --backend vllm only scores the "
            "harness's texts; leave --backend out, or leave this task out of --tasks"
        )


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, title: str) -> SharedLM:
    """The harness's model for a model of transformers or of vLLM."""
    if isinstance(model, VllmModel):
        return VllmLM(model, tokenizer, title)
    return SharedLM(model, tokenizer, batch_size, title)


def consecutive(lengths: Sequence[int], batch_size: int, most_tokens: int) -> list[list[int]]:
    """Indices in order, in batches of at most `batch_size` and, padded, `most_tokens` tokens, but at least one."""
    made: list[list[int]] = []
    width = 0
    for i, length in enumerate(lengths):
        width = max(width, length)
        if not made or len(made[-1]) == batch_size or (len(made[-1]) + 1) * width > most_tokens:
            made.append([])
            width = length
        made[-1].append(i)
    return made


def closed_form_stderr(metric: Any, bootstrap_iters: int) -> Any:
    """The formula of a mean's standard error, or None: the harness would resample other metrics 100,000 times."""
    return {mean: mean_stderr, acc_all: acc_all_stderr}.get(metric)


def evaluate_tasks(
    lm: SharedLM, loaded: LoadedTasks, limit: int | None = None, *, chat: bool = False
) -> dict[str, Any]:
    """What the harness's `evaluate` returns, on every rank; `limit`: the first documents of each task alone; `chat`:
    prompts are put into the tokenizer's chat template.

    Every model that is evaluated sees the same prompts: the generators start where they stood when the tasks were
    loaded, and those that draw examples at their seed.
    """
    # The harness draws one bar per task while it writes prompts, on every rank.
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # pyright: ignore[reportPrivateImportUsage]
    lm_eval.evaluator_utils.stderr_for_metric = closed_form_stderr
    python, numpy = loaded.states
    random.setstate(python)
    np.random.set_state(numpy)
    for task in loaded.tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    answer: Any = harness_evaluate(lm, loaded.tasks, limit=limit, log_samples=False, apply_chat_template=chat)
    if lm.too_long and rank_and_size()[0] == 0:
        print(
            f"warning: {lm.title}: {lm.too_long} prompts are longer than the model's context of {lm.max_length} tokens "
            "and lost their beginning; give fewer examples before a question",
            file=sys.stderr,
        )
    return answer
