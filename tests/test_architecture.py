"""Which file may import which, and which may touch the inside of DeepSpeed (ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

from pipeline.config.objectives import NEEDS
from pipeline.config.schema import REPOSITORY
from pipeline.losses.objectives import TERMS
from pipeline.zero.compat import INTERNALS

# From the ground up. A package or file imports what stands in the lines above its own, and itself.
LAYERS: list[set[str]] = [
    {"errors", "files", "synthesis"},
    {"config"},
    {"distributed"},
    {"zero", "monitoring"},
    {"data"},
    {"modeling"},
    {"losses"},
    {"optim"},
    {"startup"},
    {"trainer"},
    {"train", "planning"},
    {"plan"},
]
LEVEL = {name: number for number, names in enumerate(LAYERS) for name in names}
# What evaluation may share with training: one reader of corpora, one encoding of questions, one check of weights.
SHARED = {
    *("pipeline.errors", "pipeline.files", "pipeline.config", "pipeline.data", "pipeline.distributed"),
    "pipeline.modeling.weights",
    *("pipeline.modeling.checks", "pipeline.optim"),  # the learning rate that fits a model's size
    *("pipeline.modeling.outputs", "pipeline.modeling.probes"),  # one code of a probe, so that its numbers are the same
    "pipeline.monitoring.rows",  # what a row of the log is
    "pipeline.monitoring.verdicts",  # what a model never knew, by one threshold in warnings and verdicts
}
LIGHT = ("errors", "files", "config", "distributed/environment")  # imported before a bad configuration is refused
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "peft", "numpy"}


def imports(source: str) -> set[str]:
    """Dotted names of the modules that a file imports, at the top or inside functions, for type checkers or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute here"
            whole = "." not in node.module  # `from pipeline import zero` names a module
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def part_of(module: str) -> str:
    """`zero` of `pipeline.zero.store`."""
    return module.split(".")[1]


def files(folder: str) -> list[Path]:
    found = sorted((REPOSITORY / folder).rglob("*.py"))
    return [file for file in found if file != REPOSITORY / folder / "__init__.py"]


def arrows_up(file: Path, source: str) -> set[str]:
    """Modules of `pipeline` that a file of it imports and that do not stand below it."""
    own = part_of(".".join(file.relative_to(REPOSITORY).with_suffix("").parts))
    ours = {module for module in imports(source) if module.startswith("pipeline.")}
    return {module for module in ours if part_of(module) != own and LEVEL[part_of(module)] >= LEVEL[own]}


