"""A test that is skipped proves nothing: in a fresh clone only what this machine's hardware lacks may be."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# What needs a GPU; and slow tests of what no Python package brings: a browser, sshd, a mounted disk, libaio.
HARDWARE = {"pipeline/synthesis/test_synthesis.py": 1}
MACHINE = {"browser.py": 1, "test_launchers.py": 2, "pipeline/test_full_disk.py": 1, "pipeline/zero/test_nvme.py": 2}


def count_skips(file: Path) -> int:
    called = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    names = [node.attr for node in called if isinstance(node, ast.Attribute)]
    return sum(name in ("skip", "skipif", "importorskip", "skipTest", "xfail") for name in names)


def test_nothing_is_skipped_but_for_the_machine() -> None:
    found = {str(file.relative_to(TESTS)): count_skips(file) for file in TESTS.rglob("*.py")}
    assert {name: count for name, count in found.items() if count} == HARDWARE | MACHINE


def test_what_a_machine_may_lack_is_slow() -> None:
    """So that the suite that everybody runs leaves it out."""
    users = [file for file in TESTS.rglob("test_*.py") if "tests.browser import" in file.read_text()]
    for file in [*users, *(TESTS / name for name in MACHINE if name != "browser.py")]:
        assert "pytest.mark.slow" in file.read_text(), file
