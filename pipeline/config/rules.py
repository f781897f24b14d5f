"""What each rule has and reads, checked before torch is loaded. What each computes: `synthesis/rules.py`."""

from __future__ import annotations

from pipeline.config.schema import RunConfig, Synthesis
from pipeline.errors import InputError

AVERAGING = ("bloop", "gru")  # the retain gradient, in one more buffer


def combines_tasks(config: RunConfig) -> bool:
    """Whether the run has two gradients beside each other; else they are added up, or there is one."""
    synthesis = config.synthesis
    compares = synthesis.rule != "sum" or synthesis.geometry or synthesis.confine is not None
    return len(config.tasks) == 2 and compares


def num_averages(synthesis: Synthesis) -> int:
    """Moving averages with a number for each weight: of the retain gradient, and of the forget gradient's square."""
    return (synthesis.rule in AVERAGING) + keeps_mean_square(synthesis)


def keeps_mean_square(synthesis: Synthesis) -> bool:
    return synthesis.confine is not None and synthesis.confine.by == "forget_mean_square"


WHY_NOT_BY_ELEMENT = {
    **dict.fromkeys(("gru", "bloop"), "compares whole gradients"),
    **dict.fromkeys(("conflict_free", "nash_mtl", "auxinash", "aligned_mtl", "gradvac"), "weighs by an angle"),
    "sdmgrad": "compares norms of whole gradients",
}


READERS: dict[str, tuple[str, ...]] = {
    "preference": ("conflict_free", "auxinash", "aligned_mtl", "sdmgrad", "upgrad", "dualproj"),
    "c": ("cagrad",),
    "centre": ("cagrad",),
    "regularization": ("sdmgrad",),
    "new_share": ("gru", "bloop", "gradvac"),
}


WITHOUT_PRODUCTS = ("sum", "graddrop")  # whose weights do not depend on any


def check_rule(synthesis: Synthesis, where: str) -> None:
    """Raises:
    InputError: the rule does not have this scope, does not read a key that is set or the metric, or cannot be confined.
    """
    rule, scope = synthesis.rule, synthesis.scope
    if scope == "element" and rule in WHY_NOT_BY_ELEMENT:
        raise InputError(f"{where}: synthesis.scope: {rule} {WHY_NOT_BY_ELEMENT[rule]}; valid: module, layer, global")
    if rule == "graddrop" and scope not in (None, "element"):
        raise InputError(f"{where}: synthesis.scope: graddrop draws for each element; valid: element")
    if synthesis.metric == "adam" and rule in WITHOUT_PRODUCTS:
        raise InputError(
            f"{where}: synthesis.metric: adam weights the inner products of the two gradients, and {rule} reads none; "
            "remove it, or choose another synthesis.rule"
        )
    if synthesis.confine is not None and rule in AVERAGING:
        raise InputError(
            f"{where}: synthesis.confine: {rule} projects on an average of the retain gradient, which is not 0 where "
            "the update is to be; remove it, or choose another synthesis.rule"
        )
    for key, readers in READERS.items():
        if getattr(synthesis, key) is not None and rule not in readers:
            raise InputError(
                f"{where}: synthesis.{key} is read by {', '.join(readers)} and not by {rule}; remove it, "
                "or choose one of those as synthesis.rule"
            )
