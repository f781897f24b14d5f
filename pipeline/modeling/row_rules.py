"""Rules by which a module's backward pass computes the gradients of two tasks, each from the rows of its own.

They apply to linear layers, embeddings and norms, which treat every row of a batch alike and by itself: the gradient of
a parameter is a sum over rows, and this sum is cut in two. A linear layer's two products have half the rows each, so
they cost what the one product of both tasks costs. Embeddings and norms, which are cheap, run again on each part.

`pipeline/zero/joint.py` has the rest of a joint pass.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError
from pipeline.zero.joint import Divert, TaskRows

REMEDY = "set train.schedule: sequential"


def install_rules(model: nn.Module, rows: TaskRows) -> None:
    """Give each module that owns trained parameters the rule of its kind. `rows` describes when and how it applies.

    To be called before anything else replaces the `forward` of a module.

    Raises:
        InputError: a module owns trained parameters and is of a kind that has no rule.
    """
    owned = {
        name: found
        for name, module in model.named_modules()
        if (found := [p for p in module.parameters(recurse=False) if p.requires_grad])
    }
    modules = dict(model.named_modules())
    ruled = {name: found for name, found in owned.items() if _has_rule(modules[name])}
    uses = Counter(parameter for found in ruled.values() for parameter in found)
    without = [name for name, found in owned.items() if any(parameter not in uses for parameter in found)]
    if without:
        kinds = {type(modules[name]).__name__: name for name in reversed(without)}  # the first of each
        culprits = ", ".join(f"{name} ({kind})" for kind, name in kinds.items())
        raise InputError(
            f"train.schedule: joint has no rule to separate the rows of the two tasks in {culprits}; {REMEDY}, or "
            "freeze these modules (model.trainable, model.lora)"
        )
    rows.shared |= {parameter for parameter, count in uses.items() if count > 1}
    for name, parameters in ruled.items():
        modules[name].forward = _Rule(modules[name], name, parameters, rows)


def _has_rule(module: nn.Module) -> bool:
    return _is_product(module) or isinstance(module, nn.Embedding) or _is_norm(module)


def _is_product(module: nn.Module) -> bool:
    """Subclasses may compute something else."""
    return type(module) in (nn.Linear, Conv1D)


def _is_norm(module: nn.Module) -> bool:
    """transformers has dozens of classes of them, which share no other; none contains a module."""
    return re.search("(RMS|Layer)Norm", type(module).__name__) is not None and not any(module.children())


class _Rule:
    """Stands for the `forward` of a module: the same output, and in a joint pass two gradients of its parameters."""

    def __init__(self, module: nn.Module, name: str, parameters: list[nn.Parameter], rows: TaskRows) -> None:
        self.module, self.name, self.parameters, self.rows = module, name, parameters, rows
        self.plain = module.forward

    def __call__(self, *arguments: object, **options: object) -> object:
        if not self.rows.total or self.rows.divert is None or not torch.is_grad_enabled():
            return self.plain(*arguments, **options)
        leaves, structure = tree_flatten((arguments, options))
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        inputs = [self._one_a_row(leaves[at]) for at in places]
        for at in places:
            leaves[at] = None  # the backward pass has them from autograd

        def plain(*tensors: Tensor) -> object:
            filled = list(leaves)
            for at, tensor in zip(places, tensors, strict=True):
                filled[at] = tensor
            positional, named = tree_unflatten(filled, structure)
            return self.plain(*positional, **named)

        output = _TwoGradients.apply(_Call(self, plain, self.rows), *inputs, *self.parameters)
        if not isinstance(output, Tensor) or any(self.rows.parts(len(one)) is None for one in (*inputs, output)):
            raise InputError(
                f"train.schedule: joint cannot separate the rows of the two tasks in what {self.name} "
                f"({type(self.module).__name__}) reads; {REMEDY}"
            )
        return output

    def _one_a_row(self, tensor: Tensor) -> Tensor:
        """Positions that all rows share, in the batch dimension as the other inputs are."""
        if isinstance(self.module, nn.Embedding) and len(tensor) == 1:
            return tensor.expand(self.rows.total, *tensor.shape[1:])
        return tensor


class _Call:
    """One call of a module: what its backward pass needs beside the tensors that autograd has."""

    def __init__(self, rule: _Rule, plain: Callable[..., object], rows: TaskRows) -> None:
        assert rows.divert is not None
        self.module, self.parameters, self.plain = rule.module, rule.parameters, plain
        self.rows = replace(rows)  # as they are now
        self.divert: Divert = rows.divert

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """[forget rows, retain rows] of `tensor`."""
        parts = self.rows.parts(len(tensor))
        assert parts is not None, "`_Rule` has looked"
        return [tensor[part] for part in parts]


class _Context(Protocol):
    """What autograd carries from forward to backward; torch's own type has no attributes of its user."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    call: _Call

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _TwoGradients(torch.autograd.Function):
    """A call of a module whose backward pass gives autograd the retain gradient, and diverts the forget gradient."""

    @staticmethod
    def forward(ctx: _Context, call: _Call, *tensors: Tensor) -> object:
        """tensors: the inputs of the call, then the trained parameters of the module, which the call reads itself.

        The parameters are not saved: under ZeRO-3 their data is gathered again for the backward pass.
        """
        inputs = tensors[: len(tensors) - len(call.parameters)]
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return call.plain(*inputs)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call, inputs = ctx.call, ctx.saved_tensors
        compute = _product_gradients if _is_product(call.module) else _gradients_by_replay
        found = compute(call, inputs, gradients[0], ctx.needs_input_grad[1 : 1 + len(inputs)])
        for parameter, gradient in zip(call.parameters, found.forget, strict=True):
            call.divert(parameter, gradient)
        return None, *found.inputs, *found.retain


