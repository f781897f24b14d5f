"""Each loss and its gradient against the formulas in float64: from logits, from hidden states, however it is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.data.batches import IGNORED
from pipeline.losses.objectives import OBJECTIVES, LossInputs, steering_vector
from pipeline.modeling import token_losses as objectives
from pipeline.modeling.token_losses import entropies, shifted, token_losses

V, H = 13, 5  # vocabulary, hidden width
BETAS = (0.05, 1.0, 4.0)
WAYS = ("logits", "hidden", "hidden+bias")
ERRORS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2**-6)}  # value, gradient
PAIRED = ("dpo", "dpo_idk")  # two answers to each prompt in a batch
FROM_TOKENS = [name for name, objective in OBJECTIVES.items() if not objective.hidden]

# Token ids per sequence; `None` is a label that the data masks. Right-padded when they meet in a batch.
SEQUENCES: list[list[int | None]] = [
    [3, 1, 4, 1, 5, 9],
    [2],  # one token predicts nothing
    [6, 5],
    [3, None, None, 8, 9],
    [7, None, None],  # two positions, none of them predicted
    [0, 0, 10, 0],  # 0 is a token like any other
]


def batch_of(rows: Sequence[list[int | None]], width: int | None = None) -> Tensor:
    """[B, T] labels."""
    width = width or max(map(len, rows))
    return torch.tensor(
        [[IGNORED if token is None else token for token in row] + [IGNORED] * (width - len(row)) for row in rows]
    )


def mask_of(rows: Sequence[list[int | None]], width: int | None = None) -> Tensor:
    """[B, T]: 1 on real tokens, masked by the data or not."""
    width = width or max(map(len, rows))
    return torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


LABELS, MASK = batch_of(SEQUENCES), mask_of(SEQUENCES)


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_for(labels: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*labels.shape, V, seed=seed).to(dtype)


def eighths(*shape: int, seed: int, step: float) -> Tensor:
    """Few multiples of a power of two: products of them, summed over H, are exact in bf16 too."""
    return step * torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def leaves_of(way: str, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What a gradient is asked for: logits; or hidden states, weight and, perhaps, bias."""
    if way == "logits":
        return [logits_for(labels, dtype=dtype).requires_grad_()]
    made = [eighths(*labels.shape, H, seed=1, step=0.5), eighths(V, H, seed=2, step=0.25)]
    made += [eighths(V, seed=3, step=0.125)] if way == "hidden+bias" else []
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def losses_of(leaves: list[Tensor], labels: Tensor, soft: Tensor | None = None, lower: float = 0.0) -> Tensor:
    states, weight, bias = [*leaves, None, None][:3]
    assert states is not None
    return token_losses(states, labels, weight=weight, bias=bias, teacher_logits=soft, logit_penalty=lower)


