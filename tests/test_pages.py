"""The pages as a site: links lead to what is there, and the references that docs/hooks.py writes have everything."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from docs import hooks
from pipeline.config.load import resolve
from pipeline.config.schema import REPOSITORY
from tests.test_documents import PAGES, copy_of_the_repository

LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them of plain headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for target, anchor in LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)):
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            dead.append(target + (f"#{anchor}" if anchor else ""))
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_no_link_is_dead(page: Path) -> None:
    assert not dead_links(page, page.read_text())


def test_a_dead_link_would_be_noticed() -> None:
    page = REPOSITORY / "docs" / "start.md"
    assert dead_links(page, "[a](../README.md) [b](log.md#nothing) [c](lost.md)") == ["log.md#nothing", "lost.md"]


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]  # pyright: ignore

    listed = pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    docs = REPOSITORY / "docs"
    assert sorted(listed) == sorted([*(str(file.relative_to(docs)) for file in docs.rglob("*.md")), *hooks.OUTSIDE])


def test_the_configuration_reference_has_every_key_and_its_default() -> None:
    def keys(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in tree.items():
            found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        return found

    one_set = [
        "--data.probes.NAME.path",
        "some/data",
        "--synthesis.confine.share",
        "0.5",
        "--optimizer.weight_decay",
        "0",
    ]
    config = resolve(REPOSITORY / "launch" / "recipes" / "custom.yaml", "lora_sago", one_set, reads_data=False)
    rows = [line.split(" | ") for line in hooks.configuration_reference().splitlines() if line.startswith("| `")]
    reference = {row[0].strip("| `"): row[2] for row in rows}
    assert sorted(reference) == sorted(keys(config.model_dump())) and len(rows) == len(reference)
    assert (reference["model.path"], reference["optimizer.max_grad_norm"]) == ("required", "`1.0`")
    assert (reference["train.epochs"], reference["synthesis.geometry"]) == ("`null`", "`false`")


def test_links_of_the_repository_become_links_of_the_site() -> None:
    assert hooks.link_of_the_site("index.md", "docs/guides/resume.md") == "guides/resume.md"
    assert hooks.link_of_the_site("guides/resume.md", "../../README.md") == "../index.md"
    assert (
        hooks.link_of_the_site("guides/own-corpus.md", "../../ds_configs/README.md")
        == "../reference/deepspeed-files.md"
    )
    assert hooks.link_of_the_site("contributing.md", "docs/log.md") == "log.md"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Two minutes and a few packages, in an environment of its own."""
    copy_of_the_repository(tmp_path)
    done = subprocess.run(["bash", "docs/build.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    site = tmp_path / "site"
    assert "optimizer.max_grad_norm" in (site / "reference" / "configuration" / "index.html").read_text()
    assert "--gpu-memory GIB" in (site / "reference" / "commands" / "index.html").read_text()
    assert "zero_allow_untested_optimizer" in (site / "guides" / "own-loop" / "index.html").read_text()
    assert "pipeline.synthesis.synthesize" in (site / "reference" / "library" / "index.html").read_text()
