"""Every figure of the reports: one panel for each pair of objectives, with runs on one of the two alone in the same
panel. A rule has the same colour and marker in all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.results import paper
from eval.results.grouping import plain_of
from eval.results.metrics import ForgetRetainMetric
from eval.results.stats import summarise
from eval.results.trajectories import Run, Scores, at_level, mean_of, step_means
from pipeline.files import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Groups = Mapping[str, list[Run]]  # method -> its seeds


# Rule -> a colour that also differs in lightness, and a marker.
RULES = {
    "sum": ("#d55e00", "o"),
    "pcgrad": ("#0072b2", "s"),
    "sago": ("#009e73", "*"),
    "blur": ("#cc79a7", "D"),
    "gru": ("#7a5195", "^"),
}


OTHER_RULE = ("#555555", "v")


Dashes = str | tuple[int, tuple[int, ...]]  # a line style of matplotlib


DASHES: tuple[Dashes, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
)  # settings of one rule in one panel


FILLS = ("full", "none", "left", "top", "right", "bottom")


@dataclass(frozen=True)
class Style:
    """How a method is drawn: in the panel of its objectives, in the colour and with the marker of its rule."""

    objective: str
    label: str
    colour: str
    dashes: Dashes
    marker: dict[str, str | int]


def styles(groups: Groups) -> dict[str, Style]:
    """{method: style}; settings of one rule in one panel differ in their dashes and in the fill of their marker."""
    seen: dict[tuple[str, str], int] = {}
    found = {}
    pairs = [runs[0].objective for runs in groups.values() if runs[0].rule]
    for name, runs in groups.items():
        run, rule = runs[0], str(runs[0].rule)
        panel = run.objective if run.rule else next((p for p in pairs if run.objective in p.split("+")), run.objective)
        number = seen[panel, rule] = seen.get((panel, rule), -1) + 1
        colour, shape = RULES.get(rule, OTHER_RULE)
        marker: dict[str, str | int] = {
            "marker": shape,
            "markersize": 11 if shape == "*" else 7,
            "fillstyle": FILLS[number % len(FILLS)],
        }
        label = name.removeprefix(f"{run.objective} ")
        found[name] = Style(panel, label, colour, DASHES[number % len(DASHES)], marker)
    return found


def panels(groups: Groups) -> dict[str, list[str]]:
    """{objectives: its methods}."""
    found: dict[str, list[str]] = {}
    for name, style in styles(groups).items():
        found.setdefault(style.objective, []).append(name)
    return found


def empty(rows: int, columns: int, width: float, height: float, share: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure of panels [rows, columns] with a faint grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def legend(axis: Axes) -> None:
    """Draw a legend in the panel, or beside it if it would cover the panel."""
    handles, _ = axis.get_legend_handles_labels()
    if len(handles) > 5:
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif handles:
        axis.legend(fontsize="small")


def frontier_panels(
    groups: Groups, measure: ForgetRetainMetric, target: Scores | None
) -> tuple[Figure, list[tuple[Axes, str, list[str]]]]:
    """A figure of forget against retain, with level and target marked, and its panels: (axes, objectives, methods)."""
    by_objective = panels(groups)
    columns = min(3, len(by_objective))
    wide, high = (8.0, 5.0) if columns == 1 else (5.2, 4.2)
    figure, axes = empty(math.ceil(len(by_objective) / columns), columns, wide, high, share=True)
    for axis in axes.flat[len(by_objective) :]:
        axis.set_visible(False)
    figure.supxlabel(f"{measure.forget} (lower: more forgotten)", fontsize="medium")
    figure.supylabel(f"{measure.retain} (higher: more retained)", fontsize="medium")
    found = []
    for axis, (objective, names) in zip(axes.flat, by_objective.items(), strict=False):
        mark_axes(axis, measure, target)
        axis.set(title=objective)
        axis.tick_params(labelbottom=True)
        found.append((axis, objective, names))
    return figure, found


def draw_frontier(groups: Groups, measure: ForgetRetainMetric, target: Scores | None) -> Figure:
    """Forget against retain score along each run, one panel per pair of objectives, with the points at the level."""
    style = styles(groups)
    figure, found = frontier_panels(groups, measure, target)
    for axis, _, names in found:
        for name in names:
            own = style[name]
            for run in groups[name]:
                x, y = ([scores[key] for scores in run.trajectory] for key in (measure.forget, measure.retain))
                axis.plot(x, y, color=own.colour, linestyle=own.dashes, linewidth=0.9, alpha=0.7)
            points = [point for run in groups[name] if (point := at_level(run.trajectory, measure))]
            x, y = ([point[key] for point in points] for key in (measure.forget, measure.retain))
            options: dict[str, Any] = {**own.marker, "color": own.colour}
            axis.plot(x, y, linestyle="", **options)
            text = own.label + ("" if points else " (not reached)")
            axis.plot([], [], linestyle=own.dashes, linewidth=0.9, label=text, **options)
        legend(axis)
    return figure


def mark_axes(axis: Axes, measure: ForgetRetainMetric, target: Scores | None) -> None:
    """Mark the level, chance, and the target model."""
    axis.axvline(measure.level, color="grey", linestyle="--", linewidth=1)
    if measure.chance is not None:
        axis.axvline(measure.chance, color="grey", linestyle=":", linewidth=1)
    if target:
        axis.axhline(target[measure.retain], color="grey", linewidth=0.8, alpha=0.6)
        axis.plot(
            [target[measure.forget]], [target[measure.retain]], color="black", marker="X", markersize=9, linestyle=""
        )


def draw_points(groups: Groups, measure: ForgetRetainMetric, target: Scores | None) -> Figure:
    """The paper's Figures 3 and 4: where each method ends, mean ± sd of seeds; its own points hollow."""
    style, both = styles(groups), (measure.forget, measure.retain)
    figure, axes = empty(1, 1, 9, 5.6)
    axis = axes[0, 0]
    ends = {name: [[run.trajectory[-1][key] for run in runs] for key in both] for name, runs in groups.items()}
    centre = {name: (fmean(x), fmean(y)) for name, (x, y) in ends.items()}
    hues = {objective: f"C{number}" for number, objective in enumerate(panels(groups))}
    for name, (x, y) in ends.items():
        own, plain = style[name], plain_of(name, groups)
        if plain:
            axis.plot(
                *zip(centre[plain], centre[name], strict=True), color=hues[own.objective], linestyle="--", zorder=1
            )
        spread = [summarise(values)["sd"] or 0.0 for values in (x, y)]
        options: dict[str, Any] = {**own.marker, "color": hues[own.objective], "elinewidth": 0.8, "linestyle": ""}
        axis.errorbar(*centre[name], xerr=spread[0], yerr=spread[1], label=name, **options)
    text = "the paper's, by the same markers"
    for name, scores in paper.rows(measure.suite).items():
        if all(key in scores for key in both) and not name.endswith("target"):
            shape = next((shape for rule, (_, shape) in RULES.items() if name.lower().endswith(rule)), RULES["sum"][1])
            axis.scatter(
                *(scores[key] for key in both), marker=shape, s=40, color="none", edgecolors="grey", label=text
            )
            text = None
    mark_axes(axis, measure, None)
    if target:
        axis.axhline(target[measure.retain], color="grey", linestyle="--", linewidth=1, label="target model")
    axis.set(xlabel=f"{measure.forget} at the end (lower: more forgotten)", ylabel=f"{measure.retain} at the end")
    legend(axis)
    return figure


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean over the last twentieth of the steps, float64, same length: single steps are too noisy to read."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curves(groups: Groups, numbers: Mapping[str, str]) -> Figure:
    """Logged numbers ({key: title}) against the step, two panels abreast, for each pair of objectives in turn."""
    style = styles(groups)
    wanted = [(objective, names, key) for objective, names in panels(groups).items() for key in numbers]
    figure, axes = empty(math.ceil(len(wanted) / 2), 2, 5.6, 3.2)
    for axis, (objective, names, key) in zip(axes.flat, wanted, strict=True):
        for name in names:
            steps, values = step_means(groups[name], key)
            if steps:
                own = style[name]
                line: dict[str, Any] = {"color": own.colour, "linestyle": own.dashes, "linewidth": 1.2}
                axis.plot(steps, running_mean(values), label=own.label, **line)
        axis.set_title(f"{objective}: {numbers[key]}", fontsize="medium")
        axis.set(xlabel="step")
        if not axis.lines:
            axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes, color="grey")
    for row in axes:
        legend(row[-1])
    return figure


