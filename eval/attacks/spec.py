"""What eval.robustness does to a model: the attacks, what each asks before and after, and carrying one out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from eval.attacks.relearn import Row
from eval.loading import Trust, is_model

Metrics = dict[str, float]


ATTACKS = ("relearn", "retain", "int8", "int4", "probes")


FRACTION = 0.1  # of the groups of the forget corpus that are learned again


@dataclass(frozen=True)
class Plan:
    """What the attacks of one command share."""

    run: Path
    config: dict[str, Any]  # the run's, resolved
    suite: str
    module: ModuleType
    probes: Any  # all of the suite
    group: str | None  # the column that the user named
    steps: int
    lr: float
    seed: int
    overrides: tuple[str, ...]
    ranks: int
    batch_size: int
    folder: Path  # of corpora and trained models
    trust: Trust

    @property
    def final(self) -> Path:
        return self.run / "final"

    @property
    def original(self) -> Path | None:
        """The model that was to be unlearned, where it is a folder here."""
        folder = Path(self.config["model"]["path"]).expanduser()
        return folder if is_model(folder) else None


@dataclass(frozen=True, eq=False)  # known by identity, so that what it found is found once (`Evaluator`)
class EvalSpec:
    """What a model is asked: probes of the suite, and documents whose likelihood is taken under the name `nll`."""

    probes: Any
    documents: tuple[Row, ...] = ()
    nll: str = "forget_nll"


@dataclass(frozen=True)
class Attack:
    """One attack: what training it needs, how weights are rounded, and what is asked."""

    name: str
    settings: dict[str, Any]
    exam: EvalSpec
    plain: EvalSpec | None = None  # asked before, where `exam` is itself the attack
    corpus: dict[str, Any] | None = None  # the `data.retain` to train on
    rows: tuple[Row, ...] = ()  # to be written at its path, where it is no corpus of the run
    bits: int | None = None
    told: dict[str, Any] | None = None  # of what was chosen, for the file
