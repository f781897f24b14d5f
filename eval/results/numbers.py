"""Scores as every report prints them: in the terminal, in Markdown, on the page and in sentences."""

from __future__ import annotations

ROUNDING = 1e-12  # of the mean: equal scores of which some were interpolated differ by less


def printed(score: float, digits: int = 3) -> str:
    """The score to `digits` decimals; one of which these would show less than two digits, to two significant digits."""
    return f"{score:.2g}" if 0 < abs(score) < 10 ** (1 - digits) else f"{score:.{digits}f}"


def with_spread(mean: float, sd: float | None) -> str:
    """mean ± sd; sd with the decimals of the mean, or to one significant digit if these would show it as 0."""
    text = printed(mean)
    if sd is None:
        return text
    sd = sd if sd > ROUNDING * abs(mean) else 0.0
    spread = printed(sd) if "e" in text else f"{sd:.{len(text.partition('.')[2])}f}"
    return f"{text} ± {f'{sd:.1g}' if sd and not float(spread) else spread}"
