"""The benchmarks. A suite is one module of this package that satisfies `Suite`, and one line in `SUITES`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from eval.results.metrics import nearest
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUITES = {
    "corpus": "eval.suites.corpus",
    "bios": "eval.suites.bios",
    "wmdp_bio": "eval.suites.harness",
    "wmdp_chem": "eval.suites.harness",
    "wmdp_cyber": "eval.suites.harness",
    "wmdp_bio_low_mi": "eval.suites.wmdp_split",
    "wmdp_cyber_low_mi": "eval.suites.wmdp_split",
    "mmlu": "eval.suites.harness",
    "lm_eval": "eval.suites.harness_tasks",
    "rwku": "eval.suites.rwku",
    "rwku_utility": "eval.suites.rwku_utility",
    "tofu": "eval.suites.tofu",
    "muse_news": "eval.suites.muse",
    "muse_books": "eval.suites.muse",
    "probes": "eval.suites.probes",
}

MMLU_SHOTS = 5  # as in the paper; WMDP has no examples before a question

Probes = Any  # what `load_probes` of a suite returns and its other functions take: each suite has a type of its own


WITHOUT_DATA = ("lm_eval", "probes")  # suites that read nothing of --data


class NoData(InputError):
    """The folder of --data has nothing of a suite; the text says what to put there.

    Args:
        has_own: the suite has other data where no folder is given, which are not those of the hub.
    """

    def __init__(self, text: str, *, has_own: bool = False) -> None:
        super().__init__(text)
        self.has_own = has_own


class Suite(Protocol):
    """What every suite offers."""

    def load_probes(self, folder: Path | None, suite: str) -> Probes:
        """The probes of the suite named `suite`, from `folder` (--data) or, without one, from the hub or the code.

        A suite may take further arguments with defaults (`shots`, `forget_set`, `run`).

        Raises:
            NoData: `folder` has nothing of the suite.
            InputError: a file is missing or malformed; the message names the file, the row and the remedy.
        """
        ...

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        probes: Probes,
        *,
        batch_size: int,
        title: str,
    ) -> Json:
        """{"metrics": nested means, "counts": nested numbers of probes, "protocol": text or {name: text}, ...}.

        A suite whose probes are no list of objects adds "sources", {set: digest of its rows}, by which a report refuses
        to compare scores on other rows (`eval.results.conditions`). "texts", {set: some prompts with the answers}
        (`texts.choose_texts`), are what the report shows first.

        Every rank calls it and gets the whole result; forward passes are shared over ranks by `sharing.share`.
        `title` names the progress bar.
        """
        ...


@runtime_checkable
class GroupedSuite(Protocol):
    """A suite that knows which row of the forget corpus a probe is about, so that `relearn` can attack it."""

    def group_of(self, probe: Probes) -> str | None:
        """The text by which a row is known to be about the probe: a name, a question; None if there is no such row."""
        ...

    def forgotten(self, probe: Probes) -> bool:
        """Whether the probe belongs to the forget set."""
        ...


@runtime_checkable
class WholeSuite(Protocol):
    """A suite that evaluates all of its questions or none, so that `relearn` must not train on any of them."""

    def question_texts(self, probes: Probes) -> list[str]:
        """The questions as they are written."""
        ...


@runtime_checkable
class SplitSuite(Protocol):
    """A suite that brings what is to be learned again, of which its own questions are no part."""

    def texts_to_relearn(self, probes: Probes) -> list[str]:
        """The texts that the attack `relearn` trains on, instead of a part of the run's forget corpus."""
        ...


@runtime_checkable
class AdversarialSuite(Protocol):
    """A suite that can put its questions as an adversary would."""

    def adversarial(self, probes: Probes) -> tuple[Probes, Probes]:
        """(the plain probes, their adversarial versions)."""
        ...


def check_suites(names: Sequence[str]) -> list[str]:
    """The names without repetition; raises InputError for a name that is not in `SUITES`."""
    for name in names:
        if name not in SUITES:
            raise InputError(
                f"unknown suite {name!r}; the nearest is {nearest(name, SUITES)!r} (suites: {', '.join(SUITES)})"
            )
    return list(dict.fromkeys(names))


def load_suite(name: str) -> Suite:
    """The module of a suite; it is imported only now, because some suites import large packages."""
    return cast(Suite, importlib.import_module(SUITES[name]))
