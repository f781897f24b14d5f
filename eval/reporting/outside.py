"""The part of a report on what no corpus protects: scores of what neither mentions, and the model's general ability."""

from __future__ import annotations

from eval.reporting import scatters, tables
from eval.reporting.charts import Chart
from eval.reporting.pages import Block, Figure, Heading, Table, Text, Warn
from eval.results.metrics import IN_RETAIN, ForgetRetainMetric, collateral
from eval.results.trajectories import Run, Scores

BESIDE = "beside.png"


def beside_retain(groups: dict[str, list[Run]], measure: ForgetRetainMetric) -> Chart:
    """Each score of what neither corpus mentions against the retain score. No panels where there is one method."""
    scores = tables.score_columns(groups) if len(groups) > 1 else []
    found = [score for score in scores if collateral(score) is not None and score != measure.retain]
    return scatters.beside_retain(groups, measure, found)


def outside(groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None) -> list[Block]:
    """What neither corpus mentions."""
    scores = tables.score_columns(groups)
    found = {score: what for score in scores if (what := collateral(score)) is not None}
    columns = list(found)
    if not columns:
        return []
    in_retain = [score for score in IN_RETAIN if score in scores]
    shown = list(dict.fromkeys([*columns, *in_retain, measure.retain]))
    matched = tables.matched_table(groups, measure, shown, target)
    drawn = beside_retain(groups, measure).panels
    return [
        Heading("What neither corpus mentions"),
        Warn("Nothing in the training protects what the retain corpus does not cover, and the rule that retains that "
             "corpus best may damage the rest most: a high retain score does not show it. Put everything that "
             "must be retained into the retain corpus."),
        Text(" ".join(dict.fromkeys(f"{what[0].upper()}{what[1:]}." for what in found.values()))
             + "".join(f" For comparison: {IN_RETAIN[score]}." for score in in_retain)),
        Text(" ".join(tables.most_hurt(groups, measure, columns))),
        *([Figure(BESIDE, "Mean ± sd of the seeds; up and to the right is better.",
                  "What a method keeps of the retain corpus, and what the rest of the model pays.")] if drawn else []),
        *([Table(matched, tables.best_cells(matched, shown))] if len(shown) > 1 else []),
    ]  # fmt: skip


def general(groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None) -> list[Block]:
    """The tasks of lm-evaluation-harness, if some run was evaluated on them."""
    columns = list(tables.general_of(groups).columns)
    if not columns:
        return []
    return [
        Heading("General ability"),
        Text("Tasks of lm-evaluation-harness, scored by it: what the model could do before it learned either corpus, "
             "which nothing in the training protects unless the retain corpus covers it. "
             f"{tables.LOWER}: lower is better, and the score is not in [0, 1]."),
        Text(" ".join(tables.most_hurt(groups, measure, columns))),
        Table(tables.matched_table(groups, measure, [measure.retain, *columns], target)),
    ]  # fmt: skip
