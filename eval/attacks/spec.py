"""The attacks of eval.robustness as data: what they share, what each evaluates, and what each trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eval.attacks.quantize import ROUNDINGS
from eval.attacks.relearn import Row
from eval.loading import Trust, is_model
from eval.suites import Probes, Suite
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Metrics = dict[str, float]
Measure = Callable[["PreTrainedModel", "PreTrainedTokenizerBase"], Metrics]


BY_DEFAULT = ("relearn", "retain", *ROUNDINGS, "probes")
ATTACKS = (*BY_DEFAULT, "relearn_curve", "unrelated", "few_shot", "leak", "kl")  # the others: long, or need an option
TRAINING = ("relearn", "retain", "relearn_curve", "unrelated")  # fine-tune the model


FRACTION = 0.1  # of the groups of the forget corpus, for relearning


@dataclass(frozen=True)
class Plan:
    """The settings that the attacks of one command share."""

    run: Path
    config: Json  # the run's, resolved
    suite: str
    module: Suite
    probes: Probes  # all of the suite
    group: str | None  # the column that --group names
    steps: int
    lr: float | None  # None: nothing is trained
    seed: int
    overrides: tuple[str, ...]
    ranks: int
    batch_size: int
    folder: Path  # for corpora and trained models
    trust: Trust
    shots: int = 5  # answered questions before each question of `few_shot`
    samples: int = 200  # of each prompt, of `leak`
    texts: Path | None = None  # on which `kl` compares two models, and `unrelated` trains

    @property
    def final(self) -> Path:
        return self.run / "final"

    @property
    def original(self) -> Path | None:
        """The model before unlearning, if it is a folder on this machine."""
        folder = Path(self.config["model"]["path"]).expanduser()
        return folder if is_model(folder) else None


@dataclass(frozen=True, eq=False)  # compared by identity, so that `Evaluator` can cache results
class EvalSpec:
    """What to evaluate: probes of the suite, and documents whose negative log-likelihood is reported as `nll`; or else
    what `measure` returns."""

    probes: Probes = ()
    documents: tuple[Row, ...] = ()
    nll: str = "forget_nll"
    measure: Measure | None = None


@dataclass(frozen=True)
class Attack:
    """One attack: what it trains on, how it rounds the weights, and what it evaluates."""

    name: str
    settings: Json
    evaluation: EvalSpec
    plain: EvalSpec | None = None  # evaluated before the attack, if `evaluation` is itself the attack
    corpus: Json | None = None  # the `data.retain` to train on
    rows: tuple[Row, ...] = ()  # to write to its path, if it is not a corpus of the run
    rounding: str | None = None  # one of ROUNDINGS
    selection: Json | None = None  # counts and groups of what the attack selected, for the file
    probed: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)  # sets that the training itself measures
    compares: bool = False  # `evaluation` compares with the model before unlearning, which is therefore not evaluated
