"""What `forward` returns, beside the untouched model: architectures, tied heads, adapters, layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batches import Batch
from pipeline.modeling import outputs
from pipeline.modeling.outputs import HiddenStates, Logits, TokenLosses, TokenScores, forward
from tests.distributed import run_distributed
from tests.pipeline.modeling.architectures import ARCHITECTURES, BLOCKS, VOCABULARY, build

LABELS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [8, 9, 7, 9, 3, -100, -100, -100]])
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
INPUTS = {"input_ids": LABELS.clamp(min=0), "attention_mask": MASK}
BATCH = Batch(torch.arange(2), INPUTS["input_ids"], MASK, LABELS)


def engine_for(model: Any, stage: int) -> Any:
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=0.5),  # pyright: ignore[reportArgumentType]
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40},
        },
    )
    return engine


def blocks(model: Any) -> list[Any]:
    """By name, and not as the program finds them."""
    found = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last.isdigit() and parent.endswith(("layers", ".h")):
            found[int(last)] = module
    assert sorted(found) == list(range(BLOCKS))
    return [found[number] for number in range(BLOCKS)]


def hooked(model: Any, layer: int) -> Tensor:
    """[B, T, H] what block `layer` hands on."""
    seen = []
    hook = blocks(model)[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(**INPUTS, use_cache=False)
    hook.remove()
    return seen[0] if isinstance(seen[0], Tensor) else seen[0][0]


def gradients_of(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    stage3 = engine.zero_optimization_stage() == 3
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    found = {name: safe_get_full_grad(p) if stage3 else p.grad for name, p in named}
    return {name: torch.zeros(1) if gradient is None else gradient.float() for name, gradient in found.items()}


def assert_same_gradients(engine: Any, plain: Any, loss: Tensor) -> None:
    named = {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}
    want = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    got = gradients_of(engine)
    assert list(got) == list(named)
    for (name, mine), exact in zip(got.items(), want, strict=True):
        atol = 1e-5 * max(exact.abs().max().item(), 1e-3)
        mine = mine.expand_as(exact)
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def reset(engine: Any) -> None:
    engine.optimizer.zero_grad()
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()


def check(name: str, stage: int) -> None:
    model = build(name)
    plain, token_losses = copy.deepcopy(model), outputs.token_losses
    engine, through_head = engine_for(model, stage), []
    ran: list[int] = []
    for number, block in enumerate(blocks(engine.module)):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))

    def watched(*arguments: Any, **options: Any) -> Tensor:
        through_head.append(options.get("layer") is not None)
        return token_losses(*arguments, **options)

    outputs.token_losses = watched
    try:
        outputs.install_outputs(engine)
        ran.clear()
        check_losses(engine, plain)
        assert through_head == [ARCHITECTURES[name][2]] * 2, "whether the logits were avoided"
        check_layers(engine, plain, ran)
        check_reference_weights(engine, plain)
    finally:
        outputs.token_losses = token_losses


def check_losses(engine: Any, plain: Any) -> None:
    logits = plain(**INPUTS).logits
    assert logits.std() > 0.3, "a test on logits near zero would see nothing"
    torch.testing.assert_close(forward(engine, BATCH, Logits()), logits, rtol=0, atol=1e-5)
    targets = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], 1)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 8)
    losses = forward(engine, BATCH, TokenLosses())
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, 16).view(2, 8)
    engine.backward((losses * weights).sum())
    assert_same_gradients(engine, plain, (want * weights).sum())
    reset(engine)
    with torch.no_grad():
        scores, correct, greedy = forward(engine, BATCH, TokenScores())
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(correct.bool(), (logits.argmax(-1) == targets) & (targets != -100))
    assert torch.equal(greedy.long(), logits.argmax(-1) * (targets != -100))
    q = torch.randn(2, 8, VOCABULARY, generator=torch.Generator().manual_seed(1))
    want = -(q.softmax(-1) * plain(**INPUTS).logits.log_softmax(-1)).sum(-1) * (targets != -100)
    losses = forward(engine, BATCH, TokenLosses(q))
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)
    engine.backward((losses * weights).sum())
    assert_same_gradients(engine, plain, (want * weights).sum())
    reset(engine)


def check_layers(engine: Any, plain: Any, ran: list[int]) -> None:
    """Whole forwards in between: the blocks that were out of the model are back."""
    for layer in range(BLOCKS):
        ran.clear()
        got, want = forward(engine, BATCH, HiddenStates(layer)), hooked(plain, layer)
        assert torch.equal(got, want)
        assert ran == list(range(layer + 1)), "no block above was run"
        assert len(blocks(engine.module)) == BLOCKS
        upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(layer))
        engine.backward((got * upstream).sum())
        assert_same_gradients(engine, plain, (want * upstream).sum())
        reset(engine)
        with torch.no_grad():
            assert torch.equal(forward(engine, BATCH, HiddenStates(layer)), want)
            logits = plain(**INPUTS).logits
            torch.testing.assert_close(forward(engine, BATCH, Logits()), logits, rtol=0, atol=1e-5)


def check_reference_weights(engine: Any, plain: Any) -> None:
    """After a step the model has moved and `ReferenceWeights` has not; used before, between and after a forward."""
    from pipeline.modeling.reference import ReferenceWeights

    reference = ReferenceWeights(engine)
    with torch.no_grad():
        logits, hidden = plain(**INPUTS).logits, hooked(plain, BLOCKS - 1)
    for _ in range(2):
        engine.backward(forward(engine, BATCH, TokenLosses()).sum())
        engine.step()
        with torch.no_grad():
            moved = forward(engine, BATCH, Logits())
        assert (moved - logits).abs().max() > 1e-2
        torch.testing.assert_close(reference.logits(BATCH), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(reference.hidden_states(BATCH, BLOCKS - 1), hidden, rtol=0, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(forward(engine, BATCH, Logits()), moved)
        assert engine.training


def check_each(names: list[str], stage: int) -> None:
    from pipeline.distributed import process_group as ranks

    ranks.start()
    for name in names:
        try:
            check(name, stage)
        except BaseException as error:
            raise AssertionError(f"{name}, ZeRO stage {stage}") from error


FEW = ["llama", "llama-tied", "gemma2", "adapters"]


@pytest.mark.parametrize(("stage", "ranks", "names"), [(3, 1, list(ARCHITECTURES)), (3, 2, FEW), (0, 1, FEW)])
def test_outputs_equal_those_of_the_untouched_model(stage: int, ranks: int, names: list[str]) -> None:
    """Losses, logits, hidden states, all gradients, and the reference model; every architecture under ZeRO-3."""
    run_distributed(check_each, ranks, names, stage)


def check_gathers() -> None:
    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks

    gathered = 0
    original = dist.all_gather_into_tensor

    def watch(output_tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal gathered
        gathered += output_tensor.numel()
        return original(output_tensor, *arguments, **options)

    dist.all_gather_into_tensor = watch  # before DeepSpeed takes its name
    ranks.start()
    engine = engine_for(build("llama"), 3)
    outputs.install_outputs(engine)
    sizes = [parameter.ds_numel for parameter in engine.module.parameters()]
    once = sum(size + size % 2 for size in sizes if size > 40)  # the others stay gathered
    for step in range(5):
        with torch.no_grad():
            forward(engine, BATCH, Logits())
            forward(engine, BATCH, HiddenStates(0))
        for output in (TokenLosses(), HiddenStates(1)):
            gathered = 0
            engine.backward(forward(engine, BATCH, output).sum())
            reset(engine)
            if step > 2 and isinstance(output, TokenLosses):
                assert gathered == once, f"step {step}: {gathered} elements gathered, the model has {once}"
    dist.all_gather_into_tensor = original


def test_other_passes_in_between_cost_no_gathers() -> None:
    """A training pass gathers each weight once, and keeps it from forward to backward, also beside passes without one.

    DeepSpeed alone gathers everything twice for ever after one forward without a backward.
    """
    run_distributed(check_gathers, 2)


def largest_made(work: Callable[[], Any]) -> int:
    from tests.pipeline.modeling.predictions import Created

    with Created() as created:
        work()
    return created.largest


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_plain_head_makes_no_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model's own forward and backward, as in the loss alone; where they cannot be avoided, they are seen."""
    from types import SimpleNamespace

    from pipeline.modeling import token_losses

    monkeypatch.setattr(token_losses, "_CHUNK", 256)
    keys = {"vocab_size": 4096, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_attention_heads": 2}
    monkeypatch.setitem(ARCHITECTURES, name, (ARCHITECTURES[name][0], {**ARCHITECTURES[name][1], **keys}, True))
    model = build(name)
    tokens = torch.arange(64).view(2, 32)
    engine: Any = SimpleNamespace(module=model, device="cpu", train=model.train, eval=model.eval, optimizer=None)
    engine = type("Engine", (), {"__call__": lambda self, **x: model(**x), **vars(engine)})()
    outputs.install_outputs(engine)
    batch = Batch(torch.arange(2), tokens, torch.ones_like(tokens), tokens)
    largest = largest_made(lambda: forward(engine, batch, TokenLosses()).sum().backward())
    logits, weight = tokens.numel() * 4096, 4096 * 8
    assert largest == (weight if name == "llama" else logits)
    with torch.no_grad():
        largest = largest_made(lambda: forward(engine, batch, TokenScores()))
    assert largest < weight if name == "llama" else largest == logits


@pytest.mark.parametrize("name", ["llama", "gemma2", "adapters"])
def test_a_model_is_as_it_was_after_temporary_outputs(name: str) -> None:
    from eval.suites.probes import _Whole

    model = build(name).eval()
    with torch.no_grad():
        before = model(**INPUTS).logits
        with outputs.temporary_outputs(_Whole(model, model.device)) as _:
            assert forward(model, BATCH, TokenScores()).shape == (3, 2, 8)
        assert torch.equal(model(**INPUTS).logits, before) and not model.training
    assert not {"forward"} & (vars(model).keys() | vars(model.get_output_embeddings()).keys())
