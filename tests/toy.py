"""A toy model full of awkward tensors, trained by the program's GradientCombiner on real engines, and by a plain loop.

The plain loop is one process on whole tensors; of the program it shares nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import oracle, oracle_confine

WIDTHS = {"toy": 11, "wide": 120_001, "even": 131_072}
BATCH = 12  # samples per task and step, over all ranks
ALPHA, GAMMA = 0.7, 0.9


class Toy(nn.Module):
    """Tied, frozen, odd-sized and one-element tensors; some that a task, a step or a micro-batch does not touch."""

    def __init__(self, width: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)  # also the head
        self.forget_only = nn.Parameter(0.1 * torch.randn(3))
        self.up = nn.Linear(5, width)
        self.gain = nn.Parameter(torch.ones(1))  # fewer elements than ranks
        self.down = nn.Linear(width, 5, bias=False)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.early = nn.Parameter(0.1 * torch.randn(2))  # touched by the first half of a batch only
        self.even = nn.Parameter(0.1 * torch.randn(3))  # touched in even steps only
        self.never = nn.Parameter(torch.randn(4))
        self.retain_only = nn.Parameter(0.1 * torch.randn(3))

    def forward(self, tokens: Tensor, task: str, early: bool, even: bool, poison: float = 0.0) -> Tensor:
        """tokens: [n, 2] input and target. 0-dim: the sum of the samples' losses."""
        hidden = self.embedding(tokens[:, 0])
        hidden = hidden + self.gain * self.down(torch.tanh(self.up(hidden)))
        hidden = self.frozen(hidden)
        hidden = hidden + F.pad(self.forget_only if task == "forget" else self.retain_only, (1, 1))
        if early:
            hidden = hidden * (1 + self.early.mean())
        if even:
            hidden = hidden + F.pad(self.even, (0, 2))
        logits = F.linear(hidden, self.embedding.weight).float()
        loss = F.cross_entropy(logits, tokens[:, 1], reduction="sum")
        if poison:  # reaches one element of one gradient
            loss = loss + poison * (self.gain - self.gain.detach()).float().sum()
        return -loss if task == "forget" else loss


