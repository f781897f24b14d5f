"""Pictures: what a long legend leaves to the panels."""

from __future__ import annotations

import pytest

from eval.reporting.charts import Chart, Look, Panel, Trace
from eval.reporting.pictures import draw


@pytest.mark.parametrize("methods", [3, 18])
def test_panels_keep_their_size_whatever_the_legend(methods: int) -> None:
    name = "pcgrad synthesis.gamma=0.1 synthesis.scope=element: its runs (level not reached)"
    traces = [Trace([0.0, 1.0], [0.0, 1.0], Look("black"), f"{name} {number}") for number in range(methods)]
    panels = [Panel(str(number), "forgotten", "retained", traces) for number in range(3)]
    figure = draw(Chart("18 methods", panels, columns=3, same_axes=True))
    figure.draw_without_rendering()
    _, height = figure.get_size_inches()
    for axis in figure.axes:
        place = axis.get_position()
        assert place.width > 0.5 / 3 and place.height * height > 2.0
        entries = axis.get_legend()
        assert entries is not None
        box = entries.get_window_extent()
        assert box.y0 >= 0 and (methods == 3 or box.y1 < axis.get_window_extent().y0)