def exactly(leaves: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(the leaves in float64, the logits that follow from them)."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    if len(exact) == 1:
        return exact, exact[0]
    logits = torch.einsum("bth,vh->btv", exact[0], exact[1])
    return exact, logits if len(exact) == 2 else logits + exact[2]


# ---------------------------------------------------------------------------------------------------------------------
# The formulas, one token at a time


def log_probabilities(row: Tensor) -> Tensor:
    """[V]: z - log Σ exp(z)."""
    top = row.detach().max()
    return row - top - (row - top).exp().sum().log()


def per_prediction(
    logits: Tensor, labels: Tensor, what: Callable[[Tensor, int, int, int], Tensor]
) -> list[list[Tensor]]:
    """Per sequence `what(log p [V], token, sequence, position)` of every predicted token."""
    return [
        [
            what(log_probabilities(row[at]), token, number, at)
            for at, token in enumerate(tokens[1:])  # position at predicts the token after it
            if token != IGNORED
        ]
        for number, (row, tokens) in enumerate(zip(logits.double(), labels.tolist(), strict=True))
    ]


def nlls_from_formula(logits: Tensor, labels: Tensor) -> list[list[Tensor]]:
    return per_prediction(logits, labels, lambda log_p, token, *_: -log_p[token])


def softplus(x: Tensor) -> Tensor:
    """-log σ(-x), without overflow."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


@dataclass
class Setting:
    """What the objectives are given beside the trained model's own output."""

    beta: float
    delta: float = 0.3
    labels: Tensor = LABELS
    mask: Tensor = MASK
    rows: Sequence[int] = range(len(SEQUENCES))  # which of the rows of what follows are in this micro-batch

    def original(self, name: str, dtype: torch.dtype) -> Tensor | None:
        asks, width = OBJECTIVES[name].reference, self.labels.shape[1]
        if asks == "log_probs":
            return torch.tensor([20.0, 0.0, 3.0, 7.0, 0.0, 5.0], dtype=torch.float64)[list(self.rows)]
        if asks is None:
            return None
        size, seed = (V, 5) if asks == "logits" else (H, 6)
        return random(len(SEQUENCES), 20, size, seed=seed)[list(self.rows), :width].to(dtype)

    @property
    def steering(self) -> Tensor:
        return steering_vector(H, 6.5, seed=3)


def loss_from_formula(name: str, states: Tensor, setting: Setting, original: Tensor | None) -> Tensor:
    """The mean over the batch; `states` are float64 logits, or hidden states where the objective reads those."""
    zero, labels, beta, delta = states.sum() * 0, setting.labels, setting.beta, setting.delta
    if name in ("rmu", "embed_diff"):
        goal = setting.steering.double().expand_as(states) if name == "rmu" else original
        assert goal is not None
        terms = [(states[b, t] - goal[b, t].double()).square().sum() / H for b, t in setting.mask.nonzero().tolist()]
        return sum(terms, zero) / len(terms)
    if name in ("undial", "kl"):
        assert original is not None
        z = original.double()

        def against_original(log_p: Tensor, token: int, number: int, at: int) -> Tensor:
            lower = torch.zeros(V, dtype=torch.float64)
            lower[token] = beta if name == "undial" else 0
            log_q = log_probabilities(z[number, at] - lower)
            return log_q.exp() @ ((0 if name == "undial" else log_q) - log_p)

        terms = [x for row in per_prediction(states, labels, against_original) for x in row]
        return sum(terms, zero) / len(terms)
    nlls = nlls_from_formula(states, labels)
    tokens = [nll for row in nlls for nll in row]
    if name in ("ga", "nll", "idk"):  # the labels of idk are those of refusals
        return (-1 if name == "ga" else 1) * sum(tokens, zero) / len(tokens)
    if name == "wga":
        return -sum((math.exp(-nll.item()) ** beta * nll for nll in tokens), zero) / len(tokens)
    totals = [sum(row, zero) for row in nlls]
    if name == "simnpo":
        margins = [(total / len(row) if row else total) - delta for total, row in zip(totals, nlls, strict=True)]
    else:
        assert original is not None
        margins = [total - reference.double() for total, reference in zip(totals, original, strict=True)]
        if name in ("dpo", "dpo_idk"):  # log-ratio of the preferred answer, in the second half, less that of the other
            half = len(margins) // 2
            margins = [-preferred + other for other, preferred in zip(margins[:half], margins[half:], strict=True)]
        else:
            assert name == "npo"
    return sum((2 / beta * softplus(-beta * margin) for margin in margins), zero) / len(margins)


def ours(name: str, leaves: list[Tensor], setting: Setting, original: Tensor | None) -> Tensor:
    """The sum of the terms of one micro-batch, as the program asks for it."""
    objective, labels = OBJECTIVES[name], setting.labels
    soft, lower = (
        original if objective.reference == "logits" else None,
        setting.beta if objective.logit_penalty else 0.0,
    )
    inputs = LossInputs(labels, setting.mask, setting.beta, setting.delta, reference=original)
    if objective.hidden:
        return objective.terms(replace(inputs, hidden_states=leaves[0], steering=setting.steering))
    return objective.terms(replace(inputs, token_losses=losses_of(leaves, labels, soft, lower)))


def count(name: str, setting: Setting) -> int:
    """The terms of the mean."""
    per = OBJECTIVES[name].normalize_by
    if per == "sequence":
        return len(setting.labels) // (2 if name in PAIRED else 1)
    return int(setting.mask.sum() if per == "position" else (setting.labels[:, 1:] != IGNORED).sum())


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(leaves))


