"""The report on a sweep: `frontier.json`, `frontier.md` and `frontier.png`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from eval.reporting import figures, sections, tables
from eval.reporting.pages import Block, Code, Figure, Heading, Table, Text, Warn, as_markdown
from eval.reporting.pictures import draw, png
from eval.results.common import common_start
from eval.results.comparison import (
    Group,
    Trained,
    answer_sum,
    best_groups,
    collect,
    cosine_and_retention,
    seed_means,
    sum_against_others,
)
from eval.results.general import GeneralAbility
from eval.results.known import nothing_to_forget
from eval.results.metrics import label, readable
from eval.results.numbers import printed
from eval.results.stats import pareto, summarise
from eval.results.trajectories import COMB_RETAIN, Run, Scores
from eval.sweep.axes import name_of
from eval.sweep.runs import FailedRun, Plan, failures
from pipeline.files import Json, write_whole


def describe(plan: Plan, groups: Sequence[Group], failed: Sequence[FailedRun]) -> Json:
    """The content of `frontier.json`."""
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
                "scores": {key: scores_of(group, key) for key in columns},
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
        "runs": [describe_run(plan, member) for member in members],
        "failures": [asdict(failure) for failure in failed],
    }


def scores_of(group: Group, score: str) -> Json:
    """{"n", "mean", "sd"} of a score over the n seeds that have it where they reach the level."""
    values = [point[score] for point in group.points if score in point]
    return {"n": len(values), **summarise(values)}


def describe_run(plan: Plan, member: Trained) -> Json:
    """One entry under "runs" of `frontier.json`."""
    return {
        "method": member.method,
        "setting": member.setting,
        "seed": member.seed,
        "folder": str(member.run.folder),
        "command": shlex.join(plan.training(member.method, member.setting, member.seed)),
        "evaluation": member.run.command,
        "environment": member.run.environment,
        "lowest_forget": member.lowest,
        "matched": member.point,
        "starts_below": member.is_early,
        COMB_RETAIN: member.cosine,
        "left_out": member.run.left_out,
        "trajectory": member.run.trajectory,
    }


def columns_of(plan: Plan, groups: Sequence[Group]) -> list[str]:
    """The columns of the tables (see `headline_columns`)."""
    return sections.headline_columns(tables.score_columns(runs_of(groups)), plan.measure, general_of(groups))


def runs_of(groups: Sequence[Group]) -> dict[str, list[Run]]:
    """The runs of the groups as the tables of `eval.report` take them."""
    return {f"{group.method}, {name_of(group.setting)}": [m.run for m in group.members] for group in groups}


def start_of(plan: Plan, groups: Sequence[Group]) -> Scores | None:
    """The scores of the model before unlearning, by the plan's target or by the probes of the runs."""
    return common_start([member.run for group in groups for member in group.members], plan.target)


def general_of(groups: Sequence[Group]) -> GeneralAbility:
    """The scores of general ability that some run has."""
    return tables.general_of(runs_of(groups))


def settings_table(groups: Sequence[Group], columns: Sequence[str], best: Mapping[str, Group]) -> list[list[str]]:
    """A row per method and setting, mean ± sd over the seeds that reached the level; the best ones have a star."""
    names = [tables.marked(label(column, columns), column, general_of(groups)) for column in columns]
    rows = [["method", "setting", *names, *tables.LEVEL_TITLES]]
    for group in groups:
        star = " *" if best.get(group.method) is group and group.points else ""
        cells = tables.level_cells(group.points, len(group.members), columns)
        rows.append([group.method, name_of(group.setting) + star, *cells])
    return rows


def correlation_table(correlation: Json) -> list[list[str]]:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = {"all runs": correlation["all"], **correlation["methods"]}
    return [["runs of", "n", "Pearson", "Spearman"]] + [
        [name, str(row["n"]), cell(row["pearson"]), cell(row["spearman"])] for name, row in rows.items()
    ]


def pareto_table(points: Iterable[Json]) -> list[list[str]]:
    return [["method", "setting", "step", "forget", "retain"]] + [
        [p["method"], name_of(p["setting"]), f"{p['step']:g}", printed(p["forget"]), printed(p["retain"])]
        for p in points
    ]


def failed_table(failed: Iterable[FailedRun]) -> list[list[str]]:
    rows = [["method", "setting", "seed", "in", "status", "error", "log"]]
    return rows + [[f.method, name_of(f.setting), str(f.seed), f.what, str(f.status), f.reason, f.log] for f in failed]


