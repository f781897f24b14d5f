"""From YAML, a preset and overrides to a `RunConfig`, or to one line that names the culprit."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.schema import DEFAULT_STEPS, Corpus, RunConfig, format_of
from pipeline.errors import InputError

if TYPE_CHECKING:
    pass


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: YAML 1.1, which PyYAML implements, reads `1e-5` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{where}{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{what}: cannot read {path}: {reason}") from None


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint for a misspelt name: the closest valid one, and the list when it is short enough to read."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins; dictionaries merge key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """`--a.b VALUE` and `--a.b=VALUE`, values in YAML, as a nested dictionary."""
    tree: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise InputError(f"command line: unexpected {token!r}; overrides are written --section.key VALUE")
        key, equals, text = token[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"command line: {token} needs a value")
            text = rest.pop(0)
        value = _parse_yaml(text, f"command line: {token}")
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """The valid keys of the section at `location`, for the hint beside an unknown key."""
    section: Any = RunConfig
    for part in location:
        annotation = section.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(section.model_fields)


def _explain(error: ValidationError, where: str) -> InputError:
    """One line for the first thing pydantic refused; a misspelt key before the missing one it leaves behind."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        hint = nearest(str(location[-1]), _keys_at(location[:-1]))
        return InputError(f"{where}: unknown key {key!r}; {hint}")
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first.get("ctx", {})["expected"])
        return InputError(
            f"{where}: {key}: {first['input']!r} is not a choice; {nearest(str(first['input']), choices)}"
        )
    if first["type"] == "missing":
        return InputError(f"{where}: {key!r} is missing; set it in the file or with --{key} VALUE")
    given = "" if isinstance(first["input"], dict) else f" (it is {first['input']!r})"
    return InputError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}{given}")


def resolve(
    file: str | Path, method: str | None = None, overrides: Sequence[str] = (), *, reads_data: bool = True
) -> RunConfig:
    """Read `file`, lay the preset `method` of its table `methods:` over it, then the `overrides`.

    Args:
        reads_data: the files of the corpora must be there. (To plan a run, they need not be.)

    Raises:
        InputError: anything in the text that cannot be run, in one line.
    """
    where = str(file)
    raw = _parse_yaml(read_text(Path(file), "--config"), where)
    if not isinstance(raw, dict):
        raise InputError(f"{where}: the file must hold keys and values, not {type(raw).__name__}")
    methods = raw.pop("methods", None) or {}
    if not isinstance(methods, dict) or not all(isinstance(preset, dict) for preset in methods.values()):
        raise InputError(f"{where}: `methods` must map each name to the keys that differ")
    if method is not None:
        if method not in methods:
            raise InputError(f"{where}: no method {method!r}; {nearest(method, list(methods)) if methods else 'none'}")
        raw = merge(raw, merge(methods[method], {"method": method}))
    try:
        config = RunConfig.model_validate(merge(raw, _overrides(overrides)))
    except ValidationError as error:
        raise _explain(error, where) from None
    if config.synthesis.rule == "gru" and config.synthesis.scope == "element":
        raise InputError(f"{where}: synthesis.scope: gru compares whole gradients; valid: module, layer, global")
    if (
        config.objective.forget == "rmu"
        and "trainable" not in config.model.model_fields_set
        and config.model.lora is None
    ):
        config = _with_rmu_tensors(config)
    if config.train.steps is not None and config.train.epochs is not None:
        raise InputError(f"{where}: train.steps and train.epochs are both given; take one back, as --train.epochs null")
    if config.train.steps is None and config.train.epochs is None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": DEFAULT_STEPS})})
    if not config.tasks:
        raise InputError(f"{where}: objective.forget and objective.retain are both none: nothing to train")
    for task in config.tasks:
        corpus: Corpus | None = getattr(config.data, task)
        if corpus is None:
            raise InputError(f"{where}: data.{task} is missing, and objective.{task} is not none")
        if reads_data and format_of(corpus.path) is not None and not Path(corpus.path).is_file():
            raise InputError(f"{where}: data.{task}.path: there is no file {corpus.path}")
        if getattr(config.objective, task) == "dpo" and corpus.preferred is None:
            raise InputError(f"{where}: data.{task}.preferred is missing: dpo needs the column with the text to prefer")
        objective = getattr(config.objective, task)
        if objective in ("idk", "dpo_idk") and corpus.prompt is None:
            raise InputError(f"{where}: data.{task}: {objective} needs questions to refuse; set prompt and response")
        if reads_data and corpus.refusals is not None and not Path(corpus.refusals).is_file():
            raise InputError(f"{where}: data.{task}.refusals: there is no file {corpus.refusals}")
        rows = next((key for key in ("prompt", "preferred") if getattr(corpus, key) is not None), None)
        if rows is not None and config.data.packing == "blocks":
            raise InputError(
                f"{where}: data.packing: blocks would cut through the rows that data.{task}.{rows} asks for; "
                "set data.packing: documents"
            )
    return config


def _with_rmu_tensors(config: RunConfig) -> RunConfig:
    """RMU trains, unless told otherwise, `mlp.down_proj` of its layer and the two before it (Li et al., 2024)."""
    layers = range(max(config.objective.layer - 2, 0), config.objective.layer + 1)
    train = [rf"\.{layer}\.mlp\.down_proj\.weight$" for layer in layers]
    return config.model_copy(update={"model": config.model.model_copy(update={"trainable": train})})


def _describe(section: type[BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        options = getattr(field.annotation, "__args__", (field.annotation,))
        inner = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if inner:
            lines += _describe(inner[0], f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.default
            choices = [str(choice) for choice in options if isinstance(choice, str)]
            lines.append(f"  --{prefix}{name} [{default}] {' | '.join(choices)} {field.description or ''}".rstrip())
    return lines


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}")


def parse_command_line(arguments: Sequence[str] | None = None) -> tuple[RunConfig, bool, bool]:
    """The configuration that the command line asks for, whether to resume, and whether to be quiet.

    Raises:
        InputError: see `resolve`. (`--help` ends the process with status 0.)
    """
    parser = Parser(
        prog="deepspeed --module pipeline.train",
        description="Unlearn a corpus while keeping everything else. Also under torchrun, mpirun, or alone.",
        epilog="configuration keys and defaults, each also a command-line override (--a.b VALUE):\n"
        + "\n".join(_describe(RunConfig)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--method", metavar="NAME", help="a preset from the file's table `methods:`")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint, if any")
    parser.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    known, rest = parser.parse_known_args(arguments)
    return resolve(known.config, known.method, rest), known.resume, known.quiet


def to_yaml(config: RunConfig) -> str:
    import yaml

    return yaml.safe_dump(config.model_dump(), sort_keys=False)
