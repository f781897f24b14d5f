"""The part of vLLM's public interface that `eval.vllm_model` uses, computed by transformers a token at a time.

Names, arguments and defaults are those of `vllm.LLM`, `vllm.SamplingParams` and `vllm.TokensPrompt` (0.11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from transformers import AutoModelForCausalLM


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    detokenize: bool = True
    seed: int | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int]


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None


class LLM:
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        trust_remote_code: bool = False,
        load_format: str = "auto",
    ) -> None:
        self.made.append({"model": model, "dtype": dtype, "load_format": load_format, "gpus": tensor_parallel_size})
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.limit = self.model.config.max_position_embeddings

    def generate(
        self, prompts: list[TokensPrompt], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        return [self.answer(one["prompt_token_ids"], own) for one, own in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def answer(self, prompt: list[int], settings: SamplingParams) -> RequestOutput:
        if len(prompt) >= self.limit:
            raise ValueError("the prompt plus the number of requested output tokens is longer than the model's context")
        assert settings.temperature == 0 and settings.max_tokens is not None
        ids = list(prompt)
        while len(ids) - len(prompt) < settings.max_tokens:
            ids.append(int(self.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            ends = settings.stop_token_ids or []
            if ids[-1] in ends or (not settings.ignore_eos and ids[-1] == self.model.config.eos_token_id):
                break
        scores: list[dict[int, Logprob] | None] = [None]
        if settings.prompt_logprobs is not None:
            rows = self.model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
            for row, token in zip(rows, prompt[1:], strict=False):
                best = row.topk(settings.prompt_logprobs).indices.tolist()
                rank = {one: int((row > row[one]).sum()) + 1 for one in (token, *best)}
                scores.append({one: Logprob(float(row[one]), rank[one]) for one in rank})
        return RequestOutput(
            [CompletionOutput(ids[len(prompt) :])], None if settings.prompt_logprobs is None else scores
        )