def compose(plan: Plan, groups: Sequence[Group], failed: Sequence[FailedRun], described: Json) -> list[Block]:
    """`frontier.md` in order."""
    runs = [member.run for group in groups for member in group.members]
    blocks: list[Block] = [Heading(f"Methods at their best, at {readable(plan.measure.forget)} {plan.measure.level:g}")]
    blocks += compare(plan, groups, described) if groups else [Text("No run has finished.")]
    if failed:
        logs = "\n\n".join(f"{failure.log}\n" + "\n".join(f"  {line}" for line in failure.lines) for failure in failed)
        blocks += [
            Heading("Runs that failed"),
            Warn(f"{len(failed)} runs failed and are in no number above. The same command tries them again, except "
                 "settings that a study has counted as tried."),
            Table(failed_table(failed)),
            Code(logs),
        ]  # fmt: skip
    commands = [described["command"]]
    commands += [line for run in described["runs"] for line in (run["command"], run["evaluation"])]
    return [*blocks, *sections.how_it_was_made(runs, commands)]


def compare(plan: Plan, groups: Sequence[Group], described: Json) -> list[Block]:
    """What the finished runs show."""
    columns, best, measure = columns_of(plan, groups), best_groups(groups), plan.measure
    members = [member for group in groups for member in group.members]
    missed = {
        method: [
            (f"{m.method} ({name_of(m.setting)}) seed {m.seed}", m.run)
            for m in members
            if m.method == method and not m.point and not m.is_early
        ]
        for method in best
    }
    those = [one for runs in missed.values() for one in runs]
    standing = sections.not_reached(missed, measure)
    reached = [group for group in best.values() if group.points]
    start = start_of(plan, groups)
    reading = sections.reading(measure, start is not None)
    chosen = settings_table(reached, columns, {})
    best_values = tables.best_cells(chosen, ["setting", *columns], ["setting"])
    nothing = nothing_to_forget(measure, start)
    tried = ", ".join(f"{method} {sum(group.method == method for group in groups)}" for method in best)
    return [
        *([Warn(nothing)] if nothing else []),
        *sections.early_runs([member.run for member in members], measure),
        Text(f"Suites {', '.join(plan.suites)}; {len(members)} runs finished. {reading} "
             f"{sections.never_reached(those, measure)}"),
        Text("The best setting of a method is the one that brings most seeds to the level and, among those, retains "
             "most. It is chosen and reported on the same runs, which favours a method with more settings; settings "
             f"tried: {tried}."),
        *([Table(chosen, best_values)] if reached else standing),
        Figure("frontier.png", "Forget against retain score, each method at its best setting: mean of the seeds, "
               "± sd shaded; dashed the level."),
        Heading("Every setting (* the best of its method)"),
        Table(settings_table(groups, columns, best)),
        *(standing if reached else []),
        Heading("Does a plain sum with its best ratio reach the same frontier?"),
        Text(answer_sum(described["sum_against_others"], measure.level)),
        Heading("Does cos(g, g_r) predict retention?"),
        Text("Correlation of cos(g, g_r), mean over the steps of a run up to the level, with its retain score "
             "there. Runs that miss the level, that are below it from their first evaluation, or that log no cosine "
             "(sum without synthesis.geometry) are left out."),
        Table(correlation_table(described["correlation"])),
        Heading("Pareto front"),
        Text("Of all evaluated steps of all settings, means over seeds: no other point forgets more and "
             "retains at least as much, or forgets as much and retains more."),
        Table(pareto_table(described["pareto"])),
    ]  # fmt: skip


def write_report(plan: Plan) -> list[list[str]]:
    """Write the three files from the finished runs; returns the table of the best settings, empty without a run."""
    groups, failed = collect(plan), failures(plan)
    described = describe(plan, groups, failed)
    if groups:
        best = runs_of([*best_groups(groups).values()])
        chart = figures.best(best, described["pareto"], plan.measure, start_of(plan, groups))
        write_whole(plan.output / "frontier.png", png(draw(chart)))
    blocks = compose(plan, groups, failed, described)
    write_whole(plan.output / "frontier.md", as_markdown(blocks))
    write_whole(plan.output / "frontier.json", json.dumps(described, indent=1) + "\n")
    return next((block.rows for block in blocks if isinstance(block, Table)), []) if groups else []
