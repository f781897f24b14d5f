"""Corpora, objectives, probes and schedule of a resolved configuration, checked before anything is read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pipeline.config.explain import nearest
from pipeline.config.objectives import NEEDS
from pipeline.config.schema import RunConfig
from pipeline.config.sources import Corpus, format_of
from pipeline.errors import InputError


def check_corpus(config: RunConfig, task: str, where: str, reads_data: bool) -> None:
    """
    Raises:
        InputError: the corpus of `task` is missing, or does not suit the task's objective or the packing.
    """
    corpus: Corpus | None = getattr(config.data, task)
    objective: str = getattr(config.objective, task)
    if corpus is None:
        raise InputError(f"{where}: data.{task} is missing, and objective.{task} is not none")
    if reads_data and format_of(corpus.path) is not None:
        _check_exists(corpus.path, f"{where}: data.{task}.path")
    pairing = NEEDS[objective].pairing
    if pairing == "preferred" and corpus.preferred is None:
        raise InputError(
            f"{where}: data.{task}.preferred is missing: {objective} needs the column with the text to prefer"
        )
    if pairing == "refusal" and corpus.prompt is None:
        raise InputError(f"{where}: data.{task}: {objective} needs questions to refuse; set prompt and response")
    if reads_data and corpus.refusals is not None:
        _check_exists(corpus.refusals, f"{where}: data.{task}.refusals")
    rows = next((key for key in ("prompt", "preferred") if getattr(corpus, key) is not None), None)
    if rows is not None and config.data.packing == "blocks":
        raise InputError(
            f"{where}: data.packing: blocks would cut through the rows that data.{task}.{rows} needs whole; "
            "set data.packing: documents"
        )


def check_objective(config: RunConfig, where: str) -> None:
    """
    Raises:
        InputError: an objective that weighs the retain loss has none, or no level for it.
    """
    name, settings = config.objective.forget, config.objective
    if "forget" not in config.tasks or not NEEDS[name].weighs_retain:
        return
    if "retain" not in config.tasks:
        raise InputError(f"{where}: objective.retain: none, but {name} weighs the retain loss; set it, to nll or jsd")
    if settings.retain_loss_eps is None:
        raise InputError(
            f"{where}: objective.retain_loss_eps is missing: {name} lowers the weight of a retain loss below it, and "
            "raises the weight of one above it; set it a little above the retain loss of the model before unlearning"
        )


def check_probes(config: RunConfig, where: str, reads_data: bool) -> None:
    """
    Raises:
        InputError: a file of a set is missing, or `train.stop_at` names what no probe measures.
    """
    for name, probe in config.data.probes.items():
        if reads_data and format_of(probe.path) is not None:
            _check_exists(probe.path, f"{where}: data.probes.{name}.path")
    levels, sets = config.train.stop_at, config.probes
    if levels and not config.train.probe_every:
        raise InputError(f"{where}: train.stop_at reads probes, and train.probe_every is 0; set it, to 1 or more")
    for name, measures in levels.items():
        if name not in sets:
            raise InputError(f"{where}: train.stop_at.{name}: no set of data.probes; {nearest(name, list(sets))}")
        for measure in measures:
            if measure not in sets[name].measures:
                valid = nearest(measure, sets[name].measures)
                raise InputError(f"{where}: train.stop_at.{name}: the set has no {measure!r}; {valid}")


def check_confinement(config: RunConfig, where: str) -> None:
    """
    Raises:
        InputError: `synthesis.confine` where weights outside would move all the same, or where there is one gradient.
    """
    if config.synthesis.confine is None:
        return
    absent = [task for task in ("forget", "retain") if task not in config.tasks]
    if absent:
        raise InputError(
            f"{where}: synthesis.confine chooses weights by two gradients, and objective.{absent[0]} is none; remove it"
        )
    if config.optimizer.weight_decay:
        raise InputError(
            f"{where}: synthesis.confine: weight decay moves every weight; set optimizer.weight_decay: 0, or remove it"
        )


def check_schedule(config: RunConfig, where: str) -> None:
    """
    Raises:
        InputError: `train.schedule: joint` where the two tasks cannot share a forward pass.
    """
    if config.train.schedule != "joint":
        return
    refused, remedy = f"{where}: train.schedule: joint", "set train.schedule: sequential"
    absent = [task for task in ("forget", "retain") if task not in config.tasks]
    if absent:
        raise InputError(f"{refused} is one pass of two tasks, and objective.{absent[0]} is none; {remedy}")
    for task in config.tasks:
        if NEEDS[getattr(config.objective, task)].hidden:
            objective = getattr(config.objective, task)
            raise InputError(
                f"{refused} runs the whole model, and objective.{task}: {objective} reads the hidden states of one "
                f"layer without the blocks above it; {remedy}"
            )
    if config.model.torch_compile:
        raise InputError(f"{refused} has rules for modules that model.torch_compile would fuse; {remedy}, or unset it")


def check_packages(config: RunConfig, where: str) -> None:
    """
    Raises:
        InputError: the package of a key is not installed.
    """
    if config.model.load_in_4bit and find_spec("bitsandbytes") is None:
        raise InputError(
            f"{where}: model.load_in_4bit needs the package bitsandbytes, which is not installed; run `pip install "
            "bitsandbytes`, or remove the key"
        )


def _check_exists(file: str, key: str) -> None:
    if not Path(file).is_file():
        raise InputError(f"{key}: there is no file {Path(file).absolute()}")
