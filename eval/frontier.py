"""Run methods over settings and seeds, and compare each at its best: the frontier of forgetting against retention.

    python -m eval.frontier --config RECIPE --methods NAME [NAME …] --output FOLDER [--seeds 0 1 2]
        [--sweep KEY=A,B,C | KEY=LOW:HIGH …] [--trials N] [--suite NAME [NAME …]]
        [--forget SUITE.METRIC] [--retain SUITE.METRIC] [--level X] [-- --key value, for every run]

Lists are tried exhaustively. With a range in the sweep, the Tree-structured Parzen Estimator of Optuna proposes
settings (uniform in the logarithm) and maximises the retain score at matched forgetting, read as `eval.report` reads
it. `frontier.json`, `frontier.md` and `frontier.png` are written anew after every run; the same command after a kill
goes on where it stood. A run that fails is told in the report and does not end the sweep. Exit status 0 done, 1 done
but for failed runs, 2 unusable input.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.files import exit_status, write_atomically
from eval.reporting.figures import draw_best
from eval.reporting.pages import Block, Code, Figure, Heading, Table, Text, Warn, as_markdown, as_text, png
from eval.results.comparison import (
    Group,
    answer_sum,
    best_groups,
    collect,
    cosine_and_retention,
    seed_means,
    sum_against_others,
)
from eval.results.metrics import choose, headlines, label, suite_of
from eval.results.stats import mean_sd, pareto, summarise
from eval.results.trajectories import COMB_RETAIN, read_target
from eval.run import check_suites
from eval.sweep.axes import OWN_KEYS, name_of, parse_sweep, run_folder
from eval.sweep.launch import end_on_terminate, exclusive_lock
from eval.sweep.runs import (
    DEFAULT_TRIALS,
    FailedRun,
    Plan,
    failure_file,
    failures,
    read_presets,
    refuse_another_sweep,
    run_if_missing,
)
from eval.sweep.search import propose
from pipeline.errors import InputError


def describe(plan: Plan, groups: Sequence[Group], failed: Sequence[FailedRun]) -> dict[str, Any]:
    """`frontier.json`."""
    columns = columns_of(plan, groups)
    best = best_groups(groups)
    points = [{"method": g.method, "setting": g.setting, **point} for g in groups for point in seed_means(g)]
    members = [member for group in groups for member in group.members]
    return {
        "command": shlex.join(["python", "-m", "eval.frontier", *sys.argv[1:]]),
        "suites": plan.suites,
        "forget": plan.measure.forget,
        "retain": plan.measure.retain,
        "level": plan.measure.level,
        "seeds": plan.seeds,
        "settings": [
            {
                "method": group.method,
                "setting": group.setting,
                "seeds": [member.seed for member in group.members],
                "reached": len(group.points),
                "steps": summarise(point["step"] for point in group.points),
                "scores": {key: summarise(p[key] for p in group.points if key in p) for key in columns},
                "best": best[group.method] is group and bool(group.points),
            }
            for group in groups
        ],
        "pareto": pareto(points),
        "sum_against_others": sum_against_others(groups),
        "correlation": {
            "all": cosine_and_retention(members),
            "methods": {m: cosine_and_retention(member for member in members if member.method == m) for m in best},
        },
        "runs": [
            {
                "method": member.method,
                "setting": member.setting,
                "seed": member.seed,
                "folder": str(member.run.folder),
                "command": shlex.join(plan.training(member.method, member.setting, member.seed)),
                "evaluation": member.run.command,
                "environment": member.run.environment,
                "lowest_forget": member.lowest,
                "matched": member.point,
                COMB_RETAIN: member.cosine,
                "left_out": member.run.left_out,
                "trajectory": member.run.trajectory,
            }
            for member in members
        ],
        "failures": [asdict(failure) for failure in failed],
    }


def columns_of(plan: Plan, groups: Sequence[Group]) -> list[str]:
    """The retain score first, then the other headlines but the score to forget."""
    keys = headlines(groups[0].members[0].run.trajectory[-1]) if groups else []
    measure = plan.measure
    return [measure.retain, *(key for key in keys if key not in (measure.forget, measure.retain))]


# ---------------------------------------------------------------------------------------------------------------------
# In words


def settings_table(groups: Iterable[Group], columns: Sequence[str], best: Mapping[str, Group]) -> list[list[str]]:
    """A row per method and setting, mean ± sd over the seeds that reached the level; the best ones starred."""
    rows = [["method", "setting", *(label(column, columns) for column in columns), "steps", "seeds that reached it"]]
    for group in groups:
        star = " *" if best.get(group.method) is group and group.points else ""
        cells = [mean_sd(point[column] for point in group.points if column in point) for column in columns]
        steps = mean_sd((point["step"] for point in group.points), digits=1)
        reached = f"{len(group.points)} of {len(group.members)}"
        rows.append([group.method, name_of(group.setting) + star, *cells, steps, reached])
    return rows


def never_reached(groups: Iterable[Group]) -> str:
    """One sentence that lists the runs without a point at the level, with the lowest forget score of each."""
    missed = [
        f"{m.method} ({name_of(m.setting)}) seed {m.seed}: {m.lowest:.3f}"
        for group in groups
        for m in group.members
        if not m.point
    ]
    if not missed:
        return "Every run reached the level."
    return f"Never reached the level, and are in no mean (the lowest forget score of each): {'; '.join(missed)}."


def correlation_table(correlation: dict[str, Any]) -> list[list[str]]:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = {"all runs": correlation["all"], **correlation["methods"]}
    return [["runs of", "n", "Pearson", "Spearman"]] + [
        [name, str(row["n"]), cell(row["pearson"]), cell(row["spearman"])] for name, row in rows.items()
    ]


def failed_table(failed: Iterable[FailedRun]) -> list[list[str]]:
    rows = [["method", "setting", "seed", "in", "status", "said", "log"]]
    return rows + [[f.method, name_of(f.setting), str(f.seed), f.what, str(f.status), f.reason, f.log] for f in failed]


def compose(plan: Plan, groups: Sequence[Group], failed: Sequence[FailedRun], described: dict[str, Any]) -> list[Block]:
    """`frontier.md` in order."""
    measure, runs = plan.measure, described["runs"]
    chance = "" if measure.chance is None else f" Chance is {measure.chance:g}."
    target = "" if plan.target else " Without --target the way from the original to the first export is not seen."
    reading = (
        f"Suites {', '.join(plan.suites)}; {len(runs)} runs finished. Each run is read where {measure.forget} first "
        f"falls to {measure.level:g}, interpolated between the evaluations around it, and compared by "
        f"{measure.retain}; mean ± sample sd over seeds.{chance}{target}"
    )
    blocks: list[Block] = [Heading(f"Methods at their best, at {measure.forget} {measure.level:g}")]
    if not groups:
        blocks.append(Text("No run has finished."))
    else:
        blocks += compare(plan, groups, described, reading)
    if failed:
        logs = "\n\n".join(f"{failure.log}\n" + "\n".join(f"  {line}" for line in failure.lines) for failure in failed)
        blocks += [
            Heading("Runs that failed"),
            Warn(f"{len(failed)} runs failed and are in no number above. The same command tries them again, but for "
                 "settings that a study has counted as tried."),
            Table(failed_table(failed)),
            Code(logs),
        ]  # fmt: skip
    commands = [described["command"], *(line for run in runs for line in (run["command"], run["evaluation"]))]
    environments = dict.fromkeys(f"evaluation: {run['environment']}" for run in runs)
    return [*blocks, Heading("How this was made"), Code("\n".join(commands)), Text("; ".join(environments))]


def compare(plan: Plan, groups: Sequence[Group], described: dict[str, Any], reading: str) -> list[Block]:
    """What the finished runs say."""
    columns, best = columns_of(plan, groups), best_groups(groups)
    tried = ", ".join(f"{method} {sum(group.method == method for group in groups)}" for method in best)
    pareto_rows = [["method", "setting", "step", "forget", "retain"]] + [
        [p["method"], name_of(p["setting"]), f"{p['step']:g}", f"{p['forget']:.3f}", f"{p['retain']:.3f}"]
        for p in described["pareto"]
    ]
    return [
        Text(f"{reading} {never_reached(groups)}"),
        Text("The best setting of a method is the one that most seeds bring to the level and that then retains most. "
             "It is chosen and reported on the same runs, which flatters whoever tries more; settings tried: "
             f"{tried}."),
        Table(settings_table([group for group in best.values() if group.points], columns, {})),
        Figure("frontier.png", "Forget against retain score, each method at its best setting: mean of the seeds, "
               "± sd shaded; dashed the level."),
        Heading("Every setting (* the best of its method)"),
        Table(settings_table(groups, columns, best)),
        Heading("Does a plain sum with its best ratio reach the same frontier?"),
        Text(answer_sum(described["sum_against_others"], plan.measure.level)),
        Heading("Does cos(g, g_r) predict retention?"),
        Text("Correlation of cos(g, g_r), mean over the steps of a run up to the level, with its retain score "
             "there. Runs that miss the level or that log no cosine (sum without synthesis.geometry) are left out."),
        Table(correlation_table(described["correlation"])),
        Heading("Points that no other point beats"),
        Text("Of all evaluated steps of all settings, means over seeds: no other point forgets more and "
             "retains at least as much, or forgets as much and retains more."),
        Table(pareto_rows),
    ]  # fmt: skip


def write_report(plan: Plan) -> list[list[str]]:
    """Write the three files from what is finished; returns the table of the best settings, empty if no run finished."""
    groups, failed = collect(plan), failures(plan)
    described = describe(plan, groups, failed)
    if groups:
        best = {f"{m}, {name_of(g.setting)}": [one.run for one in g.members] for m, g in best_groups(groups).items()}
        figure = draw_best(best, described["pareto"], plan.measure, plan.target)
        write_atomically(plan.output / "frontier.png", png(figure))
    blocks = compose(plan, groups, failed, described)
    write_atomically(plan.output / "frontier.md", as_markdown(blocks))
    write_atomically(plan.output / "frontier.json", json.dumps(described, indent=1) + "\n")
    return next((block.rows for block in blocks if isinstance(block, Table)), []) if groups else []


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_command_line(arguments: Sequence[str]) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what the recipe says of its methods; raises UnusableInput."""
    parser = argparse.ArgumentParser(prog="python -m eval.frontier", description="Compare methods at their best.")
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE", help="a YAML file with methods:")
    parser.add_argument("--methods", nargs="+", required=True, metavar="NAME", help="presets of the recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default 0 1 2")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="KEY=…", help="A,B,C: a list; LOW:HIGH: a range")
    parser.add_argument("--suite", nargs="+", default=["bios"], metavar="NAME", help="of eval.run (default bios)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="local copies of the suites' data")
    parser.add_argument("--target", type=Path, metavar="FILE.json", help="evaluation of the model the runs begin with")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="runs, studies and the report")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes that train (default 2)")
    parser.add_argument("--trials", type=int, metavar="N", help=f"settings per method (default {DEFAULT_TRIALS})")
    parser.add_argument("--forget", metavar="SUITE.METRIC", help="score that falls (default: the suite's)")
    parser.add_argument("--retain", metavar="SUITE.METRIC", help="score to compare by (default: the suite's)")
    parser.add_argument("--level", type=float, metavar="X", help="forget score to compare at (default: the suite's)")
    parser.epilog = "After --, overrides for every run: -- --train.steps 60"
    border = list(arguments).index("--") if "--" in arguments else len(arguments)
    given, overrides = parser.parse_args(arguments[:border]), tuple(arguments[border + 1 :])
    axes = parse_sweep(given.sweep)
    for token in overrides:
        key = token.removeprefix("--").partition("=")[0]
        if token.startswith("--") and key in (*OWN_KEYS, *(axis.key for axis in axes)):
            raise InputError(f"override {token}: {key} is decided for each run; take it out from behind --")
    if given.trials is not None and all(axis.values for axis in axes):
        raise InputError(f"--trials {given.trials}: lists are tried exhaustively; sweep a range KEY=LOW:HIGH")
    for name in ("ranks", "trials"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise InputError(f"--{name} {getattr(given, name)}: give 1 or more")
    if min(given.seeds) < 0:
        raise InputError(f"--seeds {min(given.seeds)}: a seed is 0 or more")
    if given.output.exists() and not given.output.is_dir():
        raise InputError(f"--output {given.output} is a file; name a folder")
    suites = check_suites(given.suite)
    target = read_target(given.target)
    measure = choose(suites, given.forget, given.retain, given.level, target)
    for score in (measure.forget, measure.retain):
        if target and score not in target:
            raise InputError(f"{given.target} has no score {score}; evaluate the target on {suite_of(score)} too")
    methods = tuple(dict.fromkeys(given.methods))
    presets = read_presets(given.config, methods)
    plan = Plan(
        config=given.config,
        overrides=overrides,
        suites=tuple(suites),
        data=given.data,
        measure=measure,
        target=target,
        output=given.output,
        methods=methods,
        seeds=tuple(dict.fromkeys(given.seeds)),
        axes=tuple(axes),
        ranks=given.ranks,
        trials=given.trials or DEFAULT_TRIALS,
    )
    return plan, presets


def main() -> int:
    """The command; returns 1 if one of its runs failed, else 0."""
    plan, presets = parse_command_line(sys.argv[1:])
    end_on_terminate()
    told: list[Path] = []
    with exclusive_lock(plan.output, "eval.frontier"):
        refuse_another_sweep(plan, presets)
        collect(plan)  # what is there and does not go together is refused before more is trained
        for method in plan.methods:
            for setting in propose(plan, method):
                for seed in plan.seeds:
                    told.append(failure_file(run_folder(plan.output, method, setting, seed)))
                    if run_if_missing(plan, method, setting, seed):
                        write_report(plan)
        table = write_report(plan)  # also when nothing was missing: the level may be another
    if table:
        print(as_text(table))
    print(f"\nread {plan.output / 'frontier.md'}")
    if failed := sum(file.is_file() for file in told):
        print(f"error: {failed} of {len(told)} runs failed; {plan.output / 'frontier.md'} says why", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
