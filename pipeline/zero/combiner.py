"""Two gradients where DeepSpeed has room for one, on every ZeRO stage (`store.py` hides what differs between them).

All micro-batches of one task are accumulated before its gradient is read. Then DeepSpeed has this rank's share of the
complete gradient. The forget share is copied to the forget buffer, the retain share accumulates in its place, and the
combination is written back where `engine.step()` reads the gradient. No gradient is gathered; what crosses the network
is one table of 10 numbers per parameter (13 under Adam's metric), and the histogram of a confinement.

DeepSpeed runs in managed mode and no backward is ever its accumulation boundary: `stash_forget` and `combine` are. So
it never matters which tensors the last micro-batch happens to touch, and an `engine.step()` without `combine` updates
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import InputError
from pipeline.synthesis.adam import AdamState
from pipeline.synthesis.combine import State, Synthesis, units_of
from pipeline.synthesis.confine import Confined, Confinement
from pipeline.synthesis.geometry import Geometry
from pipeline.synthesis.partition import Piece
from pipeline.synthesis.windows import copy_all_, join_neighbours
from pipeline.zero.compat import unexpected
from pipeline.zero.engine import Engine
from pipeline.zero.optimizer_state import Fragment
from pipeline.zero.optimizers import check_confined
from pipeline.zero.stages import gradient_store
from pipeline.zero.tensor_parallel import copies, group_size


class Combined(NamedTuple):
    """What `combine` found."""

    geometry: Geometry | None  # None if the two gradients were added up without being compared
    should_step: bool  # False: a gradient is non-finite, on some rank; no rank may step


class GradientCombiner:
    """The gradients of one step, sharded as DeepSpeed shards them.

    This is a public class: use it in a DeepSpeed loop of your own (docs/examples/own_loop.py has the configuration).

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
        combiner = GradientCombiner(engine, Synthesis("pcgrad", gamma=0.5), combine_tasks=True)
        for forget, retain in batches:
            combiner.clear()
            engine.backward(-engine(forget), scale_wrt_gas=False)  # or several micro-batches
            combiner.stash_forget()
            engine.backward(engine(retain), scale_wrt_gas=False)
            if combiner.combine().should_step:  # False, on all ranks, if a gradient is not finite
                engine.step()

    With `combine_tasks=False` (one task, or the rule `sum`) both tasks accumulate into DeepSpeed's own buffers, and
    there is no forget buffer; multiply each loss with `loss_weight` then.

    Args:
        engine: what `deepspeed.initialize` returns first, of ZeRO stage 0 to 3, with or without offload.
        synthesis: the rule, its scope and its weights.
        stash_device: where the forget buffer lies: beside the gradient (`device`), or in pinned memory of the machine
            (`host`), from where it crosses the bus in bounded parts.
        confinement: which elements may move; the tasks must be combined. None: all.
        measure_update: `combine` leaves the retain gradient in the forget buffer, which is free by then, so that
            `update.update_sums` can compare it with what the step makes of the combination.

    Attributes:
        stash: [n] the forget gradient of this rank, all slices one after another, in the dtype in which DeepSpeed
            accumulates. None if the tasks are not combined.
        average: [n] laid out alike: the state of a rule that averages the retain gradient, else None.
        mean_square: [n] float32, laid out alike: the state of a confinement by the mean square, else None.
        share_updated: of the elements, how many could move in the last step; 1 without a confinement.
        state: what the rule remembers beside it, alike on all ranks.
        retain_weight: factor of the retain loss beside the weights of `synthesis`; checkpoints have it.

    Raises:
        RuntimeError: DeepSpeed does not keep its gradients where this program expects them.
        ValueError: the metric `adam` or a confinement, where a rank does not have Adam's state of its gradient; a
            confinement of an optimizer with weight decay or of SGD with momentum, which move all weights, or of a rule
            that averages the retain gradient.
    """

    def __init__(
        self,
        engine: Engine,
        synthesis: Synthesis,
        *,
        combine_tasks: bool,
        stash_device: Literal["device", "host"] = "device",
        confinement: Confinement | None = None,
        measure_update: bool = False,
    ) -> None:
        self.engine = engine
        self.synthesis = synthesis
        if not engine.managed_gradient_accumulation():
            raise unexpected("managed_gradient_accumulation is off, so the boundary cannot be set")
        self.store = gradient_store(engine)
        if (synthesis.metric == "adam" or confinement is not None) and self.store.masters() is None:
            raise ValueError(
                "the metric adam and a confinement need Adam's state of each element whose gradient a rank has, which "
                "it does not under ZeRO stage 1 in bf16 and offload to nvme: use stage 2, or offload to the CPU"
            )
        if confinement is not None:
            check_confined(synthesis, self.store.inner, combine_tasks)
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.store.parameters]
        self.sizes = [int(getattr(p, "ds_numel", p.numel())) for p in self.store.parameters]  # of whole parameters
        self.group, self.copies = group_size(engine), copies(engine, self.store.parameters)
        if self.group > 1 and synthesis.rule == "graddrop":
            raise InputError(
                "synthesis.rule: graddrop draws by an element's number in the model, which differs where tensors are "
                "cut (tensor_parallel of the DeepSpeed file); choose another rule"
            )
        if self.group > 1 and confinement is not None:
            raise InputError(
                "synthesis.confine counts the elements of the model, and each rank of a tensor-parallel group has some "
                "of them too (tensor_parallel of the DeepSpeed file); leave one of the two out"
            )
        self.units = units_of(synthesis.resolved_scope, [layer_of(name) for name in self.names])
        self.stash: Tensor | None = None
        self.is_stashed = False  # whether the forget gradient of this step is in it
        self.average: Tensor | None = None
        self.mean_square: Tensor | None = None
        self.confinement, self.share_updated = confinement, 1.0
        self.retain_weight = 1.0
        self.measures_update = measure_update
        self.rates: list[float] = []  # of the parameter groups, in the step after the last `combine`
        if combine_tasks:
            self.stash = self._make_buffer(self.store.dtype, stash_device)
            if synthesis.averages_retain:
                # Without the loss scale an average in fp16 would underflow.
                dtype = torch.float32 if self.store.dtype == torch.float16 else self.store.dtype
                self.average = self._make_buffer(dtype, stash_device).zero_()
            if confinement is not None and confinement.has_state:
                self.mean_square = self._make_buffer(torch.float32, stash_device).zero_()
        self.state = State(cosines=[0.0] * (max(self.units, default=-1) + 1))
        whole = {names[id(p)]: int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters()}
        first = dict(zip(whole, accumulate(whole.values(), initial=0), strict=False))
        places = zip(self.store.layout, self.store.starts, strict=True)
        self.starts = [first[self.names[row]] + start for (row, _), start in places]  # numbers of elements in the model
        self.table: Tensor | None = None  # after `combine`: the sums that describe the step, by parameter
        self.scale = 1.0  # in fp16: of the gradients that those sums are of

    def _make_buffer(self, dtype: torch.dtype, stash_device: str) -> Tensor:
        """[n], not initialised: one element for each of this rank's gradient."""
        numel = sum(size for _, size in self.store.layout)
        if stash_device == "host" and self.store.device.type == "cuda":
            return torch.empty(numel, dtype=dtype, pin_memory=True)
        return torch.empty(numel, dtype=dtype, device=self.store.device)

    def loss_weight(self, task: str) -> float:
        """The factor for the loss of `task`: `retain_weight`, times its weight where gradients are only added up."""
        own = self.retain_weight if task == "retain" else 1.0
        if self.stash is not None:
            return own
        return own * (self.synthesis.gamma if task == "forget" else self.synthesis.alpha)

    def clear(self) -> None:
        """Zero the gradient, wherever DeepSpeed keeps a part of it. A step begins with it."""
        self.is_stashed = False
        self.engine.set_gradient_accumulation_boundary(False)
        self.store.clear()

    def stash_forget(self) -> None:
        """Complete the forget gradient, copy it to the forget buffer, and make room for the retain gradient.

        Does nothing if the two are only added up.

        Raises:
            RuntimeError: the step did not begin with `clear`.
        """
        self._refuse_uncleared()
        if self.stash is not None:
            gradients = join_neighbours(self.store.reduce())  # what follows the copy is queued behind it
            copy_all_(self.stash.split([gradient.numel() for gradient in gradients]), gradients)
            self.clear()
            self.is_stashed = True

    def _refuse_uncleared(self) -> None:
        """DeepSpeed would have taken each backward pass for the last one of its step."""
        if self.engine.is_gradient_accumulation_boundary():
            raise RuntimeError("combiner.clear() must come before the first backward pass of every step, and did not")

    def combine(self) -> Combined:
        """Replace the retain gradient by the combination.

        One all-reduce of 10 or 13 float64 per parameter, whatever their sizes. Every rank gets the same result. No rank
        should step if either gradient is non-finite. (fp16: all ranks step all the same, with a gradient that DeepSpeed
        recognises as an overflow, so that it skips the update and lowers its loss scale.)

        Raises:
            RuntimeError: the step did not begin with `clear`, or has no forget gradient in the forget buffer.
        """
        if self.stash is None:
            self._refuse_uncleared()
        elif not self.is_stashed:
            raise RuntimeError(
                "combiner.stash_forget() must come between the backward passes of the forget task and those of the "
                "retain task, and did not: there is no forget gradient to combine"
            )
        slices = self.store.reduce()
        geometry = None
        if self.stash is not None:
            rows = [row for row, _ in self.store.layout]
            averages = [None] * len(rows) if self.average is None else self._cut(self.average)
            self.scale, self.rates = self.store.loss_scale, [group["lr"] for group in self.store.inner.param_groups]
            uses_adam = self.synthesis.metric == "adam" or self.confinement is not None
            states = self.store.adam() if uses_adam else None
            if self.confinement is not None:
                self._confine(self.confinement, slices, states)
            adam = [None] * len(rows) if states is None else states
            parts = zip(rows, self.stash_slices(), slices, averages, self.starts, adam, strict=True)
            pieces = [Piece(*part) for part in parts]
            self.table = self.synthesis.combine_(
                pieces, self.units, self._add_up, self.scale, self.state, keep_retain=self.measures_update
            )
            geometry = Geometry.of(self.table, self._elements(range(len(self.sizes))), self.scale)
        finite = self._all_finite(slices) if geometry is None else geometry.finite
        if not finite and self.engine.fp16_enabled():
            for gradient in slices[:1]:
                gradient[0] = torch.nan
        should_step = finite or bool(self.engine.fp16_enabled())
        if should_step:
            self.store.write_back(slices)
            self.engine.set_gradient_accumulation_boundary(True)
        return Combined(geometry, should_step)

    def _confine(self, confinement: Confinement, slices: list[Tensor], states: list[AdamState] | None) -> None:
        """Zero both gradients and Adam's momentum outside of the share that may move."""
        rows, absent = [row for row, _ in self.store.layout], [None] * len(slices)
        squares = absent if self.mean_square is None else self._cut(self.mean_square)
        momenta = absent if states is None else [state.first for state in states]
        parts = zip(rows, self.stash_slices(), slices, squares, momenta, strict=True)
        pieces = [Confined(*part) for part in parts]
        self.share_updated = confinement.confine_(pieces, sum(self.sizes), self._count_up, self.scale)

    def average_layout(self) -> list[Fragment]:
        """The fragments of parameters in `average` and `mean_square` on this rank."""
        layout, flat_offset = [], 0
        for (row, size), start in zip(self.store.layout, self.store.starts, strict=True):
            numel = max(min(size, self.sizes[row] - start), 0)  # what is beyond the parameter's end is padding
            layout.append(Fragment(self.names[row], start, numel, flat_offset))
            flat_offset += size
        return layout

    def cosines(self) -> dict[str, float]:
        """The mean cosine of each parameter's unit, by name: another number of ranks may order parameters anew."""
        return {name: self.state.cosines[unit] for name, unit in zip(self.names, self.units, strict=True)}

    def restore(self, step: int, cosines: dict[str, float]) -> None:
        """Set the state to that after `step` combinations, when `cosines` returned this."""
        self.state.step = step
        for name, unit in zip(self.names, self.units, strict=True):
            self.state.cosines[unit] = cosines[name]

    def by_layer(self) -> dict[str, Geometry]:
        """The geometry of the last `combine` for each decoder block, the embedding, the head; empty if it had none."""
        if self.table is None:
            return {}
        return {
            layer: Geometry.of(self.table[rows], self._elements(rows), self.scale)
            for layer, rows in self.rows_by_layer().items()
        }

    def rows_by_layer(self) -> dict[str, list[int]]:
        """The indices of the parameters of each decoder block, the embedding, the head."""
        members: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            members.setdefault(layer_of(name), []).append(row)
        return members

    def stash_slices(self) -> list[Tensor]:
        """Views of the forget buffer, one for each slice of the store's layout; none without a buffer."""
        return [] if self.stash is None else self._cut(self.stash)

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat`, one a slice."""
        return list(flat.split([size for _, size in self.store.layout]))

    def _add_up(self, table: Tensor) -> None:
        """Sum over ranks, in place. A gradient that several ranks have counts once, and all still decide alike."""
        total = table.to(self.engine.device)  # offloaded gradients are summed on the CPU, which NCCL cannot reduce
        dist.all_reduce(total)
        if self.store.replicated:
            total /= dist.get_world_size() // self.group
        if self.group > 1:
            total /= torch.tensor(self.copies, device=total.device)[:, None]
        table.copy_(total)

    def _elements(self, rows: Iterable[int]) -> int:
        """Of the whole parameters of these rows; under tensor parallelism a rank has parts."""
        return sum(self.sizes[row] * self.group // self.copies[row] for row in rows)

    def _count_up(self, counts: Tensor) -> None:
        """Sum over ranks, in place. An element that every rank has counts once."""
        total = counts.to(self.engine.device)
        dist.all_reduce(total)
        counts.copy_(total // dist.get_world_size() if self.store.replicated else total)

    def _all_finite(self, slices: list[Tensor]) -> bool:
        """Whether `engine.step()` may read this gradient, where no table of sums shows it (no forget buffer)."""
        if self.store.optimizer_checks_overflow:
            return True  # engine.step() checks by itself
        bad = torch.zeros((), device=self.engine.device)
        for part in join_neighbours(slices):
            bad += torch.isfinite(part).all().logical_not()
        dist.all_reduce(bad)
        return bad.item() == 0


def layer_of(name: str) -> str:
    """The decoder block that a parameter belongs to (`model.layers.3`), or its own module (the embedding, the head)."""
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if block else name.rpartition(".")[0] or name
