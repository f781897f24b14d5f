"""What every run of a sweep needs, checked once before the first of them starts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from eval.evaluation import load_suites, suites_in
from eval.suites.task_options import SUITE
from eval.sweep.axes import Setting, run_folder
from eval.sweep.runs import Plan
from pipeline.config.deepspeed import accumulation, deepspeed_config
from pipeline.config.load import resolve
from pipeline.config.schema import RunConfig
from pipeline.config.sources import format_of
from pipeline.data.corpus import read


def check_runs(plan: Plan) -> None:
    """Resolve the configuration of each method in each setting, read the corpora, and load the probes of the suites.

    A mistake there would fail every run, each after a start that takes half a minute.

    Raises:
        InputError: as training and evaluation would.
    """
    read_already: set[str] = set()
    for method in plan.methods:
        for setting in settings(plan):
            config = configuration(plan, method, setting)
            accumulation(config, plan.ranks)
            deepspeed_config(config)
            for task in config.tasks:
                corpus = getattr(config.data, task)
                if format_of(corpus.path) is None or repr(corpus) in read_already:
                    continue  # a data set of the hub is left to the first run
                for _ in read(corpus, task)[0]:
                    pass
                read_already.add(repr(corpus))
    # The sets of `probes` and, without --data, of `corpus` are of each run's own configuration, checked above.
    if plan.data is None:
        load_suites([name for name in plan.suites if name not in ("probes", "corpus")], None, {SUITE: plan.tasks})
    else:
        needed = [name for name in plan.suites if name != "probes"]
        suites_in(plan.data, needed, {SUITE: plan.tasks, "corpus": {"run": plan.output}})


def settings(plan: Plan) -> Iterator[Setting]:
    """Every setting of lists; of a range both ends."""
    values = [axis.values or (f"{axis.low:g}", f"{axis.high:g}") for axis in plan.axes]
    for chosen in product(*values):
        yield {axis.key: value for axis, value in zip(plan.axes, chosen, strict=True)}


def configuration(plan: Plan, method: str, setting: Setting) -> RunConfig:
    """What training resolves from the command of a run (`Plan.training`)."""
    swept = [part for key, value in setting.items() for part in (f"--{key}", value)]
    folder = run_folder(plan.output, method, setting, plan.seeds[0])
    own = ["--seed", str(plan.seeds[0]), "--output", str(folder)]
    return resolve(plan.config, method, [*own, *plan.overrides, *swept])
