"""How many kernels the combination launches: as few for ten thousand tensors as for a hundred."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.planning import combine_cost
from pipeline.synthesis import windows


@pytest.mark.parametrize("rule", [("--rule", "sago"), ("--rule", "pcgrad", "--scope", "module")])
def test_kernels_do_not_grow_with_the_tensors(
    rule: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the window of a GPU, where launching them takes time: at most 400, whatever the tensors, within a tenth."""
    monkeypatch.setattr(windows, "eager_window", windows.eager_window)  # the command replaces it
    file = tmp_path / "cost.json"
    options = ["--tensors", "100", "2000", "--elements", str(2**18), "--repeats", "1", "--window", str(2**22)]
    monkeypatch.setattr(sys, "argv", ["combine_cost", *rule, *options, "--json", str(file)])
    assert combine_cost.main() == 0
    few, many = (cost["kernels"] for cost in json.loads(file.read_text()).values())
    assert 10 < few <= 400 and many == pytest.approx(few, rel=0.1)


@pytest.mark.parametrize("window", ["0", "-5"])
def test_a_window_without_elements_is_refused(
    window: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["combine_cost", "--window", window])
    with pytest.raises(SystemExit):
        combine_cost.main()
    assert f"--window {window}" in capsys.readouterr().err
