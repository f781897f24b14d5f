"""The example of `GradientCombiner` for somebody's own DeepSpeed loop: it runs, and it is what the documents show."""

from __future__ import annotations

import ast
import inspect
import runpy
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import REPOSITORY
from tests import oracle
from tests.distributed import run_distributed

EXAMPLE = REPOSITORY / "docs" / "examples" / "own_loop.py"
STEPS, SIZE, WORLD = 3, 4, 2


class Regression(nn.Module):
    """Returns its loss, as the example wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 1)

    def forward(self, batch: Tensor) -> Tensor:
        """batch: [n, 6], five inputs and a target."""
        return (self.last(torch.tanh(self.first(batch[:, :5]))).squeeze(1) - batch[:, 5]).square().mean()


def batches() -> Tensor:
    """[steps, task, ranks, samples, 6]; the tasks agree here and there, and conflict elsewhere."""
    return torch.randn(STEPS, 2, WORLD, SIZE, 6, generator=torch.Generator().manual_seed(1))


def run_example(file: str) -> None:
    import torch.distributed as dist

    from pipeline.distributed import process_group
    from tests.toy import weights_of

    process_group.start()
    model, train = Regression(), runpy.run_path(str(EXAMPLE))["train"]
    mine = batches()[:, :, dist.get_rank()]
    train(model, torch.optim.SGD(model.parameters(), lr=0.3), [(step[0], step[1]) for step in mine])
    weights = weights_of(model)
    if dist.get_rank() == 0:
        torch.save(weights, file)


def test_the_example_equals_a_loop_on_whole_tensors(tmp_path: Path) -> None:
    run_distributed(run_example, WORLD, str(tmp_path / "weights.pt"))
    model = Regression()
    parameters = dict(model.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    conflicts = set()
    for step in batches():
        f, r = (
            dict(
                zip(
                    parameters,
                    torch.autograd.grad(sign * model(task.flatten(0, 1)), list(parameters.values())),
                    strict=True,
                )
            )
            for sign, task in zip((-1, 1), step, strict=True)
        )
        conflicts |= {oracle.product({name: f[name]}, {name: r[name]}) < 0 for name in parameters}
        combined = oracle.combine("pcgrad", "module", f, r, alpha=1.0, gamma=0.5)
        for name, parameter in parameters.items():
            parameter.grad = combined[name]
        nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
    assert conflicts == {True, False}
    made = torch.load(tmp_path / "weights.pt")
    assert oracle.weight_change_error(made, {name: p.detach() for name, p in parameters.items()}, start) < 2e-5


def run_without(line: str, stages: list[int], needed: str) -> None:
    """On every rank: the example without one of its lines, whose gradients would not be those of the two tasks."""
    import pytest
    import torch.distributed as dist

    from pipeline.distributed import process_group

    process_group.start()
    mine = [(step[0], step[1]) for step in batches()[:, :, dist.get_rank()]]
    source = EXAMPLE.read_text()
    assert line in source
    for stage in stages:
        names: dict[str, Any] = {"__name__": "example"}
        exec(source.replace(line, "pass").replace('"stage": 3', f'"stage": {stage}'), names)
        model = Regression()
        with pytest.raises(RuntimeError, match=needed):
            names["train"](model, torch.optim.SGD(model.parameters(), lr=0.3), mine)


def test_a_loop_that_leaves_a_call_out_is_told_which() -> None:
    """Without a stashed forget gradient the buffer holds whatever was in that memory, or that of the step before."""
    for call in ("clear", "stash_forget"):
        run_distributed(run_without, WORLD, f"combiner.{call}()", [0, 1, 2, 3], rf"^combiner\.{call}\(\) must come")


def test_the_docstring_shows_the_example() -> None:
    from pipeline.zero.combiner import GradientCombiner

    source = EXAMPLE.read_text(encoding="utf-8")
    (function,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    body = source.splitlines()[function.body[1].lineno - 1 : function.end_lineno]  # but for its docstring
    shown = textwrap.dedent("\n".join(body))
    assert len(shown.splitlines()) <= 10
    assert textwrap.indent(shown, " " * 4) in inspect.cleandoc(GradientCombiner.__doc__ or "")
