"""A report as blocks, and blocks as Markdown, as one HTML file that needs no network, or as text for a terminal."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Warn:
    """A text that a reader must not miss."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first is the header; rows whose first cell begins with "paper" look different."""

    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """A PNG file beside the report, and its caption."""

    file: str
    caption: str


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Text | Warn | Table | Figure | Code


STYLESHEET = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c1f23;--faint:#5b6470;--line:#d5d9de;--soft:#f3f5f7;--warn:#fff4d6;
--edge:#c98a00;--link:#0b5cad}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e4e7eb;--faint:#9aa4b0;--line:#353b43;--soft:#1f242a;
--warn:#3a2f10;--edge:#d9a441;--link:#7db7f2}}
body{font:16px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1em;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
a{color:var(--link)}nav ol{columns:20em;column-gap:2.5em;padding-left:1.5em}h2{margin-top:2.2em;
border-top:1px solid var(--line);padding-top:.6em;line-height:1.25}
.wide{overflow-x:auto;margin:1em 0;overflow-wrap:normal}table{border-collapse:collapse;font-size:.92em;
font-variant-numeric:tabular-nums}
td,th{padding:.3em .8em;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{vertical-align:bottom}td.words,th.words{text-align:left}td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
@media(max-width:40em){td:first-child,th:first-child{white-space:normal;overflow-wrap:anywhere;min-width:8em;max-width:11em}
td,th{padding:.3em .5em}}
tr.paper td{color:var(--faint);font-style:italic}
figure{margin:1em 0}figure div{overflow-x:auto}figure img{max-width:100%;min-width:min(40em,100vw*1.7);height:auto;
background:#fff;border-radius:4px}
figcaption{color:var(--faint);font-size:.92em}
.warn{background:var(--warn);border-left:4px solid var(--edge);padding:.6em .9em;margin:1em 0}
pre{background:var(--soft);padding:.8em;overflow-x:auto;font-size:.85em;overflow-wrap:normal;max-height:30em}
"""


def as_markdown(blocks: Iterable[Block]) -> str:
    """Markdown with pipe tables; figures are links to the PNG files beside it."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Table(rows):
                header, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
                lines = [header, ["---"] * len(header), *body]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            case Figure(file, caption):
                parts.append(f"![{caption}]({file})\n\n*{caption}*")
            case Code(text):
                parts.append(f"```\n{text}\n```")
            case Warn(text):
                parts.append(f"> **Note.** {text}")
            case Text(text):
                parts.append(text)
    return "\n\n".join(parts) + "\n"


def table_html(rows: list[list[str]]) -> str:
    """A table whose first row is its header, with every cell escaped; a wide table scrolls by itself."""
    number = re.compile(r"[-–]?\.?\d|–|not reached")
    wordy = [sum(not number.match(cell) for cell in column) > len(rows) / 2 for column in zip(*rows, strict=True)]
    lines = []
    for at, row in enumerate(rows):
        tag = "td" if at else 'th scope="col"'
        starts = [f"<{tag} class=words>" if words else f"<{tag}>" for words in wordy]
        cells = "".join(f"{start}{html.escape(cell)}</{tag[:2]}>" for start, cell in zip(starts, row, strict=True))
        kind = ' class="paper"' if row[0].startswith("paper") else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    head, body = lines[0], "\n".join(lines[1:])
    return f'<div class="wide" tabindex="0"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def prose(text: str) -> str:
    """The text escaped, with code where it has backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def anchor(text: str) -> str:
    """A heading as the fragment of an address: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def as_html(title: str, blocks: list[Block], images: Mapping[str, bytes]) -> str:
    """One HTML page that contains its table of contents, style and figures, so that one file is enough."""
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    entries = "".join(f'<li><a href="#{anchor(text)}">{html.escape(text)}</a></li>' for text in headings)
    parts = [f"<h1>{html.escape(title)}</h1>", f'<nav aria-label="Contents"><ol>{entries}</ol></nav>']
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f'<h2 id="{anchor(text)}">{html.escape(text)}</h2>')
            case Table(rows):
                parts.append(table_html(rows))
            case Figure(file, caption):
                data, words = base64.b64encode(images[file]).decode(), html.escape(caption)
                image = f'<img alt="{words}" src="data:image/png;base64,{data}">'
                parts.append(f'<figure><div tabindex="0">{image}</div><figcaption>{words}</figcaption></figure>')
            case Code(text):
                parts.append(f'<pre tabindex="0">{html.escape(text)}</pre>')
            case Warn(text):
                parts.append(f'<p class="warn">{prose(text)}</p>')
            case Text(text):
                parts.append(f"<p>{prose(text)}</p>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLESHEET}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(parts) + "</body></html>\n"


def as_text(rows: list[list[str]]) -> str:
    """A table for the terminal, its columns aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def png(figure: Drawing) -> bytes:
    """The figure as PNG bytes, drawn by Agg (no display needed)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
