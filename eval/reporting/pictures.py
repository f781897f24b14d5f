"""Charts as PNG, by matplotlib: for documents, for `report.md`, and for a browser that does not draw the charts."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from eval.reporting.charts import Chart, Panel, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_TICKS = 16  # names of layers on an axis
MOST_INSIDE = 6  # entries of a legend in the panel; a longer one stands below it, so that panels have their whole width
LINE = 0.19  # inches of an entry
NAME_LETTER, NAME_HIGH, NAME_GAP = 0.0135, 0.04, 0.015  # of a name beside a point, in shares of a panel of two abreast
NAME_LINES = (0, -1, 1, -2, 2, -3, 3, -4, 4)  # lines above a point, the first that is free
BELOW, BELOW_NAMES = -0.6, -1.1  # inches: under the numbers of an axis, or under the names of layers


def draw(chart: Chart) -> Figure:
    """The chart as a matplotlib figure."""
    from matplotlib.figure import Figure

    columns = min(chart.columns, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    wide, high = (8.6, 5.2) if columns == 1 else (5.6, 4.0)
    longest = max(sum(bool(one.label) for one in (*panel.marks, *panel.traces)) for panel in chart.panels)
    high += LINE * longest if longest > MOST_INSIDE else 0
    figure = Figure(figsize=(wide * columns, high * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=chart.same_axes, sharey=chart.same_axes)
    for axis in axes.flat[len(chart.panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, chart.panels, strict=False):
        draw_panel(figure, axis, panel)
    figure.suptitle(chart.title, fontsize="large")
    return figure


def draw_panel(figure: Figure, axis: Axes, panel: Panel) -> None:
    axis.grid(alpha=0.3)
    for mark in panel.marks:
        line = axis.axvline if mark.vertical else axis.axhline
        line(mark.at, color="grey", linestyle=mark.dashes, linewidth=1, label=mark.label)
    for trace in panel.traces:
        draw_trace(axis, trace)
    axis.set(xlabel=panel.x, ylabel=panel.y)
    if panel.title:
        axis.set_title(panel.title, fontsize="medium")
    axis.tick_params(labelbottom=True)
    if panel.ticks:
        shown = range(0, len(panel.ticks), max(1, len(panel.ticks) // MOST_TICKS))
        axis.set_xticks([*shown], [panel.ticks[i] for i in shown], rotation=60, fontsize="x-small")
    if not panel.traces:
        axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes, color="grey")
    name_points(axis, [trace for trace in panel.traces if trace.name])
    legend(figure, axis, bool(panel.ticks))


def name_points(axis: Axes, traces: list[Trace]) -> None:
    """The names beside the points: as near as there is room in the panel beside other names."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    taken: list[tuple[float, float, float]] = []  # left, lower edge and width of a name, in shares of the panel
    for trace in sorted(traces, key=lambda trace: (trace.y[-1], trace.x[-1])):
        x, y = (trace.x[-1] - left) / (right - left), (trace.y[-1] - bottom) / (top - bottom)
        wide = NAME_LETTER * len(trace.name)
        places = [(at, y + NAME_HIGH * line) for line in NAME_LINES for at in (x + NAME_GAP, x - NAME_GAP - wide)]
        free = [
            (a, b)
            for a, b in places
            if 0 <= a <= 1 - wide
            and 0 <= b <= 1 - NAME_HIGH
            and not any(a < c + w and c < a + wide and abs(b - d) < NAME_HIGH for c, d, w in taken)
        ]
        place = (free or places)[0]
        taken.append((*place, wide))
        name = axis.text(*place, trace.name, transform=axis.transAxes, fontsize="x-small")
        name.set_in_layout(False)  # a name that finds no room takes none from the panel


def draw_trace(axis: Axes, trace: Trace) -> None:
    look = trace.look
    options: dict[str, Any] = {"color": look.colour, "linewidth": 0.9 if trace.faint else 1.3}
    options |= {"alpha": 0.7 if trace.faint else 1.0, "linestyle": look.dashes if trace.lines else ""}
    if trace.markers:
        options |= {"marker": look.marker, "markersize": 11 if look.marker == "*" else 7}
        options |= {"fillstyle": "none" if trace.open else look.fill}
    if trace.label:
        options["label"] = trace.label
    if trace.errors is None:
        axis.plot(trace.x, trace.y, **options)
    else:
        axis.errorbar(trace.x, trace.y, xerr=trace.errors[0], yerr=trace.errors[1], elinewidth=0.8, **options)
    if trace.band is not None:
        axis.fill_between(trace.x, *trace.band, color=look.colour, alpha=0.2, linewidth=0)


def legend(figure: Figure, axis: Axes, named: bool) -> None:
    """A legend in the panel, or below its axis, which may have `named` ticks, if it would cover the panel."""
    handles, _ = axis.get_legend_handles_labels()
    if len(handles) > MOST_INSIDE:
        from matplotlib.transforms import ScaledTranslation

        down = ScaledTranslation(0, BELOW_NAMES if named else BELOW, figure.dpi_scale_trans)
        place = {"bbox_to_anchor": (0.0, 0.0), "bbox_transform": axis.transAxes + down}
        axis.legend(fontsize="x-small", loc="upper left", **place)
    elif handles:
        axis.legend(fontsize="small")


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, drawn by Agg (no display needed)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
