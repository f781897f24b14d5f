"""Charts that answer to the mouse: specifications for Plotly, and the program that draws them inside the page.

Plotly's program is in the page, compressed, because a report is one file that needs no network. A browser that cannot
unpack it (without DecompressionStream, or without scripts) shows the pictures.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from eval.reporting.charts import Chart, Panel, Trace

SYMBOLS = {"o": "circle", "s": "square", "*": "star", "D": "diamond", "^": "triangle-up", "v": "triangle-down",
           "X": "x", ".": "circle"}  # fmt: skip


DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


Specification = dict[str, Any]


def figure_of(panel: Panel, ranges: Mapping[str, list[float]]) -> Specification:
    """{"data", "layout"} of one panel, as Plotly takes them; colours of text and grid come from the page."""
    data = [part for trace in panel.traces for part in parts_of(trace)]
    axes: dict[str, Specification] = {
        name: {"title": {"text": title}, **({"range": ranges[name]} if name in ranges else {})}
        for name, title in (("xaxis", panel.x), ("yaxis", panel.y))
    }
    if panel.ticks:
        axes["xaxis"] |= {"tickvals": [*range(len(panel.ticks))], "ticktext": [*panel.ticks], "nticks": 16}
    shapes = [
        {
            "type": "line",
            **{f"{moving}{end}": mark.at for end in (0, 1)},
            **{f"{spanning}{end}": end for end in (0, 1)},
            f"{spanning}ref": f"{spanning} domain",
            "line": {"color": "grey", "width": 1, "dash": dash_of(mark.dashes)},
            "name": mark.label,
            "showlegend": True,
        }
        for mark in panel.marks
        for moving, spanning in [("x", "y") if mark.vertical else ("y", "x")]
    ]
    return {"data": data, "layout": {"title": {"text": panel.title}, "shapes": shapes, **axes}}


def parts_of(trace: Trace) -> list[Specification]:
    """A trace of Plotly, after the band that belongs to it."""
    look = trace.look
    modes = [name for name, wanted in (("lines", trace.lines), ("markers", trace.markers)) if wanted]
    opened = "-open" if trace.open or look.fill == "none" else ""
    part: Specification = {
        **{"type": "scatter", "x": numbers(trace.x), "y": numbers(trace.y), "mode": "+".join(modes)},
        "line": {"color": look.colour, "dash": dash_of(look.dashes), "width": 1.2 if trace.faint else 2},
        "marker": {
            "color": look.colour,
            "symbol": SYMBOLS[look.marker] + opened,
            "size": 5 if look.marker == "." else 11,
        },
        "opacity": 0.75 if trace.faint else 1,
        "showlegend": bool(trace.label),
        "name": trace.label,
    }
    if trace.hover:
        part |= {"text": [*trace.hover], "hovertemplate": "%{text}<extra></extra>"}
    if trace.name:
        part |= {"mode": f"{part['mode']}+text", "textposition": "top right", "textfont": {"size": 10}}
        part["texttemplate"] = [""] * (len(trace.x) - 1) + [trace.name]
    if trace.errors is not None:
        for key, values in zip(("error_x", "error_y"), trace.errors, strict=True):
            part[key] = {"array": numbers(values), "color": look.colour, "thickness": 1}
    if trace.band is None:
        return [part]
    lower, upper = trace.band
    band = {
        **{"type": "scatter", "x": numbers([*trace.x, *reversed(trace.x)]), "y": numbers([*upper, *reversed(lower)])},
        **{"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": look.colour, "opacity": 0.2},
        **{"hoverinfo": "skip", "showlegend": False},
    }
    return [band, part]


def dash_of(dashes: object) -> str:
    return DASHES.get(dashes, "longdashdot") if isinstance(dashes, str) else "longdashdot"


def numbers(values: Iterable[float]) -> list[float | None]:
    """The values as JSON has them: no NaN, five digits."""
    return [float(f"{value:.5g}") if value == value else None for value in values]


def common_ranges(chart: Chart) -> dict[str, list[float]]:
    """The ranges that all panels of a chart with the same axes get, with a margin."""
    if not chart.same_axes:
        return {}
    found = {}
    for name, of in (("xaxis", 0), ("yaxis", 1)):
        values = [v for panel in chart.panels for trace in panel.traces for v in (trace.x, trace.y)[of] if v == v]
        values += [mark.at for panel in chart.panels for mark in panel.marks if mark.vertical == (of == 0)]
        margin = 0.05 * (max(values) - min(values)) or 0.05
        found[name] = [min(values) - margin, max(values) + margin]
    return found


def specification(chart: Chart) -> list[Specification]:
    """One figure of Plotly for each panel, so that a narrow page can put them below each other."""
    ranges = common_ranges(chart)
    return [figure_of(panel, ranges) for panel in chart.panels]


def script_of(charts: Mapping[str, Chart]) -> str:
    """HTML: the specifications by file name, Plotly's program, and what unpacks and runs it."""
    # In JSON inside HTML no text may close the element that holds it.
    described = json.dumps({file: specification(chart) for file, chart in charts.items()}).replace("<", "\\u003c")
    program = files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    packed = base64.b64encode(gzip.compress(program, mtime=0)).decode()
    return (
        f'<script type="application/json" id="charts">{described}</script>'
        f'<script type="text/plain" id="plotly">{packed}</script><script>{DRAW}</script>'
    )


