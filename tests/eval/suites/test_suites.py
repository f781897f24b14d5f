"""What all suites have in common: the protocol, its optional parts, and a process that works alone."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from eval.suites import SUITES, AdversarialSuite, GroupedSuite, SplitSuite, Suite, WholeSuite, check_suites, load_suite
from pipeline.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[3]
SPLIT = {"wmdp_bio_low_mi", "wmdp_cyber_low_mi"}
HARNESS = {"wmdp_bio", "wmdp_chem", "wmdp_cyber", "mmlu", *SPLIT}
GENERAL = {"lm_eval", "rwku_utility"}  # it has no forget set
MUSE = {"muse_news", "muse_books"}  # a question does not say which passage it is about


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_takes_what_the_commands_pass(name: str) -> None:
    module = load_suite(name)
    for function in ("load_probes", "evaluate"):
        wanted = inspect.signature(getattr(Suite, function)).parameters
        offered = inspect.signature(getattr(module, function)).parameters
        assert list(offered)[: len(wanted) - 1] == list(wanted)[1:]  # but for self
        further = list(offered.values())[len(wanted) - 1 :]
        assert all(parameter.default is not inspect.Parameter.empty for parameter in further)


def test_which_suites_have_the_optional_parts() -> None:
    suites = {name: load_suite(name) for name in SUITES}
    expected = {*SUITES} - HARNESS - GENERAL - MUSE
    assert {name for name, suite in suites.items() if isinstance(suite, GroupedSuite)} == expected
    assert {name for name, suite in suites.items() if isinstance(suite, WholeSuite)} == HARNESS
    assert {name for name, suite in suites.items() if isinstance(suite, SplitSuite)} == SPLIT
    assert {name for name, suite in suites.items() if isinstance(suite, AdversarialSuite)} == {"bios", "rwku"}


def test_names_are_checked() -> None:
    assert check_suites(["tofu", "bios", "tofu"]) == ["tofu", "bios"]
    with pytest.raises(InputError, match=r"unknown suite 'rwk'; the nearest is 'rwku' \(suites: corpus, "):
        check_suites(["bios", "rwk"])


def test_a_process_alone_refuses_before_torch_is_imported() -> None:
    lines = (
        "import sys",
        "from eval.files import exit_status",
        "from eval.suites import check_suites, sharing",
        "sharing.start(sharded=False)",
        "with sharing.raise_on_all_ranks():",
        "    check_suites(['bios'])",
        "assert sharing.rank_and_size() == (0, 1)",
        "assert not {'torch', 'deepspeed', 'transformers'} & {*sys.modules}",
        "sharing.leave(3)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
