"""MkDocs hooks: pages that live outside docs/, and references that are read from the code when the site is built.

Imports no mkdocs at the top, so that tests read the references without it.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # mkdocs runs from its own environment

from pipeline.config.explain import is_table  # noqa: E402
from pipeline.config.schema import RunConfig  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# Files of the repository that are pages of the site, by their place there.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "architecture.md": "ARCHITECTURE.md",
    "changelog.md": "CHANGELOG.md",
    "reference/deepspeed-files.md": "ds_configs/README.md",
}
COMMANDS = (
    "pipeline.train",
    "pipeline.plan",
    "eval.run",
    "eval.chat",
    "eval.report",
    "eval.frontier",
    "eval.reproduce",
    "eval.leaderboard",
    "eval.robustness",
    "eval.bios",
    "pipeline.planning.step_cost",
    "pipeline.planning.device_check",
)
KEYS_OF_TRAIN = "configuration keys and defaults"  # in its --help; the configuration reference has them
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
TYPES = {str: "text", int: "integer", float: "number", bool: "true, false", NoneType: "null"}


def kind(annotation: Any) -> str:
    """The values that a key takes, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return ", ".join(kind(argument) for argument in arguments)
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return f"{{{kind(arguments[0])}: {kind(arguments[1])}}}"
    return TYPES[annotation]


def limits(field: FieldInfo) -> str:
    """The bounds of a number, as `≥ 1`."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        (sign, getattr(limit, name)) for limit in field.metadata for name, sign in signs.items() if hasattr(limit, name)
    ]
    return ", ".join(f"{sign} {value}" for sign, value in found)


def in_yaml(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else str(value)


def cell(text: str) -> str:
    """Text of a table: what Markdown would take for its own is escaped."""
    return re.sub(r"([|*<\\])", r"\\\1", text)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    options = (field.annotation, *get_args(field.annotation))
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


def configuration_reference(section: type[BaseModel] = RunConfig, prefix: str = "") -> str:
    """Every key of a run's configuration: a heading and a table a section."""
    rows, parts = [], []
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is not None:
            below = f"{prefix}{name}.NAME" if is_table(field.annotation) else f"{prefix}{name}"
            meaning = f"{cell(field.description)}\n\n" if field.description and is_table(field.annotation) else ""
            parts.append(f"## `{below}`\n\n{meaning}{configuration_reference(inner, f'{below}.')}")
            continue
        default = "required" if field.is_required() else f"`{in_yaml(field.default)}`"
        values = " ".join(filter(None, (kind(field.annotation), limits(field))))
        rows.append(f"| `{prefix}{name}` | {values} | {default} | {cell(field.description or '')} |")
    table = ["| key | values | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([*(table if rows else []), "", *parts])


def command_reference() -> str:
    """What each command prints under --help."""
    environment = {**os.environ, "COLUMNS": "100"}
    parts = []
    for name in COMMANDS:
        command = [sys.executable, "-m", name, "--help"]
        text = subprocess.check_output(command, cwd=REPOSITORY, env=environment, text=True)
        parts.append(f"## `{name}`\n\n```text\n{text.partition(KEYS_OF_TRAIN)[0].rstrip()}\n```\n")
    return "\n".join(parts)


GENERATED = {"<!-- configuration -->": configuration_reference, "<!-- commands -->": command_reference}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside docs/."""
    from mkdocs.structure.files import File

    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the references in place of their marks, and turn links of the repository into links of the site."""
    for mark, reference in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, reference())
    return LINK.sub(lambda match: link_of_the_site(page.file.src_uri, match[1]), markdown)


def link_of_the_site(page: str, target: str) -> str:
    """A relative link in `page`, as it is on GitHub, for the site."""
    source = OUTSIDE.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    inside = {file: name for name, file in OUTSIDE.items()}.get(path, path.removeprefix("docs/"))
    return posixpath.relpath(inside, posixpath.dirname(page) or ".")
