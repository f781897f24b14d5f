"""A report as blocks, and blocks as Markdown, as one HTML file that needs no network, or as text for a terminal."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from eval.reporting.answers import Answers, answers_html, answers_markdown
from eval.reporting.charts import Chart
from eval.reporting.interactive import script_of
from eval.reporting.stylesheet import STYLESHEET


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
class Finding:
    """A part of the verdict. compares: some run reached the level, so that there is something to compare."""

    text: str
    compares: bool


@dataclass(frozen=True)
class Verdict:
    """What the report found. The edge of a finding that compares nothing has another colour and is dashed."""

    findings: list[Finding]


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first is the header; rows whose first cell begins with "paper" look different, and
    the cells (row, column) of `best` are bold."""

    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A PNG file beside the report, its caption, and the text that stands beside it where there is room."""

    file: str
    caption: str
    beside: str = ""


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Text | Warn | Verdict | Table | Figure | Code | Answers


def as_markdown(blocks: Iterable[Block]) -> str:
    """Markdown with pipe tables; figures are links to the PNG files beside it."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Table():
                parts.append(table_markdown(block))
            case Figure(file, caption, beside):
                parts += [*([beside] if beside else []), f"![{caption}]({file})\n\n*{caption}*"]
            case Code(text):
                parts.append(f"```\n{text}\n```")
            case Warn(text):
                parts.append(f"> **Note.** {text}")
            case Verdict(findings):
                parts.append("\n".join(f"- {finding.text}" for finding in findings))
            case Answers():
                parts.append(answers_markdown(block))
            case Text(text):
                parts.append(text)
    return "\n\n".join(parts) + "\n"


def table_markdown(table: Table) -> str:
    lines = []
    for at, row in enumerate(table.rows):
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append([f"**{cell}**" if (at, place) in table.best else cell for place, cell in enumerate(cells)])
    header, *body = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body))


def table_html(table: Table) -> str:
    """A table whose first row is its header, with every cell escaped; a wide table scrolls by itself."""
    number = re.compile(r"[-–]?\.?\d|–|not reached")
    rows = table.rows
    wordy = [sum(not number.match(cell) for cell in column) > len(rows) / 2 for column in zip(*rows, strict=True)]
    lines = []
    for at, row in enumerate(rows):
        tag = "td" if at else 'th scope="col"'
        cells = []
        for place, (words, cell) in enumerate(zip(wordy, row, strict=True)):
            text = html.escape(cell)
            start = f"<{tag} class=words>" if words else f"<{tag}>"
            cells.append(f"{start}{f'<b>{text}</b>' if (at, place) in table.best else text}</{tag[:2]}>")
        kind = ' class="paper"' if row[0].startswith("paper") else ""
        lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
    head, body = lines[0], "\n".join(lines[1:])
    return f'<div class="wide" tabindex="0"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def prose(text: str) -> str:
    """The text escaped, with code where it has backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def anchor(text: str) -> str:
    """A heading as the fragment of an address: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def figure_html(figure: Figure, image: bytes, title: str) -> str:
    """The picture, which the program of the page replaces by its chart, and beside it its text."""
    data, words = base64.b64encode(image).decode(), html.escape(f"{title}. {figure.caption}")
    picture = f'<div class="picture" tabindex="0"><img alt="{words}" src="data:image/png;base64,{data}"></div>'
    drawn = f'<figure data-chart="{figure.file}">{picture}<figcaption>{words}</figcaption></figure>'
    return f'<div class="beside"><p>{prose(figure.beside)}</p>{drawn}</div>' if figure.beside else drawn


def block_html(block: Block, images: Mapping[str, bytes], charts: Mapping[str, Chart]) -> str:
    match block:
        case Heading(text):
            return f'<h2 id="{anchor(text)}">{html.escape(text)}</h2>'
        case Table():
            return table_html(block)
        case Figure():
            return figure_html(block, images[block.file], charts[block.file].title)
        case Code(text):
            return f'<pre tabindex="0">{html.escape(text)}</pre>'
        case Warn(text):
            return f'<p class="warn">{prose(text)}</p>'
        case Verdict(findings):
            kinds = ("<li>" if finding.compares else '<li class="missed">' for finding in findings)
            items = [f"{kind}{prose(finding.text)}</li>" for kind, finding in zip(kinds, findings, strict=True)]
            return f'<ul class="verdict">{"".join(items)}</ul>'
        case Answers():
            return answers_html(block)
        case Text(text):
            return f"<p>{prose(text)}</p>"


def as_html(title: str, blocks: list[Block], images: Mapping[str, bytes], charts: Mapping[str, Chart]) -> str:
    """One HTML page that contains its contents, style, pictures and charts, so that one file is enough.

    What stands before the first heading comes before the table of contents.
    """
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    entries = "".join(f'<li><a href="#{anchor(text)}">{html.escape(text)}</a></li>' for text in headings)
    contents = f'<nav aria-label="Contents"><details><summary>Contents</summary><ol>{entries}</ol></details></nav>'
    first = next((at for at, block in enumerate(blocks) if isinstance(block, Heading)), len(blocks))
    parts = [block_html(block, images, charts) for block in blocks]
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts[:first], contents, *parts[first:]])
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLESHEET}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{script_of(charts)}</body></html>\n'


def as_text(rows: list[list[str]]) -> str:
    """A table for the terminal, its columns aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
