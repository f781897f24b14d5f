"""The coloured edge beside a sentence of the verdict: it shows what the sentence states."""

import re
from pathlib import Path

from eval.reporting.pages import Verdict, block_html
from eval.reporting.stylesheet import STYLESHEET
from eval.reporting.verdict import verdict
from eval.results import grouping, trajectories
from eval.results.metrics import MEASURES
from tests.eval.runs import Suites, make_run

BIOS = MEASURES[0]
TARGET = {"step": 0.0, "bios.forget.all": 1.0, "bios.retain.all": 0.8}


def bios(forget: float) -> Suites:
    return {"bios": {"forget": {"all": forget}, "retain": {"all": 0.5}}}


def edge_of(kind: str) -> str:
    """The border that the style sheet draws at the left of it."""
    found = re.search(rf"\.verdict {re.escape(kind)}\{{[^}}]*border-left:([^;}}]+)", STYLESHEET)
    assert found, kind
    return found[1]


def test_the_edge_of_a_sentence_shows_whether_it_compares(tmp_path: Path) -> None:
    """Of two pairs of objectives one reached the level; where no run did, and of a target that knows nothing, none."""
    runs = [make_run(tmp_path / name, [bios(forget)]) for name, forget in (("ga", 0.1), ("npo", 0.4))]
    text = (runs[0] / "config.yaml").read_text()
    (runs[0] / "config.yaml").write_text(text.replace("npo", "ga"))
    groups = grouping.group_runs(trajectories.prepare(trajectories.read_run(run), BIOS, TARGET) for run in runs)

    def items(target: dict[str, float]) -> list[str]:
        return re.findall(r"<li.*?</li>", block_html(Verdict(verdict(groups, BIOS, target)), {}, {}))

    compared, missed = items(TARGET)
    assert compared.startswith("<li>") and " keeps " in compared
    assert missed.startswith('<li class="missed">') and "No run of npo+nll reached" in missed
    [nothing] = items(TARGET | {"bios.forget.all": 0.02})
    assert nothing.startswith('<li class="missed">') and "Nothing to forget" in nothing
    plain, other = (edge_of(kind) for kind in ("li", ".missed"))
    assert "--good" in plain and other and "--good" not in other
    assert "solid" in plain and "solid" not in other, "without colours too"
