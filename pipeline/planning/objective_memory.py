"""The memory of an objective, between steps and at its peak, compared with the usual way to compute it.

    python -m pipeline.planning.objective_memory [--width 16] [--tokens 1024] [--vocabulary 131072]

*Head*: token losses from hidden states and the output weight, compared with logits and cross-entropy in float32. *NPO*
and *RMU's retain term*: a micro-batch of a small Llama, compared with a second model as the reference; both use the
token losses of this program. On a GPU the figures are the allocator's; else they are the bytes of all live storages,
without what a kernel allocates inside itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.batches import Batch
from pipeline.losses.objectives import OBJECTIVES, LossInputs
from pipeline.modeling.decoder import blocks_of
from pipeline.modeling.outputs import HiddenStates, Logits, TokenLosses, forward, install_outputs
from pipeline.modeling.reference import ReferenceWeights
from pipeline.modeling.token_losses import OutputLayer, token_losses
from pipeline.planning.meta_trace import LiveBytes

MIB = 2**20


LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}


BATCH = (2, 256)  # sequences, tokens


LAYER = 7  # whose output RMU reads


RMU_TRAINS = r"layers\.[567]\.mlp\.down_proj"  # as in launch/recipes


Persistent = TypeVar("Persistent")


@dataclass(frozen=True)
class Bytes:
    persistent: int  # between steps
    peak: int  # in a step, beyond `persistent` and the model


def measure(
    keep: Callable[[], Persistent], step: Callable[[Persistent], None], existing: Iterable[Tensor], device: torch.device
) -> Bytes:
    """The bytes of what `keep()` returns, and the peak bytes that `step` of it adds.

    `existing`: tensors that exist before; they do not count.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        persistent = keep()
        after = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(persistent)
        return Bytes(after - before, torch.cuda.max_memory_allocated() - after)
    with LiveBytes(existing) as ledger:
        persistent = keep()
        after = ledger.peak = ledger.alive
        step(persistent)
    return Bytes(after, ledger.peak - after)


def head(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> dict[str, Bytes]:
    """Token losses of [1, tokens, width] states and a [vocabulary, width] weight, forward and backward."""
    torch.manual_seed(0)
    labels = torch.randint(vocabulary, (1, tokens), device=device)

    def ordinary(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return token_losses(hidden, labels, layer=OutputLayer(weight)).sum()

    found = {}
    for name, loss in {"logits and cross-entropy": ordinary, "ours": ours}.items():
        shapes = ((1, tokens, width), (vocabulary, width))
        leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        found[name] = measure(lambda: None, lambda _, loss=loss, x=leaves: loss(*x).backward(), leaves, device)
    return found


class Engine(nn.Module):
    """A whole model on one device with the interface of DeepSpeed's engine."""

    def __init__(self, module: transformers.PreTrainedModel, device: torch.device) -> None:
        super().__init__()
        self.module, self.device, self.optimizer = module, device, None
        install_outputs(self)

    def forward(self, **inputs: object) -> Any:
        return self.module(**inputs)


def make_engine(sizes: dict[str, int], trains: str, device: torch.device) -> Engine:
    """An untrained Llama, the same at every call; `trains`: a pattern of tensor names."""
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(**sizes)  # pyright: ignore[reportArgumentType]
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(re.search(trains, name)))
    return Engine(model.train(), device)


def references(sizes: dict[str, int], layer: int, batch: Batch, device: torch.device) -> dict[str, Bytes]:
    """Forward and backward of one micro-batch, by the source of the reference."""

    def backward(objective: str, reference: Tensor, **states: Any) -> None:
        """states: the token losses, or the hidden states."""
        mask = batch.attention_mask
        inputs = LossInputs(batch.labels, mask, beta=0.1, delta=0.0, reference=reference, **states)
        OBJECTIVES[objective].terms(inputs).backward()

    def second_model(engine: Engine) -> Engine:
        return make_engine(sizes, "^$", device)

    @torch.no_grad()
    def likelihoods(engine: Engine) -> Tensor:
        return forward(engine, batch, TokenLosses()).double().sum(1)

    def npo(engine: Engine, reference: Tensor) -> None:
        backward("npo", reference, token_losses=forward(engine, batch, TokenLosses()))

    def npo_of_two(engine: Engine, second: Engine) -> None:
        npo(engine, likelihoods(second))

    def embed_diff(engine: Engine, frozen: ReferenceWeights) -> None:
        reference = frozen.hidden_states(batch, layer)
        backward("embed_diff", reference, hidden_states=forward(engine, batch, HiddenStates(layer)))

    def embed_diff_of_two(engine: Engine, second: Engine) -> None:
        reference, states = whole_forward(second), whole_forward(engine)
        backward("embed_diff", reference, hidden_states=states)

    def whole_forward(engine: Engine) -> Tensor:
        """[B, T, H] after block `layer`, seen by a hook while the whole model runs."""
        seen: list[Tensor] = []
        block = blocks_of(engine.module)[layer]  # pyright: ignore[reportArgumentType]
        hook = block.register_forward_hook(lambda *call: seen.append(call[2]))
        forward(engine, batch, Logits())
        hook.remove()
        return seen[0]

    variants: dict[str, tuple[str, Callable[[Engine], Any], Callable[[Engine, Any], None]]] = {
        "NPO: a second model": ("", second_model, npo_of_two),
        "NPO: ours": ("", likelihoods, npo),
        "RMU's retain term: a second model, whole forwards": (RMU_TRAINS, second_model, embed_diff_of_two),
        "RMU's retain term: ours": (RMU_TRAINS, ReferenceWeights, embed_diff),
    }
    found = {}
    for name, (trains, keep, step) in variants.items():
        engine = make_engine(sizes, trains, device)
        existing = [*engine.parameters(), *engine.buffers(), batch.input_ids, batch.attention_mask, batch.labels]
        found[name] = measure(partial(keep, engine), partial(step, engine), existing, device)
    return found


def table(rows: dict[str, Bytes]) -> str:
    lines = ["| variant | persistent, MiB | peak | both |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row.persistent / MIB:.0f} | {row.peak / MIB:.0f} | {(row.persistent + row.peak) / MIB:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.planning.objective_memory", description="Memory of an objective."
    )
    parser.add_argument("--width", type=int, default=16, help="of the head's hidden states")
    parser.add_argument("--tokens", type=int, default=1024, help="of the head")
    parser.add_argument("--vocabulary", type=int, default=131072, help="of the head")
    options = parser.parse_args()

    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(LLAMA["vocab_size"], BATCH, device=device)
    batch = Batch(torch.arange(BATCH[0]), ids, torch.ones_like(ids), ids)
    rows = {}
    for short, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for name, row in head(options.tokens, options.width, options.vocabulary, dtype, device).items():
            rows[f"head, {short}: {name}"] = row
    rows |= references(LLAMA, LAYER, batch, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    blocks, width, vocabulary = (LLAMA[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    shape = f"{blocks} blocks of width {width}, vocabulary {vocabulary:,}, fp32"
    print(f"{where}, {versions}")
    print(f"Head: {options.tokens:,} tokens, width {options.width}, vocabulary {options.vocabulary:,}.")
    print(f"NPO and RMU: {BATCH[0]} × {BATCH[1]} tokens, {shape}.\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
