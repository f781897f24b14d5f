"""Every rule on shards: what each makes of the gradients of an engine, beside whole gradients of autograd.

One pass a step serves all rules, because the weights stay as they are. That an engine then steps with what was
written is the subject of test_stages.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.synthesis import State, synthesize
from pipeline.synthesis.combine import units_of
from pipeline.synthesis.rules import RULES, Options
from pipeline.zero.combiner import layer_of
from tests import toy
from tests.distributed import run_distributed
from tests.pipeline.zero.stages import CONFIGURATIONS
from tests.toy import ALPHA, BATCH, GAMMA, Case

STEPS = 2
OPTIONS = Options(preference=0.6, c=0.4, seed=11)
WAYS = [(rule, scope) for rule in RULES for scope in RULES[rule].scopes]
FEW = [(rule, scope) for rule, scope in WAYS if scope in (RULES[rule].scope, "element")]


def whole_gradients(case: Case, world: int) -> list[dict[str, dict[str, Tensor]]]:
    """[step] task -> name -> gradient, of one process."""
    model = toy.model_of(case)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for step in range(STEPS):
        tasks: dict[str, dict[str, Tensor]] = {}
        for task in ("forget", "retain"):
            parts = [part for ranks in toy.chunks_of(case, step, task, world) for part in ranks]
            loss = torch.stack([model(x, task, early, step % 2 == 0) / BATCH for x, early in parts]).sum()
            made = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            tasks[task] = dict(zip(parameters, made, strict=True))
        found.append(tasks)
    return found


def combine_on_engine(cases: dict[str, Case], ways: list[tuple[str, str]], file: str) -> None:
    """Save [case, rule, scope, step] -> name -> the whole combined gradient; without step the state at the end."""
    import torch.distributed as dist

    from pipeline.distributed import process_group
    from pipeline.synthesis.combine import Synthesis
    from pipeline.zero.combiner import GradientCombiner

    process_group.start()
    rank, world, made = dist.get_rank(), dist.get_world_size(), {}

    def whole(combiner: Any, slices: list[Tensor]) -> dict[str, Tensor]:
        flat, found = torch.cat([part.flatten().cpu() for part in slices]), torch.zeros(sum(combiner.sizes))
        tensors = dict(zip(combiner.names, found.split(combiner.sizes), strict=True))
        for fragment in combiner.average_layout():
            values = flat[fragment.flat_offset :][: fragment.numel]
            tensors[fragment.name][fragment.param_offset :][: fragment.numel] = values
        dist.all_reduce(found)
        found /= world if combiner.store.replicated else 1
        return tensors

    for name, case in cases.items():
        engine = toy.engine_of(case, toy.model_of(case))
        base = GradientCombiner(engine, Synthesis("sago"), combine_tasks=True)
        combiners = {}
        for rule, scope in ways:
            synthesis = Synthesis(rule, scope, ALPHA, GAMMA, options=OPTIONS)
            combiners[rule, scope] = GradientCombiner(engine, synthesis, combine_tasks=True)
        for step in range(STEPS):
            base.clear()
            for task in ("forget", "retain"):
                for parts in toy.chunks_of(case, step, task, world):
                    tokens, early = parts[rank]
                    loss = engine(tokens, task, early, step % 2 == 0) * world / BATCH
                    engine.backward(loss, scale_wrt_gas=False)
                if task == "forget":
                    base.stash_forget()
            slices = base.store.reduce()
            retain = [part.clone() for part in slices]
            for (rule, scope), combiner in combiners.items():
                for part, kept in zip(slices, retain, strict=True):
                    part.copy_(kept)
                combiner.is_stashed = True
                combiner.stash.copy_(base.stash)  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(combiner.store, "reduce", lambda slices=slices: slices)
                    patch.setattr(combiner.store, "write_back", lambda slices: None)
                    combiner.combine()
                made[name, rule, scope, step] = whole(combiner, slices)
        for way, combiner in combiners.items():
            made[name, *way] = combiner.cosines(), combiner.state.step
        engine.destroy()
    if rank == 0:
        torch.save(made, file)


def check(cases: dict[str, Case], ways: list[tuple[str, str]], world: int, folder: Path) -> None:
    run_distributed(combine_on_engine, world, cases, ways, str(folder / "made.pt"), timeout=900)
    made = torch.load(folder / "made.pt", weights_only=False)
    for name, case in cases.items():
        gradients = whole_gradients(case, world)
        for rule, scope in ways:
            names, state, average = [""], State(), [torch.zeros_like(r) for r in gradients[0]["retain"].values()]
            for step, tasks in enumerate(gradients):
                names = list(tasks["retain"])
                f, r = ([tasks[task][n] for n in names] for task in ("forget", "retain"))
                if RULES[rule].draws:  # numbered as in the model, of which the frozen tensors are a part
                    f, r, names = with_frozen(case, tasks)
                keys: dict[str, Any] = {"layers": [layer_of(n) for n in names], "options": OPTIONS, "state": state}
                if RULES[rule].averages_retain:
                    keys["average"] = average
                want = synthesize(f, r, rule=rule, scope=scope, alpha=ALPHA, gamma=GAMMA, **keys)
                size = sum(w.square().sum() for w in want) ** 0.5
                for n, whole in zip(names, want, strict=True):
                    if n in made[name, rule, scope, step]:
                        error = (made[name, rule, scope, step][n] - whole.flatten()).norm()
                        assert error <= 2e-5 * size, (name, rule, scope, step, n, error / size)
            cosines, steps = made[name, rule, scope]
            assert steps == STEPS
            units = units_of(scope, [layer_of(n) for n in names])
            for n, unit in zip(names, units, strict=True) if state.cosines else ():
                assert cosines[n] == pytest.approx(state.cosines[unit], abs=1e-5)


def with_frozen(case: Case, tasks: dict[str, dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor], list[str]]:
    sizes = {name: p.detach() for name, p in toy.model_of(case).named_parameters()}
    f, r = ([tasks[task].get(n, torch.zeros_like(p)) for n, p in sizes.items()] for task in ("forget", "retain"))
    return f, r, list(sizes)


def test_each_rule_writes_what_it_makes_of_whole_gradients(tmp_path: Path) -> None:
    check({name: Case(zero=CONFIGURATIONS[name]) for name in ("2", "3-small")}, FEW, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_rule_at_each_scope_on_each_stage(world: int, tmp_path: Path) -> None:
    names = ("0", "1", "2-overlap-small", "2-offload", "2-round-robin", "3", "3-offload-all")
    cases = {name: Case(zero=CONFIGURATIONS[name], micro=4 if world == 3 else 2) for name in names}
    check(cases, WAYS, world, tmp_path)
