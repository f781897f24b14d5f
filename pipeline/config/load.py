"""From YAML, a preset and overrides to a `RunConfig`, or to one line that names the culprit."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.automatic import as_before, fit_machine
from pipeline.config.checks import (
    check_confinement,
    check_corpus,
    check_objective,
    check_packages,
    check_probes,
    check_schedule,
)
from pipeline.config.explain import explain, is_table, nearest, subsection
from pipeline.config.files import RECIPES, find_file
from pipeline.config.objectives import NEEDS
from pipeline.config.rules import check_rule
from pipeline.config.schema import DEFAULT_STEPS, RunConfig
from pipeline.errors import InputError
from pipeline.files import Json


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats and keys: PyYAML (1.1) reads `1e-5` as a string, and of two equal keys the last."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse a key that is written twice; those that `<<` brings in may be written again."""
        lines: dict[tuple[str, object], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                first = lines.setdefault((key.tag, key.value), key.start_mark.line + 1)
                if first != key.start_mark.line + 1:
                    problem = f"key {key.value!r} is there twice, in line {first} too; join them"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        super().flatten_mapping(node)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{where}{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_text(path: Path, key: str) -> str:
    """The content of a UTF-8 file that the key `key` names.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{key}: cannot read {path.absolute()}: {reason}") from None


def merge(base: Json, over: Json) -> Json:
    """`over` wins; dictionaries merge key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _check_name(key: str) -> None:
    """Refuse an option without a dot that is neither an option of the command nor a key; name those that are near.

    `--steps` is near `--train.steps`, so the last part of each key is compared.

    Raises:
        InputError: unless the name is known. What stands before and behind a dot is checked with the values.
    """
    if "." in key or key in RunConfig.model_fields:
        return
    spelt: dict[str, list[str]] = {}
    for name in [*OPTIONS, *leaves(RunConfig)]:
        spelt.setdefault(name.rpartition(".")[2].replace("-", "_"), []).append(name)
    close = difflib.get_close_matches(key.replace("-", "_"), spelt, n=1)
    hint = f"did you mean {' or '.join(f'--{name}' for name in spelt[close[0]])}? " if close else ""
    raise InputError(f"command line: unknown key {key!r}: no option is called --{key}; {hint}--help lists all")


def _overrides(tokens: Sequence[str]) -> Json:
    """`--a.b VALUE` and `--a.b=VALUE`, values in YAML, as a nested dictionary."""
    tree: Json = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise InputError(f"command line: unexpected {token!r}; overrides are written --section.key VALUE")
        key, equals, text = token[2:].partition("=")
        _check_name(key)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"command line: {token} needs a value")
            text = rest.pop(0)
        value = _parse_yaml(text, f"command line: {token}")
        *sections, name = key.split(".")
        nested: Json = {name: value}
        for part in reversed(sections):
            nested = {part: nested}
        tree = merge(tree, nested)
    return tree


def _read(file: Path, method: str | None) -> tuple[Json, Json]:
    """The keys of a YAML file without its table `methods:` and its list `suites:`, and those of the preset `method`.

    Raises:
        InputError: no YAML, no keys, or no such preset.
    """
    where = str(file)
    raw = _parse_yaml(read_text(file, "--config"), where)
    if not isinstance(raw, dict):
        raise InputError(f"{where}: the file must hold keys and values, not {type(raw).__name__}")
    raw.pop("suites", None)  # of the benchmark that the recipe belongs to: eval.frontier reads it
    methods = raw.pop("methods", None) or {}
    if not isinstance(methods, dict) or not all(isinstance(preset, dict) for preset in methods.values()):
        raise InputError(f"{where}: `methods` must map each name to the keys that differ")
    if method is None:
        return raw, {}
    if method not in methods:
        none = ": the file has no table `methods:`; leave out --method, or name a recipe that has one"
        raise InputError(f"{where}: no method {method!r}" + (f"; {nearest(method, [*methods])}" if methods else none))
    return raw, merge(methods[method], {"method": method})


def resolve(
    file: str | Path,
    method: str | None = None,
    overrides: Sequence[str] = (),
    *,
    reads_data: bool = True,
    resume: bool = False,
    on_gpu: bool | None = None,
) -> RunConfig:
    """Read `file`, lay the preset `method` of its table `methods:` over it, then the `overrides`.

    `data.packing` may still be `auto` and `optimizer.lr` None: they depend on data and model.

    Args:
        file: a path, or the name of a shipped recipe. Relative paths, also in the file, start at the working folder.
        reads_data: the files of the corpora must exist. (A plan does not need them.)
        resume: keys that are left open keep their values of the run in `output`, if there is one.
        on_gpu: see `automatic.fit_machine`.

    Raises:
        InputError: the configuration cannot be run; one line gives the reason.
    """
    path = find_file(file, "--config", RECIPES)
    where = str(path)
    raw, preset = _read(path, method)
    layers = {where: raw, f"{where}: methods.{method}": preset, "command line": _overrides(overrides)}
    merged: Json = {}
    for layer in layers.values():
        merged = merge(merged, layer)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise explain(error, where, layers) from None
    config = _with_defaults(config, where)
    earlier = Path(config.output) / "config.yaml"
    if resume and earlier.is_file():
        config = as_before(config, _read(earlier, None)[0])
    check_rule(config.synthesis, where)
    if not config.tasks:
        raise InputError(f"{where}: objective.forget and objective.retain are both none: nothing to train")
    for task in config.tasks:
        check_corpus(config, task, where, reads_data)
    check_objective(config, where)
    check_confinement(config, where)
    check_probes(config, where, reads_data)
    check_schedule(config, where)
    if reads_data:  # else nothing trains
        check_packages(config, where)
    return fit_machine(config, on_gpu)


def _with_defaults(config: RunConfig, where: str) -> RunConfig:
    """The configuration with the defaults that depend on other keys.

    Raises:
        InputError: steps and epochs are both given.
    """
    model, train = config.model, config.train
    near_layer = any(NEEDS[getattr(config.objective, task)].trains_near_layer for task in config.tasks)
    if near_layer and "trainable" not in model.model_fields_set and model.lora is None:
        config = _with_tensors_near_layer(config)
    if train.steps is not None and train.epochs is not None:
        raise InputError(f"{where}: train.steps and train.epochs are both given; unset one, as --train.epochs null")
    corpora = [corpus for task in config.tasks if (corpus := getattr(config.data, task)) is not None]
    if config.data.packing == "auto" and any(corpus.prompt or corpus.preferred for corpus in corpora):
        config = config.model_copy(update={"data": config.data.model_copy(update={"packing": "documents"})})
    if train.steps is None and train.epochs is None:
        config = config.model_copy(update={"train": train.model_copy(update={"steps": DEFAULT_STEPS})})
    return config


def _with_tensors_near_layer(config: RunConfig) -> RunConfig:
    """`mlp.down_proj` of `objective.layer` and of the two layers before it trains (RMU: Li et al., 2024)."""
    layers = range(max(config.objective.layer - 2, 0), config.objective.layer + 1)
    trainable = [rf"\.{layer}\.mlp\.down_proj\.weight$" for layer in layers]
    return config.model_copy(update={"model": config.model.model_copy(update={"trainable": trainable})})


OPTIONS = ("config", "method", "resume", "quiet", "push-to-hub", "help")  # of pipeline.train, beside the keys


def leaves(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of the configuration with its sections, as `train.steps`."""
    found = []
    for name, field in section.model_fields.items():
        inner = subsection(field.annotation)
        found += leaves(inner, f"{prefix}{name}.") if inner is not None else [f"{prefix}{name}"]
    return found


def _describe(section: type[BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        inner = subsection(field.annotation)
        if inner is not None:
            lines += _describe(inner, f"{prefix}{name}.{'NAME.' if is_table(field.annotation) else ''}")
        else:
            default = "required" if field.is_required() else field.default
            choices = [choice for choice in getattr(field.annotation, "__args__", ()) if isinstance(choice, str)]
            lines.append(f"  --{prefix}{name} [{default}] {' | '.join(choices)} {field.description or ''}".rstrip())
    return lines


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}")


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--method`, as every command that reads a run's YAML has them."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help=f"the run's YAML file, or the name of a shipped recipe: {', '.join(RECIPES.names())}",
    )
    parser.add_argument("--method", metavar="NAME", help="a preset from the file's table `methods:`")


def _train_parser() -> Parser:
    parser = Parser(
        prog="deepspeed --module pipeline.train",
        description="Unlearn a corpus while keeping everything else. Also under torchrun, mpirun, or alone.",
        epilog="configuration keys and defaults, each also a command-line override (--a.b VALUE):\n"
        + "\n".join(_describe(RunConfig)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_config_options(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run folder's last checkpoint, if there is one"
    )
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="upload final/ to this repository of the hub, private if it is new"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def parse_command_line(arguments: Sequence[str] | None = None) -> tuple[RunConfig, bool, bool]:
    """The configuration that the command line describes, whether to resume, and whether to be quiet.

    Raises:
        InputError: see `resolve`. (`--help` ends the process with status 0.)
    """
    known, rest = _train_parser().parse_known_args(arguments)
    return resolve(known.config, known.method, rest, resume=known.resume), known.resume, known.quiet


def hub_name(arguments: Sequence[str] | None = None) -> str | None:
    """The repository that `--push-to-hub` names; raises InputError as `parse_command_line` does."""
    return _train_parser().parse_known_args(arguments)[0].push_to_hub


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
