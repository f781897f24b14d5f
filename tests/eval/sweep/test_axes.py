"""Axes of a sweep: what is typed, what is refused, folders and their order."""

from pathlib import Path

import pytest

from eval.sweep import axes
from pipeline.errors import InputError


def test_lists_and_ranges() -> None:
    assert axes.parse_axis("optimizer.lr=1e-5,3e-5") == axes.Axis("optimizer.lr", ("1e-5", "3e-5"))
    assert axes.parse_axis("a.b=sum") == axes.Axis("a.b", ("sum",))
    axis = axes.parse_axis("synthesis.alpha=0.1:1")
    assert (axis.key, axis.values, axis.low, axis.high) == ("synthesis.alpha", (), 0.1, 1.0)
    both = axes.parse_sweep(["b=1,2", "a=x,y"])
    assert axes.grid(both) == [{"a": a, "b": b} for a in "xy" for b in "12"]
    assert axes.grid([]) == [{}]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["gamma"], "KEY=A,B,C"),
        (["=1"], "KEY=A,B,C"),
        (["gamma="], "KEY=A,B,C"),
        (["--gamma=1"], "KEY=A,B,C"),
        (["gamma=1,,2"], "none of them empty"),
        (["gamma=1,1"], "different values"),
        (["gamma=1:x"], "two numbers"),
        (["gamma=1:2:3"], "two numbers"),
        (["gamma=1:0.1"], "0 < LOW < HIGH"),
        (["gamma=0:1"], "0 < LOW < HIGH"),
        (["seed=0,1"], "--seeds"),
        (["gamma=1", "gamma=2"], "gamma twice"),
    ],
)
def test_bad_sweeps(sweep: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        axes.parse_sweep(sweep)
    assert "\n" not in str(caught.value)


def test_a_folder_tells_its_setting(tmp_path: Path) -> None:
    for setting in ({}, {"a.b": "1e-5", "c": "0.1"}, {"train.deepspeed": "my configs/a=b.json"}):
        folder = axes.run_folder(tmp_path, "m", setting, 3)
        assert folder.relative_to(tmp_path).parts[::2] == ("runs", folder.parent.name)
        assert folder.name == "seed-3" and axes.parse_setting(folder.parent.name) == setting


def test_settings_are_in_order_of_numbers() -> None:
    settings = [{"k": "10"}, {"k": "word"}, {"k": "0.3"}, {"k": "1e-5"}, {"k": "1"}]
    assert [s["k"] for s in sorted(settings, key=axes.by_number)] == ["1e-5", "0.3", "1", "10", "word"]
