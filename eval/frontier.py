"""Run methods over settings and seeds, and compare each at its best: the frontier of forgetting against retention.

    python -m eval.frontier --config RECIPE --methods NAME [NAME …] --output FOLDER [--seeds 0 1 2]
        [--sweep KEY=A,B,C | KEY=LOW:HIGH …] [--trials N] [--suite NAME [NAME …]] [--tasks NAME [NAME …]]
        [--forget SUITE.METRIC] [--retain SUITE.METRIC] [--level X] [-- --key value, for every run]

Lists are tried exhaustively. With a range in the sweep, the Tree-structured Parzen Estimator of Optuna proposes
settings (uniform in the logarithm) and maximises the retain score at matched forgetting, as `eval.report` reads it.
Recipe, corpora and probes are checked once before the first run. The command writes `frontier.json`, `frontier.md` and
`frontier.png` anew after every run; after a kill, the same command continues. The report lists a run that fails, and
the sweep goes on. Exit status: 0 done, 1 done but for failed runs, 2 unusable input.

With `--suite probes` alone, no run is evaluated: `train.probe_every` of the recipe gives the trajectory.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.files import check_output, exit_status
from eval.reporting.pages import as_text
from eval.reporting.sweep_report import write_report
from eval.results.comparison import collect
from eval.results.known import nothing_to_forget
from eval.results.metrics import add_metric_options, choose, suite_of
from eval.results.trajectories import read_target
from eval.suites import check_suites
from eval.suites.task_options import add_task_options, task_options
from eval.sweep.axes import OWN_KEYS, Axis, parse_sweep
from eval.sweep.check import check_runs
from eval.sweep.launch import end_on_terminate, exclusive_lock, refuse_overrides, split_overrides
from eval.sweep.runs import (
    DEFAULT_TRIALS,
    Plan,
    read_presets,
    recipe_suites,
    refuse_another_sweep,
    refuse_without_probes,
)
from eval.sweep.search import run_sweep
from pipeline.config.files import RECIPES, find_file
from pipeline.distributed.launcher import rank_launcher
from pipeline.errors import InputError
from pipeline.files import Json


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.frontier", description="Compare methods at their best.")
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="RECIPE", help="a YAML file with methods:, or a shipped name")
    add("--methods", nargs="+", required=True, metavar="NAME", help="presets of the recipe")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default 0 1 2")
    add("--sweep", nargs="+", default=[], metavar="KEY=…", help="A,B,C: a list; LOW:HIGH: a range")
    add("--suite", nargs="+", metavar="NAME", help="of eval.run (default: the recipe's suites:, else corpus)")
    add("--data", type=Path, metavar="FOLDER", help="local copies of the suites' data")
    add_task_options(parser)
    add("--target", type=Path, metavar="FILE.json", help="evaluation of the model before unlearning")
    add("--output", type=Path, required=True, metavar="FOLDER", help="runs, studies and the report")
    add("--ranks", type=int, default=2, metavar="N", help="processes that train, a GPU each (default 2)")
    add("--trials", type=int, metavar="N", help=f"settings per method (default {DEFAULT_TRIALS})")
    add_metric_options(parser)
    parser.epilog = "After --, overrides for every run: -- --train.steps 60"
    return parser


def check(options: argparse.Namespace, axes: Sequence[Axis], overrides: Sequence[str]) -> None:
    """Raises InputError for options that are out of range or contradict each other."""
    refuse_overrides(overrides, {*OWN_KEYS, *(axis.key for axis in axes)}, "for each run")
    if options.trials is not None and all(axis.values for axis in axes):
        raise InputError(f"--trials {options.trials}: lists are tried exhaustively; sweep a range KEY=LOW:HIGH")
    for name in ("ranks", "trials"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: give 1 or more")
    if min(options.seeds) < 0:
        raise InputError(f"--seeds {min(options.seeds)}: a seed is 0 or more")
    check_output(options.output, "folder")
    rank_launcher(options.ranks)  # refuses more than there are GPUs


def parse_command_line(arguments: Sequence[str]) -> tuple[Plan, Json]:
    """The plan, and the keys of the recipe that decide its methods; raises InputError."""
    own, overrides = split_overrides(arguments)
    options = make_parser().parse_args(own)
    axes = parse_sweep(options.sweep)
    check(options, axes, overrides)
    recipe = find_file(options.config, "--config", RECIPES)
    methods = tuple(dict.fromkeys(options.methods))
    presets = read_presets(recipe, methods)
    suites = check_suites(options.suite or recipe_suites(recipe))
    target = read_target(options.target)
    measure = choose(suites, options.forget, options.retain, options.level, target)
    for score in (measure.forget, measure.retain):
        if target and score not in target and suite_of(score) != "probes":
            raise InputError(f"{options.target} has no score {score}; evaluate the target on {suite_of(score)} too")
    plan = Plan(
        config=recipe,
        overrides=overrides,
        suites=tuple(suites),
        data=options.data,
        measure=measure,
        target=target,
        output=options.output,
        methods=methods,
        seeds=tuple(dict.fromkeys(options.seeds)),
        axes=tuple(axes),
        ranks=options.ranks,
        trials=options.trials or DEFAULT_TRIALS,
        target_file=options.target,
        tasks=task_options(options, suites),
    )
    return plan, presets


def main() -> int:
    """The command; returns 1 if one of its runs failed, else 0."""
    plan, presets = parse_command_line(sys.argv[1:])
    if "data" in presets["base"]:  # else something else must give it, or the first run refuses
        check_runs(plan)
    if nothing := nothing_to_forget(plan.measure, plan.target):  # before hours of runs that would show nothing
        print(f"warning: {nothing}", file=sys.stderr)
    end_on_terminate()
    with exclusive_lock(plan.output, "eval.frontier"):
        refuse_without_probes(plan)
        refuse_another_sweep(plan, presets)
        collect(plan)  # refuses finished runs that do not belong together before more is trained
        failure_files = run_sweep(plan, lambda: write_report(plan))
        table = write_report(plan)  # also if no run was missing: the level may be another
    if table:
        print(as_text(table))
    report = plan.output / "frontier.md"
    print(f"\nread {report}")
    if failed := sum(file.is_file() for file in failure_files):
        print(f"error: {failed} of {len(failure_files)} runs failed; the reasons are in {report}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
