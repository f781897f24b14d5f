"""A figure as data: panels, and what is drawn in them. `pictures.py` draws it for documents, `interactive.py` for the
page, so that both show the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Dashes = str | tuple[int, tuple[int, ...]]  # a line style of matplotlib


@dataclass(frozen=True)
class Look:
    """How a method is drawn in every figure: its own colour, dashes and marker (of its rule, filled as its number)."""

    colour: str
    dashes: Dashes = "-"
    marker: str = "o"  # of matplotlib
    fill: str = "full"


GREY = Look("#7f7f7f", "--", "X")


@dataclass(frozen=True)
class Trace:
    """Points in order, joined by a line, marked, or both."""

    x: Sequence[float]
    y: Sequence[float]
    look: Look
    label: str = ""  # in the legend; none without one
    lines: bool = True
    markers: bool = False
    hover: Sequence[str] = ()  # a text for each point
    errors: tuple[Sequence[float], Sequence[float]] | None = None  # ± in x and in y
    band: tuple[Sequence[float], Sequence[float]] | None = None  # lower and upper edge of a shaded band
    faint: bool = False
    open: bool = False  # markers as outlines
    name: str = ""  # written beside the last point, in place of a legend


@dataclass(frozen=True)
class Mark:
    """A straight line across the panel, with a legend entry."""

    at: float
    vertical: bool
    label: str
    dashes: Dashes = "--"


@dataclass(frozen=True)
class Panel:
    """Axes with what is drawn in them."""

    title: str
    x: str
    y: str
    traces: list[Trace] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    ticks: Sequence[str] = ()  # names of x = 0, 1, ..., in place of numbers


@dataclass(frozen=True)
class Chart:
    """A figure: its title names what was compared."""

    title: str
    panels: list[Panel]
    columns: int = 1
    same_axes: bool = False