@pytest.mark.parametrize("file", files("pipeline"), ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_no_arrow_runs_up(file: Path) -> None:
    assert not arrows_up(file, file.read_text(encoding="utf-8"))


def test_an_arrow_that_runs_up_would_be_noticed() -> None:
    store = REPOSITORY / "pipeline" / "zero" / "store.py"
    assert arrows_up(store, "def late():\n    from pipeline import trainer\n") == {"pipeline.trainer"}
    assert arrows_up(store, "from pipeline.monitoring import console") == {"pipeline.monitoring"}
    assert not arrows_up(store, "from pipeline.zero import stages\nfrom pipeline.config.schema import RunConfig")


def test_pipeline_imports_neither_evaluation_nor_tests_and_evaluation_only_what_is_shared() -> None:
    modules = {file: imports(file.read_text(encoding="utf-8")) for file in chain(files("pipeline"), files("eval"))}
    assert any("pipeline.data.corpus" in names for file, names in modules.items() if "eval" in file.parts)
    for file, names in modules.items():
        roots = {name.split(".")[0] for name in names}
        assert "tests" not in roots, file
        if file.is_relative_to(REPOSITORY / "pipeline"):
            assert "eval" not in roots, file
            continue
        ours = {name for name in names if name.startswith("pipeline.")}
        assert not {name for name in ours if not any(f"{name}.".startswith(f"{one}.") for one in SHARED)}, file


# The process group starts before anything of `zero` may be imported.
EXCEPTIONS = {"pipeline/distributed/process_group.py": {"__compatible_ops__"}}


@cache
def inside_of_deepspeed() -> set[str]:
    """What stands in the table of `compat.py`, and every name with `_` that DeepSpeed's engine code defines."""
    found = {name for names in INTERNALS.values() for name in names}
    home = find_spec("deepspeed")
    assert home is not None and home.origin is not None
    runtime = Path(home.origin).parent / "runtime"
    for file in chain(runtime.glob("*.py"), (runtime / "zero").glob("*.py"), (runtime / "fp16").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.startswith("_"):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr.startswith("_"):
                found.add(node.attr)
    return {name for name in found if not (name.startswith("__") and name.endswith("__"))} | {"__compatible_ops__"}


def touched(source: str) -> set[str]:
    """Attributes of other objects that a file reads or writes, by a dot or by their names as strings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            found |= set() if own else {node.attr}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def test_only_zero_touches_the_inside_of_deepspeed() -> None:
    for file in chain(files("pipeline"), files("eval")):
        name = file.relative_to(REPOSITORY).as_posix()
        if not name.startswith("pipeline/zero/"):
            inside = touched(file.read_text(encoding="utf-8")) & inside_of_deepspeed()
            assert inside <= EXCEPTIONS.get(name, set()), f"{name} touches {inside}: move that to pipeline/zero"


def test_a_touch_would_be_noticed() -> None:
    source = (
        "engine.optimizer.averaged_gradients\nhasattr(p, 'ds_tensor')\nengine._global_grad_norm = 1\nself._config = 2"
    )
    assert touched(source) & inside_of_deepspeed() == {"averaged_gradients", "ds_tensor", "_global_grad_norm"}
    assert {"_configure_optimizer", "_hp_mapping"} <= inside_of_deepspeed()


RENAMES = {"os.replace", "os.rename", "os.renames", "os.link", "shutil.move", "tempfile.mkstemp", "tempfile.mkdtemp"}


def renames(source: str) -> set[str]:
    """Calls by which a file or a folder gets its final name, so that it is whole or absent."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {ast.unparse(call) for call in calls}
    return {name for name in names if name in RENAMES or name.rpartition(".")[2] in ("rename", "fsync")}


def test_one_file_writes_what_must_be_whole() -> None:
    assert renames("os.replace(a, b)\npath.rename(c)\nos.fsync(1)\ntext.replace('a', 'b')") == {
        *("os.replace", "path.rename", "os.fsync")
    }
    for file in chain(files("pipeline"), files("eval"), files("launch")):
        if file != REPOSITORY / "pipeline" / "files.py":
            assert not renames(file.read_text(encoding="utf-8")), f"{file}: write it by pipeline.files"


def objectives_compared(source: str) -> set[str]:
    """Names of objectives that a file compares something with, instead of asking the table what an objective needs."""
    tests = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare | ast.BinOp)]
    constants = [part.value for node in tests for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return {str(name) for name in constants if name in NEEDS}


def test_one_table_says_what_an_objective_needs() -> None:
    assert objectives_compared('a == "rmu" or b in ("idk", "none") or {"kl"} & c; d = "npo"') == {"rmu", "idk", "kl"}
    for file in files("pipeline"):
        assert not objectives_compared(file.read_text(encoding="utf-8")), f"{file}: ask pipeline.config.objectives"
    assert TERMS.keys() == NEEDS.keys()


def test_the_rules_of_synthesis_need_torch_alone() -> None:
    for file in files("pipeline/synthesis"):
        roots = {name.split(".")[0] for name in imports(file.read_text(encoding="utf-8"))}
        assert roots - {"pipeline"} - set(sys.stdlib_module_names) <= {"torch"}, file


@pytest.mark.parametrize("name", LIGHT)
def test_what_refuses_a_bad_configuration_imports_nothing_heavy(name: str) -> None:
    place = REPOSITORY / "pipeline" / name
    for file in sorted(place.rglob("*.py")) or [place.with_suffix(".py")]:
        at_import = ast.Module(
            [
                node
                for node in ast.parse(file.read_text(encoding="utf-8")).body
                if not isinstance(node, ast.FunctionDef)
            ],
            [],
        )
        assert not {module.split(".")[0] for module in imports(ast.unparse(at_import))} & HEAVY, file


LINES_OF_FILE, LINES_OF_FUNCTION = 320, 60


def too_long(source: str) -> set[str]:
    """Functions of a file with more lines than a function may have, its docstring not counted."""
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines, docstring = range(node.lineno, (node.end_lineno or node.lineno) + 1), ast.get_docstring(node, False)
            if len(lines) - (len(docstring.splitlines()) if docstring is not None else 0) > LINES_OF_FUNCTION:
                found.add(node.name)
    return found


def test_files_and_functions_fit_on_a_few_screens() -> None:
    body = "    x = 1\n" * (LINES_OF_FUNCTION - 1)
    assert (
        too_long(f"def fits():\n{body}") == set() == too_long(f'def fits():\n    """One.\n\n    Two.\n    """\n{body}')
    )
    assert too_long(f"class A:\n  def is_longer(self):\n{body}    y = 2") == {"is_longer"}
    for file in chain(files("pipeline"), files("eval"), files("launch"), files("tests"), files("docs")):
        source = file.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= LINES_OF_FILE, f"{file}: move a part of it to a file of its own"
        assert not too_long(source), f"{file}: make several functions of {too_long(source)}"


PARAMETERS_OF_FUNCTION = 6
MORE_PARAMETERS = {
    "synthesize": "the public function: a call names only what its rule needs",
    "_attention": "the signature that transformers calls",
    "_metric_products": "a compiled kernel, whose arguments are tensors and numbers",
}


def parameters_of(source: str) -> dict[str, int]:
    """How many parameters each function of a file has, `self` and `cls` not counted."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found[node.name] = sum(parameter.arg not in ("self", "cls") for parameter in given)
    return found


def test_functions_have_at_most_six_parameters() -> None:
    assert parameters_of("def f(self, a, /, b, *, c): ...") == {"f": 3}
    many = set[str]()
    for file in chain(files("pipeline"), files("eval")):
        numbers = parameters_of(file.read_text(encoding="utf-8"))
        many |= {name for name, number in numbers.items() if number > PARAMETERS_OF_FUNCTION}
    assert many == set(MORE_PARAMETERS)


def test_an_error_of_the_disk_is_raised_on_all_ranks() -> None:
    """`raise_on_all_ranks` sees what `disk_errors` makes of an OSError only where it is the outer one of the two."""
    pairs = 0
    for file in sorted((REPOSITORY / "pipeline").rglob("*.py")):
        for node in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.With)):
            entered = [ast.unparse(item.context_expr).partition("(")[0] for item in node.items]
            if {"raise_on_all_ranks", "disk_errors"} <= set(entered):
                pairs += 1
                assert entered.index("raise_on_all_ranks") < entered.index("disk_errors"), f"{file}:{node.lineno}"
    assert pairs, "no file has both any more: remove this test"