class _Gradients(NamedTuple):
    """Of one call."""

    inputs: list[Tensor | None]  # None where none is wanted
    forget: list[Tensor]  # of the trained parameters, by the forget rows
    retain: list[Tensor]  # likewise, by the retain rows


def _product_gradients(call: _Call, inputs: Sequence[Tensor], output: Tensor, wanted: Sequence[bool]) -> _Gradients:
    """Of y = x W^T + b, or y = x W + b for a Conv1D, with the gradient of y as `output`."""
    (x,), module, dy = inputs, call.module, output.flatten(0, -2)
    assert isinstance(module, nn.Linear | Conv1D)
    is_transposed = isinstance(module, Conv1D)
    dx = (dy @ (module.weight.T if is_transposed else module.weight)).view(x.shape) if wanted[0] else None
    by_task: list[list[Tensor]] = []
    for rows, grads in zip(call.parts(x.flatten(0, -2)), call.parts(dy), strict=True):
        found = [rows.T @ grads if is_transposed else grads.T @ rows] if module.weight.requires_grad else []
        if module.bias is not None and module.bias.requires_grad:
            found.append(grads.sum(0))
        by_task.append(found)
    return _Gradients([dx], *by_task)


def _gradients_by_replay(call: _Call, inputs: Sequence[Tensor], output: Tensor, wanted: Sequence[bool]) -> _Gradients:
    """Of any call, by running it again on the rows of each task: exactly what autograd computes of that task alone."""
    of_inputs: list[list[Tensor]] = []
    of_parameters: list[list[Tensor]] = []
    for *own, upstream in zip(*(call.parts(tensor) for tensor in (*inputs, output)), strict=True):
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(own, wanted, strict=True)]
        with torch.enable_grad():
            again = call.plain(*leaves)
        assert isinstance(again, Tensor)
        sources = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(again, [*sources, *call.parameters], upstream, materialize_grads=True)
        of_inputs.append(list(found[: len(sources)]))
        of_parameters.append(list(found[len(sources) :]))
    joined = iter([torch.cat(pair) for pair in zip(*of_inputs, strict=True)])
    return _Gradients([next(joined) if want else None for want in wanted], *of_parameters)