DRAW = """
(async () => {
  if (!window.DecompressionStream) return;
  const packed = Uint8Array.from(atob(document.getElementById('plotly').textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  const program = document.createElement('script');
  program.textContent = await new Response(stream).text();
  document.head.append(program);
  const charts = JSON.parse(document.getElementById('charts').textContent);
  const touch = matchMedia('(pointer: coarse)').matches, dark = matchMedia('(prefers-color-scheme: dark)');
  const narrow = innerWidth < 600;
  const theme = () => {
    const style = getComputedStyle(document.documentElement), of = name => style.getPropertyValue(name).trim();
    const axis = {gridcolor: of('--line'), zerolinecolor: of('--line'), linecolor: of('--line'), automargin: true};
    return {ink: of('--ink'), faint: of('--faint'), axis};
  };
  const fold = axis => narrow ? {...axis, title: {text: axis.title.text.replace(' (', '<br>(')}} : axis;
  const drawn = [], LEGEND = 40;  // pixels of a legend of two lines, for which the height of a place is made
  const layout = panel => {
    const {ink, faint, axis} = theme(), {title, xaxis, yaxis, ...rest} = panel.layout;
    return {...rest, font: {color: ink, size: 12}, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
      title: {...title, font: {size: 14}, x: 0, xref: 'paper'}, margin: {l: 8, r: 12, t: title.text ? 40 : 12, b: 8},
      xaxis: {...axis, ...fold(xaxis)}, yaxis: {...axis, ...fold(yaxis)}, hovermode: 'closest',
      modebar: {bgcolor: 'rgba(0,0,0,0)', color: faint, activecolor: ink},
      legend: {orientation: 'h', y: 0, yref: 'container', yanchor: 'bottom', x: 0, font: {size: 11}},
      dragmode: touch || narrow ? false : 'zoom'};
  };
  const options = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ['select2d', 'lasso2d'],
    displayModeBar: narrow ? false : 'hover'};
  for (const figure of document.querySelectorAll('figure[data-chart]')) {
    const panels = charts[figure.dataset.chart];
    if (!panels) continue;
    const picture = figure.querySelector('.picture'), box = document.createElement('div');
    box.className = panels.length > 1 ? 'panels' : 'panels one';
    picture.after(box);
    // All places first: each takes its share of the row, and a drawing keeps the width that it began with.
    const places = panels.map(() => box.appendChild(document.createElement('div')));
    for (const [at, panel] of panels.entries()) {
      const place = places[at];
      await Plotly.newPlot(place, panel.data, layout(panel), options);
      const legend = place.querySelector('.legend .scrollbox');
      const taller = legend ? legend.getBBox().height - LEGEND : 0;
      if (taller > 0) {  // a long legend stands below the axes, and takes nothing of their height
        place.style.height = `${place.clientHeight + taller}px`;
        await Plotly.Plots.resize(place);
      }
      drawn.push([place, panel]);
    }
    picture.hidden = true;
  }
  dark.addEventListener('change', () => drawn.forEach(([place, panel]) => Plotly.relayout(place, layout(panel))));
  document.body.dataset.charts = drawn.length;
})();
"""