def assert_gradients_close(got: Sequence[Tensor], want: Sequence[Tensor], error: float) -> None:
    for mine, exact in zip(got, want, strict=True):
        atol = error * exact.abs().max().item()
        torch.testing.assert_close(mine.double(), exact, rtol=error, atol=max(atol, 1e-15))


# ---------------------------------------------------------------------------------------------------------------------
# token_losses


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [1, 7, V, 3 * V + 1, 2**24])
@pytest.mark.parametrize("dtype", ERRORS)
def test_token_losses_equal_the_formula(
    monkeypatch: pytest.MonkeyPatch, soft: bool, way: str, chunk: int, dtype: torch.dtype
) -> None:
    """Value to fp32 accuracy even for bf16, gradients to the accuracy of their own dtype."""
    monkeypatch.setattr(objectives, "_CHUNK", chunk)
    value_error, gradient_error = ERRORS[dtype]
    q = logits_for(LABELS, seed=9, dtype=dtype) if soft else None
    leaves = leaves_of(way, LABELS, dtype)
    got = losses_of(leaves, LABELS, q)
    assert got.shape == LABELS.shape and got.dtype == torch.promote_types(dtype, torch.float32)

    def against(log_p: Tensor, token: int, number: int, at: int) -> Tensor:
        return -log_p[token] if q is None else -(log_probabilities(q[number, at].double()).exp() @ log_p)

    exact, logits = exactly(leaves)
    want = per_prediction(logits, LABELS, against)
    predicted = shifted(LABELS) != IGNORED
    assert (got[~predicted] == 0).all()
    flat = torch.stack([x for row in want for x in row])
    torch.testing.assert_close(got[predicted].double(), flat, rtol=value_error, atol=value_error)
    upstream = torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype) - 0.5
    mine = gradients_of((got * upstream).sum(), leaves)
    assert [gradient.dtype for gradient in mine] == [dtype] * len(leaves)
    assert_gradients_close(mine, gradients_of(upstream[predicted].double() @ flat, exact), gradient_error)
    assert (mine[0][~predicted] == 0).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [2 * V, 2**24])
def test_gradients_by_finite_differences(monkeypatch: pytest.MonkeyPatch, soft: bool, way: str, chunk: int) -> None:
    monkeypatch.setattr(objectives, "_CHUNK", chunk)
    labels = batch_of(SEQUENCES[1:4])
    q = logits_for(labels, seed=9, dtype=torch.float64) if soft else None
    leaves = leaves_of(way, labels, torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: losses_of(list(tensors), labels, q), leaves)


def test_a_position_is_predicted_by_the_one_before_it() -> None:
    """By hand: the first row of logits speaks about the second token, the last about nothing."""
    labels = torch.tensor([[0, 1, 2]])
    logits = torch.zeros(1, 3, 3)
    logits[0, 0, 1], logits[0, 1, 2], logits[0, 2, 0] = 5.0, 7.0, 9.0
    want = [math.log(1 + 2 * math.exp(-5)), math.log(1 + 2 * math.exp(-7)), 0.0]
    torch.testing.assert_close(token_losses(logits, labels)[0].tolist(), want, rtol=1e-5, atol=1e-7)
    through_the_head = token_losses(logits, labels, weight=torch.eye(3))
    torch.testing.assert_close(through_the_head[0].tolist(), want, rtol=1e-5, atol=1e-7)
    assert shifted(labels).tolist() == [[1, 2, IGNORED]]
    assert labels.tolist() == [[0, 1, 2]]


