"""Figures with a point for each method: where its runs end, and what of the rest it retains at the level."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from eval.reporting.charts import GREY, Chart, Look, Panel, Trace
from eval.reporting.figures import RULES, Groups, Style, axes_of, compared, marks_of, panels, styles, target_trace
from eval.results import paper
from eval.results.grouping import plain_of
from eval.results.metrics import ForgetRetainMetric, readable
from eval.results.numbers import with_spread
from eval.results.stats import summarise
from eval.results.trajectories import Scores, matched


def points(groups: Groups, measure: ForgetRetainMetric, target: Scores | None) -> Chart:
    """The paper's Figures 3 and 4: where each method ends, mean ± sd of seeds; the paper's own points as outlines."""
    style, both = styles(groups), (measure.forget, measure.retain)
    x_axis, y_axis = axes_of(measure)
    panel = Panel("", f"{x_axis}, at the end", y_axis, marks=marks_of(measure, target))
    ends = {name: [[run.trajectory[-1][key] for run in runs] for key in both] for name, runs in groups.items()}
    centre = {name: (fmean(x), fmean(y)) for name, (x, y) in ends.items()}
    joined = "to sum with the same settings"
    for name in ends:
        plain = plain_of(name, groups)
        if plain:
            x, y = zip(centre[plain], centre[name], strict=True)
            panel.traces.append(Trace(x, y, GREY, joined, faint=True))
            joined = ""
    for name, (x, y) in ends.items():
        spread = [summarise(values)["sd"] or 0.0 for values in (x, y)]
        hover = [
            f"{name}: forget {with_spread(centre[name][0], spread[0])}, "
            f"retain {with_spread(centre[name][1], spread[1])}"
        ]
        errors = ([spread[0]], [spread[1]])
        x, y = ([value] for value in centre[name])
        panel.traces.append(Trace(x, y, style[name].look, name, lines=False, markers=True, hover=hover, errors=errors))
    panel.traces.extend(papers_points(measure))
    panel.traces.extend(target_trace(measure, target))
    return Chart(f"Where each method ends, mean ± sd of its seeds: {compared(groups)}", [panel], same_axes=True)


def papers_points(measure: ForgetRetainMetric) -> list[Trace]:
    """The rows of the paper's tables, each with the marker of its rule."""
    both, found = (measure.forget, measure.retain), []
    for name, scores in paper.rows(measure.suite).items():
        if all(key in scores for key in both) and not name.endswith("target"):
            shape = next((shape for rule, (_, shape) in RULES.items() if name.lower().endswith(rule)), RULES["sum"][1])
            x, y = ([scores[key]] for key in both)
            label = "" if found else "the paper's, by the same markers"
            look = Look("#888888", marker=shape)
            found.append(Trace(x, y, look, label, lines=False, markers=True, hover=[name], open=True))
    return found


def beside_retain(groups: Groups, measure: ForgetRetainMetric, scores: Sequence[str]) -> Chart:
    """The retain score against each of the `scores` at the level, mean ± sd of the seeds that reach it.

    One row of panels for each pair of objectives. Up and to the right is better: what a rule gains on the retain
    corpus, and what the rest of the model pays.
    """
    style, found = styles(groups), []
    for objective, names in panels(groups).items():
        for score in scores:
            both = measure.retain, score
            x, y = (f"{readable(one)}, at the level" for one in both)
            panel = Panel(objective, x, y)
            for name in names:
                points = [p for run in groups[name] if (p := matched(run.trajectory, measure)) and score in p]
                if points:
                    panel.traces.append(mean_point(name, style[name], points, both))
            if panel.traces:
                found.append(panel)
    title = f"The retain corpus and what neither corpus covers: {compared(groups)}"
    return Chart(title, found, max(len(scores), 1))


def mean_point(name: str, style: Style, points: Sequence[Scores], scores: tuple[str, str]) -> Trace:
    """The mean of the points in two scores, ± sd, with the method's name beside it."""
    (x, right), (y, up) = (
        (of["mean"] or 0.0, of["sd"] or 0.0) for of in (summarise(p[score] for p in points) for score in scores)
    )
    hover = f"{name}: {readable(scores[0])} {with_spread(x, right)}, {readable(scores[1])} {with_spread(y, up)}"
    look, errors, name = style.look, ([right], [up]), style.label.replace("synthesis.", "")
    return Trace([x], [y], look, lines=False, markers=True, hover=[hover], errors=errors, name=name)
