"""What each rule has and reads, checked before torch is loaded. What each computes: `synthesis/rules.py`."""

from __future__ import annotations

from pipeline.config.schema import Synthesis
from pipeline.errors import InputError

AVERAGING = ("bloop", "gru")  # the retain gradient, in one more buffer


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
    InputError: the rule does not have this scope, or does not read a key that is set or the metric.
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
    for key, readers in READERS.items():
        if getattr(synthesis, key) is not None and rule not in readers:
            raise InputError(
                f"{where}: synthesis.{key} is read by {', '.join(readers)} and not by {rule}; remove it, "
                "or choose one of those as synthesis.rule"
            )