def test_the_label_of_the_first_position_does_not_matter() -> None:
    other = LABELS.clone()
    other[:, 0] = IGNORED
    assert torch.equal(token_losses(logits_for(LABELS), LABELS), token_losses(logits_for(LABELS), other))


@pytest.mark.parametrize("weight", [None, torch.eye(3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_neither_overflow_nor_lose_the_gap(dtype: torch.dtype, weight: Tensor | None) -> None:
    labels = torch.tensor([[0, 1, 2]])
    states = torch.tensor([[[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 0.0]]], dtype=dtype).requires_grad_()
    losses = token_losses(states, labels, weight=None if weight is None else weight.to(dtype))
    gap = states[0, 0, 0].item() - states[0, 0, 1].item()
    torch.testing.assert_close(losses[0].tolist(), [gap, math.log(3), 0.0])
    gradient = gradients_of(losses.sum(), [states])[0][0].float()
    torch.testing.assert_close(gradient[0].tolist(), [1.0, -1.0, 0.0])
    torch.testing.assert_close(gradient[1].tolist(), [1 / 3, 1 / 3, -2 / 3], rtol=1e-2, atol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_no_prediction_in_the_whole_micro_batch(way: str, soft: bool) -> None:
    """The losses are zeros with a gradient of zeros: under ZeRO every rank must run the same backward."""
    labels = batch_of([SEQUENCES[1], SEQUENCES[4]])
    leaves = leaves_of(way, labels, torch.float32)
    losses = losses_of(leaves, labels, logits_for(labels, seed=9) if soft else None)
    assert losses.requires_grad and (losses == 0).all()
    for leaf, gradient in zip(leaves, gradients_of(losses.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and (gradient == 0).all()


class Created(TorchDispatchMode):
    """The shapes of all tensors that operations return: what exists at some moment, whoever frees it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]  # views of what was given are not
        self.shapes += [tuple(x.shape) for x in made if x.untyped_storage().data_ptr() not in given]
        return result

    @property
    def largest(self) -> int:
        return max(map(math.prod, self.shapes))


@pytest.mark.parametrize("frozen", [[1], [2], [1, 2]])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: list[int]) -> None:
    trained = leaves_of("hidden+bias", LABELS, torch.float64)
    want = gradients_of(losses_of(trained, LABELS).sum(), trained)
    leaves = [leaf.detach().requires_grad_(number not in frozen) for number, leaf in enumerate(trained)]
    with Created() as created:
        losses_of(leaves, LABELS).sum().backward()
    for number, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (number in frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, want[number])
    assert ((V, H) in created.shapes) == (1 not in frozen)


def test_only_the_head_trains() -> None:
    leaves = leaves_of("hidden+bias", LABELS, torch.float64)
    want = gradients_of(losses_of(leaves, LABELS).sum(), leaves[1:])
    leaves[0] = leaves[0].detach()
    for mine, exact in zip(gradients_of(losses_of(leaves, LABELS).sum(), leaves[1:]), want, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize(("dtype", "soft"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_nothing_of_the_size_of_the_logits_is_ever_made(dtype: torch.dtype, soft: bool) -> None:
    """Vocabulary of 131072: from hidden states, forward and backward make no tensor of tokens x vocabulary elements."""
    vocabulary, tokens, width = 2**17, 136, 4
    assert vocabulary * tokens > objectives._CHUNK > vocabulary * width
    labels = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    hidden = random(1, tokens, width).to(dtype).requires_grad_()
    weight = random(vocabulary, width, seed=1, scale=1.0).to(dtype).requires_grad_()
    q = torch.zeros(1, 1, 1, dtype=dtype).expand(1, tokens, vocabulary) if soft else None
    with Created() as created:
        token_losses(hidden, labels, weight=weight, teacher_logits=q).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (vocabulary, width) in created.shapes, "the weight's gradient was seen being made"
    assert created.largest <= objectives._CHUNK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits_only_their_gradient_has_their_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_CHUNK", 4 * V)
    logits = logits_for(LABELS, dtype=dtype).requires_grad_()
    with Created() as created:
        token_losses(logits, LABELS).sum().backward()
    large = [shape for shape in created.shapes if math.prod(shape) >= logits.numel()]
    assert large == [(LABELS.numel(), V)]


# ---------------------------------------------------------------------------------------------------------------------
# The losses


@pytest.mark.parametrize(
    ("name", "way"),  # an objective of hidden states reads no logits
    [(name, way) for name in OBJECTIVES for way in (("hidden",) if OBJECTIVES[name].hidden else WAYS)],
)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", ERRORS)
def test_loss_and_gradient_equal_the_formula(
    monkeypatch: pytest.MonkeyPatch, name: str, beta: float, dtype: torch.dtype, way: str
) -> None:
    monkeypatch.setattr(objectives, "_CHUNK", 2 * V)
    error, gradient_error = ERRORS[dtype]
    setting = Setting(beta)
    original = setting.original(name, dtype)
    leaves = leaves_of(way, LABELS, dtype)
    if OBJECTIVES[name].hidden:
        leaves = leaves[:1]
    loss = ours(name, leaves, setting, original) / count(name, setting)
    exact, logits = exactly(leaves)  # of hidden states alone: themselves
    want = loss_from_formula(name, logits, setting, original)
    assert loss.item() == pytest.approx(want.item(), rel=error, abs=error)
    assert_gradients_close(gradients_of(loss, leaves), gradients_of(want, exact), gradient_error)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [2, 4], [1], [5], [3]])
@pytest.mark.parametrize("way", ["logits", "hidden+bias"])
def test_the_cut_into_micro_batches_does_not_matter(name: str, cuts: list[int], way: str) -> None:
    """Neither the sum nor the gradients, although each micro-batch is padded to its own length."""
    leaves = leaves_of("hidden", LABELS, torch.float64)[:1]
    if not OBJECTIVES[name].hidden:
        leaves = leaves_of(way, LABELS, torch.float64)
    whole = Setting(0.5)
    total = ours(name, leaves, whole, whole.original(name, torch.float64))
    pairs = len(SEQUENCES) // 2
    if name in PAIRED:
        cuts = [cut for cut in cuts if cut < pairs]
    parts = []
    for start, end in zip([0, *cuts], [*cuts, pairs if name in PAIRED else len(SEQUENCES)], strict=True):
        rows = [*range(start, end), *(range(pairs + start, pairs + end) if name in PAIRED else ())]
        mine = [SEQUENCES[row] for row in rows]
        part = Setting(0.5, labels=batch_of(mine), mask=mask_of(mine), rows=rows)
        states = leaves[0][rows, : part.labels.shape[1]]
        parts.append(ours(name, [states, *leaves[1:]], part, part.original(name, torch.float64)))
    assert sum(part.item() for part in parts) == pytest.approx(total.item(), rel=1e-12)
    assert_gradients_close(gradients_of(torch.stack(parts).sum(), leaves), gradients_of(total, leaves), 1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_more_padding_changes_nothing(name: str) -> None:
    wide = Setting(0.5, labels=batch_of(SEQUENCES, width=13), mask=mask_of(SEQUENCES, width=13))
    width = H if OBJECTIVES[name].hidden else V
    states = torch.full((*wide.labels.shape, width), 50.0)
    narrow = random(*LABELS.shape, width)
    states[:, : LABELS.shape[1]] = narrow
    states[:, LABELS.shape[1] :, 3] = -50.0
    a = ours(name, [states], wide, wide.original(name, torch.float32))
    b = ours(name, [narrow], Setting(0.5), Setting(0.5).original(name, torch.float32))
    assert a.item() == pytest.approx(b.item(), rel=1e-6)


@pytest.mark.parametrize("name", FROM_TOKENS)
@pytest.mark.parametrize("alone", [SEQUENCES[1], SEQUENCES[4]])
def test_a_sequence_without_predicted_tokens_moves_nothing(name: str, alone: list[int | None]) -> None:
    """Its term is finite, its gradient 0, and it adds no token to the mean."""
    rows = [alone] * (2 if name in PAIRED else 1)
    setting = Setting(0.5, labels=batch_of(rows), mask=mask_of(rows), rows=[1, 4][: len(rows)])
    leaves = leaves_of("hidden", setting.labels, torch.float32)
    term = ours(name, leaves, setting, setting.original(name, torch.float32))
    assert torch.isfinite(term)
    assert all((gradient == 0).all() for gradient in gradients_of(term, leaves))
    if OBJECTIVES[name].normalize_by == "token":
        assert term == 0 and count(name, setting) == 0


@pytest.mark.parametrize("beta", BETAS)
def test_npo_at_the_reference_is_the_gradient_of_ascent(beta: float) -> None:
    """Where nll = nll_ref the loss is (2/beta) log 2 and its gradient that of -nll, whatever beta."""
    setting = Setting(beta, labels=batch_of(SEQUENCES[:1]), mask=mask_of(SEQUENCES[:1]))
    logits = logits_for(setting.labels, dtype=torch.float64).requires_grad_()
    reference = token_losses(logits.detach(), setting.labels).sum(1)
    loss = ours("npo", [logits], setting, reference)
    assert loss.item() == pytest.approx(2 / beta * math.log(2), rel=1e-12)
    ascent = gradients_of(-token_losses(logits, setting.labels).sum(), [logits])
    assert_gradients_close(gradients_of(loss, [logits]), ascent, 1e-10)


def terms_of(states: Tensor, labels: Tensor, original: Tensor | None, beta: float, delta: float = 0.0) -> LossInputs:
    return LossInputs(labels, torch.ones_like(labels), beta, delta, token_losses=states, reference=original)


@pytest.mark.parametrize("name", ["npo", "simnpo", "dpo"])
def test_a_long_way_from_the_margin_the_loss_stays_finite(name: str) -> None:
    """log σ at ±10⁴: 0 once forgotten, linear (2 |margin|) before."""
    got = []
    for margin in (1e4, -1e4):
        losses, labels = torch.tensor([[margin, 0.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 1]])
        rows = 2 if name == "dpo" else 1
        original = None if name == "simnpo" else torch.zeros(rows)
        got.append(OBJECTIVES[name].terms(terms_of(losses[:rows], labels[:rows], original, 2.0)).item())
    assert got == pytest.approx([0.0, 2e4])


def test_simnpos_margin_is_inside_the_bracket() -> None:
    """-(2/β) log σ(β (nll/|x| - δ)): at nll/|x| = δ the value does not depend on δ, and it is not the token sum."""
    for delta in (0.5, 2.0):
        losses, labels = torch.tensor([[delta, delta, delta, 0.0]]), torch.tensor([[1, 1, 1, 1]])
        got = OBJECTIVES["simnpo"].terms(terms_of(losses, labels, None, 0.7, delta)).item()
        assert got == pytest.approx(2 / 0.7 * math.log(2), rel=1e-6)


def test_dpo_raises_the_second_half_and_lowers_the_first() -> None:
    losses = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]], requires_grad=True)
    labels = torch.ones(4, 2, dtype=torch.int64)
    loss = OBJECTIVES["dpo"].terms(terms_of(losses, labels, losses.detach().sum(1), 0.3))
    assert loss.item() == pytest.approx(2 * 2 / 0.3 * math.log(2), rel=1e-6)
    (gradient,) = gradients_of(loss, [losses])
    assert gradient[:, 0].tolist() == pytest.approx([-1.0, -1.0, 1.0, 1.0])


def test_wga_leaves_alone_what_is_forgotten() -> None:
    """The weight p^β is not differentiated: the gradient in the NLL is -p^β, not -p^β (1 - β nll)."""
    losses = torch.tensor([[0.1, 2.0, 50.0, 0.0]], requires_grad=True)
    loss = OBJECTIVES["wga"].terms(terms_of(losses, torch.ones(1, 4, dtype=torch.int64), None, 0.5))
    (gradient,) = gradients_of(loss, [losses])
    assert gradient[0, :3].tolist() == pytest.approx([-math.exp(-0.05), -math.exp(-1.0), -math.exp(-25.0)], rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ERRORS)
def test_kl_at_the_original_is_zero_and_so_is_its_gradient(way: str, dtype: torch.dtype) -> None:
    leaves = leaves_of(way, LABELS, dtype)
    original = exactly(leaves)[1].detach().to(dtype)
    loss = ours("kl", leaves, Setting(1.0), original)
    rounding = 1e-13 if dtype == torch.float64 else 1e-5
    assert abs(loss.item()) < rounding
    assert all(gradient.abs().max() < rounding for gradient in gradients_of(loss, leaves))


@pytest.mark.parametrize("chunk", [1, 3 * V, 2**24])
@pytest.mark.parametrize("dtype", ERRORS)
def test_entropies_equal_the_formula(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(objectives, "_CHUNK", chunk)
    logits = logits_for(LABELS, dtype=dtype)
    want = per_prediction(logits, LABELS, lambda log_p, *_: -(log_p.exp() @ log_p))
    predicted = shifted(LABELS) != IGNORED
    got = entropies(logits, LABELS)
    assert got.dtype == torch.promote_types(dtype, torch.float32) and (got[~predicted] == 0).all()
    flat = torch.stack([x for row in want for x in row])
    torch.testing.assert_close(got[predicted].double(), flat, rtol=ERRORS[dtype][0], atol=ERRORS[dtype][0])


def test_a_small_beta_is_not_lost_in_the_dtype_of_the_originals_logits() -> None:
    """At 20 the next number of bf16 is 20.125: UNDIAL's target would not move if beta were taken off there."""
    labels, logits = torch.tensor([[0, 1]]), torch.tensor([[[20.0, 20.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    states = torch.zeros(1, 2, 2, requires_grad=True)
    token_losses(states, labels, teacher_logits=logits, logit_penalty=0.05).sum().backward()
    q = 1 / (1 + math.exp(0.05))  # of the token, lowered
    assert states.grad is not None
    torch.testing.assert_close(states.grad[0, 0].tolist(), [q - 0.5, 0.5 - q], rtol=1e-4, atol=0)


def test_the_steering_vector_is_what_the_seed_says() -> None:
    vector = steering_vector(64, 20.0, seed=4)
    assert vector.norm().item() == pytest.approx(20.0, rel=1e-6) and (vector >= 0).all()
    assert torch.equal(vector, steering_vector(64, 20.0, seed=4))
    assert not torch.equal(vector, steering_vector(64, 20.0, seed=5))


def test_what_each_objective_asks_and_counts() -> None:
    def where(what: Callable[[Any], bool]) -> set[str]:
        return {name for name, objective in OBJECTIVES.items() if what(objective)}

    assert where(lambda o: o.reference == "log_probs") == {"npo", "dpo", "dpo_idk"}
    assert where(lambda o: o.reference == "logits") == {"undial", "kl"} and where(lambda o: o.logit_penalty) == {
        "undial"
    }
    assert where(lambda o: o.reference == "hidden") == {"embed_diff"}
    assert where(lambda o: o.hidden) == where(lambda o: o.normalize_by == "position") == {"rmu", "embed_diff"}
    assert where(lambda o: o.normalize_by == "sequence") == {"npo", "simnpo", "dpo", "dpo_idk"}
    assert {name: o.pairing for name, o in OBJECTIVES.items() if o.pairing} == {
        "dpo": "preferred", "dpo_idk": "refusal", "idk": "refusal"
    }  # fmt: skip
    assert {name for name, o in OBJECTIVES.items() if o.num_answers == 2} == set(PAIRED)