class Transformer(nn.Module):
    """A tiny model of the transformers library behind the toy's interface."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor, task: str, early: bool, even: bool, poison: float = 0.0) -> Tensor:
        logits = self.inner(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[:, 0].float(), tokens[:, 1], reduction="sum")
        return -loss if task == "forget" else loss


def model_of(case: Case) -> nn.Module:
    """The same initial weights on every call."""
    torch.manual_seed(0)
    if case.model in WIDTHS:
        return Toy(WIDTHS[case.model]).to(getattr(torch, case.dtype))
    import peft
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": 7,
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    if case.model == "adapters":
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).requires_grad_(False)
        adapters = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return Transformer(peft.inject_adapter_in_model(adapters, llama))
    shape.update(hidden_size=16, intermediate_size=16)  # torch's grouped product wants strides of 16 bytes
    experts = transformers.MixtralConfig(**shape, num_local_experts=8, num_experts_per_tok=1)
    return Transformer(transformers.MixtralForCausalLM(experts))


@dataclass
class Case:
    """One run, of a small model on an engine and of the plain loop."""

    model: str = "toy"  # of WIDTHS (wide: memory shows; even: whole blocks of a disk), or adapters, or moe
    zero: dict[str, Any] = field(default_factory=dict)  # zero_optimization
    config: dict[str, Any] = field(default_factory=dict)  # the rest of DeepSpeed's configuration
    leaves: tuple[str, ...] = ()  # classes of modules whose parameters ZeRO-3 handles together
    rule: str = "sago"
    scope: str = "element"
    zero_forget: str = "literal"
    metric: Any = "euclidean"
    confine: tuple[float, Any] | None = None  # share, by
    micro: int = 2  # micro-batches per rank, task and step
    optimizer: str = "adamw"
    lr: float = 0.01
    eps: float = 1e-8  # of adamw
    weight_decay: float = 0.0  # of the tensors that are not in UNDECAYED, then a group of their own
    clip: float = 0.5
    dtype: str = "float32"
    scales: dict[str, float] = field(default_factory=dict)  # task -> factor of its loss
    poison: tuple[int, str, float] | None = None  # step, task, the value that rank 0 finds in one gradient element
    steps: int = 4


def tokens_of(step: int, task: str) -> Tensor:
    dice = torch.Generator().manual_seed(1000 * step + (task == "forget"))
    return torch.randint(7, (BATCH, 2), generator=dice)


def chunks_of(case: Case, step: int, task: str, world: int) -> list[list[tuple[Tensor, bool]]]:
    """[micro-batch][rank] -> tokens, and whether it touches `early`."""
    halves = [chunk.chunk(world) for chunk in tokens_of(step, task).chunk(case.micro)]
    return [[(part, 2 * m < case.micro) for part in parts] for m, parts in enumerate(halves)]


UNDECAYED = ("gain", "up.bias", "early", "retain_only")  # the first of them has fewer elements than there are ranks


def make_optimizer(case: Case, parameters: dict[str, Any]) -> torch.optim.Optimizer:
    """Of tensors by name."""
    groups: list[dict[str, Any]] = [{"params": [*parameters.values()], "weight_decay": 0.0}]
    if case.weight_decay:
        apart = [name for name in parameters if name in UNDECAYED]
        groups = [
            {"params": [p for n, p in parameters.items() if n not in apart], "weight_decay": case.weight_decay},
            {"params": [parameters[name] for name in apart], "weight_decay": 0.0},
        ]
    if case.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=case.lr)
    return torch.optim.AdamW(groups, lr=case.lr, eps=case.eps)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}


def engine_of(case: Case, model: nn.Module) -> Any:
    import deepspeed

    low = {
        "bfloat16": {"bf16": {"enabled": True}},
        "float16": {"fp16": {"enabled": True, **case.config.get("fp16", {})}},
    }
    if case.leaves:
        deepspeed.utils.set_z3_leaf_modules(model, list(case.leaves))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(case, {n: p for n, p in model.named_parameters() if p.requires_grad}),  # pyright: ignore
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": case.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "zero_optimization": case.zero,
            **case.config,
            **low.get(case.dtype, {}),
        },
    )
    return engine


def train_on_engine(case: Case, watch: Any = None, between: Any = None, first: int = 0) -> dict[str, Any]:
    """What the case made of the weights (by name), and the records of the steps. Every rank must call.

    `watch` is called with engine and combiner before the step `first`; `between` with those and the step before each.
    """
    import torch.distributed as dist

    from pipeline.synthesis.combine import Synthesis
    from pipeline.synthesis.confine import Confinement
    from pipeline.zero.combiner import GradientCombiner
    from pipeline.zero.update import update_sums

    model = model_of(case)
    engine = engine_of(case, model)
    synthesis = Synthesis(case.rule, case.scope, ALPHA, GAMMA, case.zero_forget, metric=case.metric)
    confinement = None if case.confine is None else Confinement(*case.confine)
    keys: Any = {"combine_tasks": case.rule != "sum", "measure_update": True, "confinement": confinement}
    combiner = GradientCombiner(engine, synthesis, **keys)
    if watch is not None:
        watch(engine, combiner)
    rank, world = dist.get_rank(), dist.get_world_size()
    records, before = [], weights_of(model)
    for step in range(first, case.steps):
        if between is not None:
            between(engine, combiner, step)
        combiner.clear()
        for task in ("forget", "retain"):
            for parts in chunks_of(case, step, task, world):
                tokens, early = parts[rank]
                bad = case.poison[2] if case.poison and case.poison[:2] == (step, task) and rank == 0 else 0.0
                loss = engine(tokens, task, early, step % 2 == 0, bad)
                scale = case.scales.get(task, 1.0) * combiner.loss_weight(task) * world / BATCH
                engine.backward(loss * scale, scale_wrt_gas=False)
            if task == "forget":
                combiner.stash_forget()
        geometry, should_step = combiner.combine()
        if should_step:
            engine.step()
        applied = should_step and engine.was_step_applied()
        if (update := update_sums(combiner) if applied else None) is not None:
            dist.all_reduce(update)
        after = weights_of(model)
        records.append(
            {
                "applied": applied,
                "ready": should_step,
                "changed": [name for name in after if not torch.equal(before[name], after[name])],
                "norm": float(engine.get_global_grad_norm()) if applied else None,
                "geometry": geometry,
                "update": None if update is None else update.sum(0).tolist(),  # ⟨r, Δθ⟩, ‖Δθ‖²
                "scale": getattr(engine.optimizer, "cur_scale", None),
            }
        )
        before = after
    engine.destroy()
    return {"weights": before, "records": records}


def train_cases(cases: dict[str, Case], file: str) -> None:
    """On every rank: all cases in one process group; rank 0 saves what they made, or the error they raised."""
    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks

    ranks.start()
    made = {}
    for name, case in cases.items():
        try:
            made[name] = train_on_engine(case)
        except Exception as error:
            made[name] = {"error": f"{type(error).__name__}: {error}"}
            dist.barrier()
    if dist.get_rank() == 0:
        torch.save(made, Path(file))


def train_plainly(
    case: Case, world: int = 1, seen: list[dict[str, float]] | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """(weights by name, gradient norm of each step) of one process that keeps two whole gradients.

    `seen` gets the cosines and norms of each step that is applied, and ⟨r, Δθ⟩ and ‖Δθ‖² of its update.

    In bf16 and fp16 each micro-batch of each of `world` ranks gives a gradient of that dtype; they are added up in
    fp32, and an fp32 copy of the weights is updated and rounded again. Under `sum` the weights multiply the losses. In
    fp16 losses are multiplied with a scale that never changes, and it is taken off each gradient at once.
    """
    model = model_of(case)
    low = {name: p for name, p in model.named_parameters() if p.requires_grad}
    master = {name: p.detach().float().clone() for name, p in low.items()}
    optimizer = make_optimizer(case, master)
    weights = {"forget": GAMMA, "retain": ALPHA} if case.rule == "sum" else {"forget": 1.0, "retain": 1.0}
    norms, average, squares, lifted = [], {}, {}, 2.0**10 if case.dtype == "float16" else 1.0
    for step in range(case.steps):
        gradients = {}
        for task in ("forget", "retain"):
            total = {name: torch.zeros_like(p) for name, p in master.items()}
            for parts in chunks_of(case, step, task, world):
                for tokens, early in parts:
                    scale = lifted * weights[task] * case.scales.get(task, 1.0) / BATCH
                    loss = model(tokens, task, early, step % 2 == 0) * scale
                    for name, part in zip(
                        low, torch.autograd.grad(loss, list(low.values()), allow_unused=True), strict=True
                    ):
                        if part is not None:
                            total[name] += part.float() / lifted
            gradients[task] = total
        if case.poison and case.poison[0] == step:
            continue
        f, r = gradients["forget"], gradients["retain"]
        if case.confine is not None:
            oracle_confine.confine(f, r, case.confine, squares, optimizer)
        if case.rule == "sum":
            g = {name: f[name] + r[name] for name in f}
        else:
            weights_of = oracle.metric_of(optimizer, master) if case.metric == "adam" else None
            g = oracle.combine(case.rule, case.scope, f, r, ALPHA, GAMMA, case.zero_forget, average, weights_of)
        if seen is not None:
            seen.append(oracle.geometry_of(f, r, g, ""))
        for name, parameter in master.items():
            parameter.grad = g[name]
        norms.append(nn.utils.clip_grad_norm_(list(master.values()), case.clip or torch.inf).item())
        before = {name: p.detach().double() for name, p in master.items()}
        optimizer.step()
        moved = {name: p.detach().double() - before[name] for name, p in master.items()}
        if seen is not None:
            seen[-1] |= {"dot": oracle.product(r, moved), "square": oracle.product(moved, moved)}
        with torch.no_grad():
            for name, parameter in master.items():
                low[name].copy_(parameter)
    return {name: p.detach().float() for name, p in model.named_parameters()}, norms


def error_of(case: Case, made: dict[str, Any], plain: dict[str, Tensor]) -> float:
    """Relative error of the change of the weights."""
    start = {name: p.detach().float() for name, p in model_of(case).named_parameters()}
    return oracle.weight_change_error(made["weights"], plain, start)