def layers_of(runs: Iterable[Run], key: str) -> list[str]:
    """The layers for which `key` was logged, in the order of the log."""
    found = dict.fromkeys(name for run in runs for step in run.steps for name in step if name.startswith(f"{key}/"))
    return [name.removeprefix(f"{key}/") for name in found]


def draw_layers(groups: Groups, numbers: Mapping[str, str]) -> Figure:
    """Logged numbers of each layer, means over the steps that logged them: one row per pair of objectives."""
    style, by_objective = styles(groups), panels(groups)
    runs = [run for members in groups.values() for run in members]
    layers = layers_of(runs, next(iter(numbers)))
    figure, axes = empty(len(by_objective), len(numbers), 5.2, 3.4)
    for row, (objective, names) in zip(axes, by_objective.items(), strict=True):
        for axis, (key, title) in zip(row, numbers.items(), strict=True):
            for name in names:
                own = style[name]
                values = [
                    [m for run in groups[name] if (m := mean_of(run, f"{key}/{layer}")) is not None] for layer in layers
                ]
                means = [fmean(v) if v else math.nan for v in values]
                axis.plot(
                    range(len(layers)), means, color=own.colour, linestyle=own.dashes, marker=".", label=own.label
                )
            axis.set(title=f"{objective}: {title}")
            shown = range(0, len(layers), max(1, len(layers) // 16))
            names_shown = [layers[i].removeprefix("model.") for i in shown]
            axis.set_xticks([*shown], names_shown, rotation=60, fontsize="x-small")
        legend(row[-1])
    return figure


def matched_curve(trajectories: Sequence[list[Scores]], measure: ForgetRetainMetric) -> tuple[np.ndarray, np.ndarray]:
    """(levels, retain at each level and seed): forget levels, shape (k,), that every seed passes, and shape (n, k)."""
    highest = min(trajectory[0][measure.forget] for trajectory in trajectories)
    lowest = max(min(scores[measure.forget] for scores in trajectory) for trajectory in trajectories)
    levels = np.linspace(highest, lowest, 60) if lowest < highest else np.array([])
    at = [ForgetRetainMetric(measure.forget, measure.retain, float(level)) for level in levels]
    points = [[at_level(trajectory, one) for one in at] for trajectory in trajectories]
    # Rounding can put the last level just below the lowest score: then no point exists, and nan is not drawn.
    return levels, np.array([[p[measure.retain] if p else math.nan for p in row] for row in points])


def draw_best(best: Groups, front: Sequence[Json], measure: ForgetRetainMetric, target: Scores | None) -> Figure:
    """Forget against retain: for each method's best setting the mean over seeds at each level, ± sd shaded."""
    style = styles(best)
    figure, found = frontier_panels(best, measure, target)
    for axis, _, names in found:
        for name in names:
            own = style[name]
            trajectories = [run.trajectory for run in best[name]]
            reached = any(at_level(trajectory, measure) for trajectory in trajectories)
            label = name + ("" if reached else " (never reaches the level)")
            levels, retained = matched_curve(trajectories, measure)
            mean = retained.mean(axis=0) if len(levels) else levels
            axis.plot(levels, mean, color=own.colour, linestyle=own.dashes, label=label)
            if len(retained) > 1 and len(levels):
                spread = retained.std(axis=0, ddof=1)
                axis.fill_between(levels, mean - spread, mean + spread, color=own.colour, alpha=0.2, linewidth=0)
        x, y = ([point[key] for point in front] for key in ("forget", "retain"))
        axis.scatter(x, y, color="black", s=10, zorder=3, label="no point of any setting is better")
        legend(axis)
    return figure
