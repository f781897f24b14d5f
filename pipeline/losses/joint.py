"""The losses of two tasks from one forward pass, and the check that its backward pass separates their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.batches import Batch
from pipeline.distributed.errors import raise_on_all_ranks
from pipeline.errors import InputError
from pipeline.losses.task import Task
from pipeline.modeling.outputs import JointLosses, ModelEngine, TokenLosses, forward_jointly
from pipeline.modeling.row_rules import REMEDY
from pipeline.zero.joint import JointPass


def accumulate_jointly(
    engine: ModelEngine, joint: JointPass, forget: Task | None, retain: Task | None, step: int
) -> dict[str, Tensor | None]:
    """Forward and backward of all micro-batches of `step`, one of each task at a time.

    Returns:
        By task, this rank's part of the mean loss: 0-dim, float64.
    """
    assert forget is not None and retain is not None, "`check_schedule` refuses a run of one task"
    joint.clear()
    tasks = (forget, retain)
    denominators = [max(task.loss_denominator(step), 1) for task in tasks]
    # DeepSpeed averages over ranks; the losses are means over the global batch, so the world size goes back in.
    weights = [joint.combiner.loss_weight(task.name) * engine.world_size for task in tasks]
    scales = torch.tensor([weight / count for weight, count in zip(weights, denominators, strict=True)])
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for pair in zip(*(task.sampler.batches(step) for task in tasks), strict=True):
        batches = [batch.to(engine.device) for batch in pair]
        with joint.rows_of(*(len(batch.input_ids) for batch in batches)):
            terms = joint_terms(engine, joint, tasks, batches)
            engine.backward(terms @ scales.to(terms), scale_wrt_gas=False)
        totals += terms.detach()
    joint.complete()
    return {task.name: total / count for task, total, count in zip(tasks, totals, denominators, strict=True)}


def joint_terms(engine: ModelEngine, joint: JointPass, tasks: Sequence[Task], batches: Sequence[Batch]) -> Tensor:
    """[2] the `loss_terms` of each task on its own batch, from one forward pass, forget first."""
    references = [task.reference_output(batch) for task, batch in zip(tasks, batches, strict=True)]
    wanted = [task.losses_wanted(reference) for task, reference in zip(tasks, references, strict=True)]
    (forget, retain), (of_forget, of_retain) = batches, wanted
    losses = forward_jointly(engine, forget, retain, JointLosses(of_forget, of_retain, joint.divert))
    given = zip(tasks, batches, references, losses, strict=True)
    return torch.stack([task.terms_of(batch, reference, found) for task, batch, reference, found in given])


def check_separation(engine: ModelEngine, joint: JointPass) -> None:
    """Compare both gradients with zero after a backward pass of one task alone, exactly. Every rank must call.

    It finds what no rule can know: a module that mixes rows (experts that get tokens of both tasks together), or code
    that reads the parameter of another module.

    Raises:
        InputError: the loss of one task reaches the gradient of the other.
    """
    combiner = joint.combiner
    if combiner.stash is None:
        return
    # The rows differ, and the tokens of the last are all alike. A module that gets what a router sends it gets all of
    # that row or none: so it has a third of its tokens from there only if it has all tokens, or none.
    tokens = torch.arange(8, device=engine.device)
    forget, retain = _batch_of(torch.stack([tokens, tokens.flip(0)])), _batch_of(torch.zeros_like(tokens).unsqueeze(0))
    wanted = JointLosses(TokenLosses(), TokenLosses(), joint.divert)
    for task in ("forget", "retain"):
        combiner.clear()
        joint.clear()
        with raise_on_all_ranks(), joint.rows_of(2, 1):
            losses = forward_jointly(engine, forget, retain, wanted)
            own, other = losses if task == "forget" else reversed(losses)
            engine.backward(own.sum() + 0.0 * other.sum(), scale_wrt_gas=False)
        joint.complete()
        slices = combiner.store.reduce() if task == "forget" else combiner.stash_slices()
        reached = torch.zeros(len(combiner.names), device=engine.device)
        for (row, _), gradient in zip(combiner.store.layout, slices, strict=True):
            reached[row] += gradient.count_nonzero().to(engine.device)
        dist.all_reduce(reached)
        if reached.any():
            culprit = combiner.names[int(reached.argmax())]
            raise InputError(
                f"train.schedule: joint cannot separate the gradients of the two tasks in {culprit}: the {task} loss "
                f"reaches both, through a module that mixes rows or reads another's parameters; {REMEDY}"
            )
    combiner.clear()


def _batch_of(tokens: Tensor) -> Batch:
    """[B, T] tokens, all predicted."""
    return Batch(torch.arange(len(tokens)), tokens, torch.ones_like(tokens), tokens)
