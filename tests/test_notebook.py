"""The notebook of the documents runs from its first cell to its last, and shows what it promises."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import REPOSITORY

pytestmark = pytest.mark.slow  # it trains three models: minutes; and needs tests/requirements-slow.txt
NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> Any:
    import nbformat  # pyright: ignore[reportMissingImports]

    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_runs_and_shows_scores_and_text(notebook: Any, tmp_path: Path) -> None:
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

    for part in ("pipeline", "eval", "launch", "ds_configs", "docs"):  # its runs stay out of the repository
        (tmp_path / part).symlink_to(REPOSITORY / part)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    resources = {"metadata": {"path": str(tmp_path)}}
    an_hour = 3600  # a cell that trains takes minutes, on a busy machine many
    NotebookClient(notebook, timeout=an_hour, resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure"
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    forgotten, kept = (first_words(part) for part in printed.split("to keep:"))
    for words in (forgotten, kept):  # the model before unlearning knows both answers
        assert words["before"] == words["text"]
    assert kept["sago"] == kept["text"] and forgotten["sago"] != forgotten["text"]


def first_words(printed: str) -> dict[str, str]:
    """Of a document, `text`, and of each model the first word of how it continues."""
    lines = [line.split(": ... ") for line in printed.splitlines() if ": ... " in line]
    return {name.strip(): answer.split()[0] for name, answer in lines}


def test_the_notebook_is_committed_without_outputs(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)
