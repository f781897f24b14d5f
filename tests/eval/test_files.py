"""What evaluation reads of a run or a recipe is refused as training refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from eval.files import exit_status, read_config
from eval.sweep.runs import read_presets
from pipeline.config.load import resolve
from pipeline.errors import InputError
from tests.conftest import World
from tests.pipeline.config.test_refusals import RENAMED_KEYS


@pytest.mark.parametrize(("old", "value", "new"), RENAMED_KEYS, ids=[old for old, *_ in RENAMED_KEYS])
def test_an_old_name_of_a_key_is_refused_in_the_words_of_training(
    old: str, value: object, new: str, world: World, tmp_path: Path
) -> None:
    section, key = old.split(".")
    file = world.write(tmp_path / "config.yaml", tmp_path / "run")
    keys = yaml.safe_load(file.read_text())
    keys.setdefault(section, {})[key] = value
    file.write_text(yaml.safe_dump(keys))
    messages = []
    for read in (lambda: resolve(file), lambda: read_config(tmp_path, ("model",))):
        with pytest.raises(InputError) as caught:
            read()
        messages.append(str(caught.value))
    assert messages == [f"{file}: the key {old!r} has a new name; write {new!r}"] * 2

    del keys[section][key]
    for recipe, place in (
        ({**keys, section: {key: value}, "methods": {"mine": {}}}, str(file)),
        ({**keys, "methods": {"mine": {section: {key: value}}}}, f"{file}: methods.mine"),
    ):
        file.write_text(yaml.safe_dump(recipe))
        with pytest.raises(InputError) as caught:
            read_presets(file, ["mine"])
        assert str(caught.value) == f"{place}: the key {old!r} has a new name; write {new!r}"


def test_sections_that_are_no_tables_are_refused_by_their_own_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: x}\noptimizer: sgd\n")
    assert read_config(tmp_path, ("model",))["optimizer"] == "sgd"
    with pytest.raises(InputError, match="has no section optimizer"):
        read_config(tmp_path, ("model", "optimizer"))


def test_an_interrupted_command_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert exit_status(interrupted) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"  # below a bar
