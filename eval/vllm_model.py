"""A model that vLLM runs: it writes answers, and gives the log-probabilities of given tokens. The package is optional.

vLLM forms its own batches and uses all GPUs of the machine, in one process. It does not give the distribution over all
tokens, which some suites read; `SUITES` names those that it can evaluate.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from eval.loading import Trust, refusal
from pipeline.distributed.terminal import can_redraw
from pipeline.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUITES = ("corpus", "bios", "wmdp_bio", "wmdp_chem", "wmdp_cyber", "mmlu", "lm_eval")


class Logprob(Protocol):
    """Of one token in one place; the likeliest of all has rank 1."""

    logprob: float
    rank: int | None


class Completion(Protocol):
    token_ids: Sequence[int]


class RequestOutput(Protocol):
    """Of one prompt; `prompt_logprobs` has no mapping for the first token, which nothing predicts."""

    outputs: Sequence[Completion]
    prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None


class Engine(Protocol):
    """What is used of `vllm.LLM`."""

    def generate(
        self, prompts: Sequence[object], sampling_params: Sequence[object], *, use_tqdm: bool
    ) -> Sequence[RequestOutput]: ...


def check_vllm(suites: Sequence[str]) -> None:
    """Raises InputError if vLLM is not installed, or cannot evaluate one of the suites."""
    if find_spec("vllm") is None:
        raise InputError(
            "--backend vllm: the package vllm is not installed; run `pip install vllm` in an environment of its own "
            "(it brings its own torch), or leave --backend out"
        )
    if others := [name for name in suites if name not in SUITES]:
        raise InputError(
            f"--backend vllm: suite {others[0]} reads the distribution over all tokens, which vLLM does not give; "
            f"evaluate it without --backend (vLLM: {', '.join(SUITES)})"
        )


@dataclass
class VllmModel:
    """An engine, and of the model's description what suites read of a model of transformers."""

    engine: Engine
    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    dtype: torch.dtype

    def eval(self) -> VllmModel:
        return self

    def write(
        self, prompts: Sequence[list[int]], limits: Sequence[int], stops: Sequence[int], seed: int | None
    ) -> list[list[int]]:
        """Ids of the tokens that follow each prompt: at most its limit, up to one of `stops`.

        Args:
            seed: draws from the model's own distribution; None: greedy.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        settings = [
            SamplingParams(
                max_tokens=limit,
                temperature=0.0 if seed is None else 1.0,
                seed=None if seed is None else seed * len(prompts) + number,
                stop_token_ids=list(stops),
                ignore_eos=True,  # the model's own end: where an answer ends is the suite's decision
                detokenize=False,
            )
            for number, limit in enumerate(limits)
        ]
        return [list(output.outputs[0].token_ids) for output in self.run(prompts, settings)]

    def score(self, sequences: Sequence[list[int]]) -> list[list[tuple[float, bool]]]:
        """(log-probability, whether it is the likeliest) of each token after the first, of each sequence.

        Raises:
            InputError: a sequence leaves no room for the one token that vLLM always writes.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        room = getattr(self.config, "max_position_embeddings", None)
        if room is not None and (longest := max(map(len, sequences), default=0)) >= room:
            raise InputError(
                f"--backend vllm: a text has {longest} tokens, and vLLM scores at most {room - 1} with this model; "
                "evaluate it without --backend"
            )
        settings = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        found: list[list[tuple[float, bool]]] = []
        for ids, output in zip(sequences, self.run(sequences, [settings] * len(sequences)), strict=True):
            assert output.prompt_logprobs is not None
            places = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            own = [place[token] for token, place in places if place is not None]
            found.append([(one.logprob, one.rank == 1) for one in own])
        return found

    def run(self, prompts: Sequence[list[int]], settings: Sequence[object]) -> Sequence[RequestOutput]:
        from vllm import TokensPrompt  # pyright: ignore[reportMissingImports]

        given = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        return self.engine.generate(given, settings, use_tqdm=can_redraw(sys.stderr))


def load_vllm(folder: Path, trust: Trust) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model over all GPUs of the machine, in the dtype it was saved in, and its tokenizer.

    It has the type of a model of transformers, of which the suites of `SUITES` use what `VllmModel` has.

    Raises:
        InputError: an adapter, or a model that cannot be loaded, or not without something that `trust` does not allow.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    from pipeline.modeling.weights import release_memory

    release_memory()
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"--backend vllm takes whole models, and {folder} is an adapter; export with model.lora.merge")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
        own = (folder / "generation_config.json").is_file()
        dtype: torch.dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
        engine = LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),  # by itself vLLM rounds float32
            tensor_parallel_size=max(torch.cuda.device_count(), 1),
            trust_remote_code=trust.remote_code,
            load_format="auto" if trust.allow_pickle else "safetensors",
        )
    except (OSError, ValueError, ImportError) as error:
        raise refusal(folder, error, trust) from error
    settings = GenerationConfig.from_pretrained(folder) if own else None
    return cast("PreTrainedModel", VllmModel(engine, config, settings, dtype)), tokenizer
