"""One typed, validated run configuration: YAML + method preset + dotted overrides.

Imports no torch: everything that can be refused from the text of the configuration alone is refused before the
heavy imports, in one line that names the key and the nearest valid one.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

REPOSITORY = Path(__file__).resolve().parent.parent


class InputError(Exception):
    """Unusable input. Its text is one line that names the culprit and the remedy; the command ends with status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# The keys


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    return pattern


def _none_is_a_name(value: Any) -> Any:
    """YAML's `forget: null` and `forget: none` say the same thing."""
    return "none" if value is None else value


class Section(BaseModel):
    """A group of keys: no unknown key, no silent conversion (`steps: "10"` is an error), immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


FilePath = Annotated[str, AfterValidator(os.path.expanduser)]  # a shell does not expand `~` inside YAML


class Lora(Section):
    r: int = Field(16, ge=1, description="rank of an adapter; any key of model.lora turns adapters on")
    alpha: float = Field(32.0, gt=0, description="an adapter's product is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what goes into the adapters while training")
    targets: list[Annotated[str, AfterValidator(_regex)]] | None = Field(
        None,
        min_length=1,
        description="linear layers that get an adapter: each entry a name (q_proj, self_attn.q_proj) or a regular "
        "expression of the whole name (.*layers\\.[0-7]\\..*_proj); null: all of them but the output layer",
    )
    merge: bool = Field(False, description="export the merged weights, an ordinary model; false: an adapter (peft)")


class Model(Section):
    path: FilePath = Field(description="hub id, or a folder written by save_pretrained")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="precision of forward and backward"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    train: list[Annotated[str, AfterValidator(_regex)]] = Field(
        [".*"], min_length=1, description="regular expressions; a tensor trains if one of them is found in its name"
    )
    lora: Lora | None = Field(None, description="train low-rank adapters instead, by peft")
    dropout: float | None = Field(
        0.0,
        ge=0,
        lt=1,
        description="rate of every dropout of the model while it trains (model.lora.dropout apart); "
        "null: the rates of its config.json, with which npo, dpo, kl, undial and embed_diff compare a model with "
        "dropout to a reference without",
    )
    attn_implementation: str | None = Field(
        None,
        min_length=1,
        description="as transformers names it: sdpa, eager, flash_attention_2, ...; null: its choice",
    )
    torch_compile: bool = Field(False, description="compile each decoder block")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    allow_pickle: bool = Field(
        False, description="take weights that are not safetensors where a model has no others: pickles can run code"
    )

    @model_validator(mode="after")
    def _adapters_are_what_trains(self) -> Model:
        if self.lora is not None and self.train != [".*"]:
            raise ValueError(
                "model.train chooses among the model's own tensors, but with model.lora only adapters "
                "train; remove model.train, and choose layers by model.lora.targets"
            )
        return self


class Corpus(Section):
    """Plain text (`field`), or questions with answers of which only the answer is predicted (`prompt`, `response`)."""

    path: FilePath = Field(
        description="hub name; or a .jsonl, .json, .csv, .tsv, .txt (each also .gz) or .parquet file, or a folder of "
        "save_to_disk"
    )
    field: str | None = Field("text", description="the column that holds the text (unused for .txt)")
    prompt: str | None = Field(None, description="instead of field: the column with the question, not predicted")
    response: str | None = Field(None, description="beside prompt: the column with the answer, which is predicted")
    preferred: str | None = Field(None, description="the column with what to say instead, for preference objectives")
    refusals: FilePath | None = Field(
        None, description=".txt file, a refusal a line, for objectives that teach to refuse; null: a built-in list"
    )
    name: str | None = Field(None, description="the hub data set's configuration")
    split: str = Field("train", description="the hub data set's split")

    @model_validator(mode="before")
    @classmethod
    def _no_field_beside_a_prompt(cls, given: Any) -> Any:
        """So that `field`'s default does not count as set, nor when a resolved configuration is read again."""
        if isinstance(given, dict) and any(given.get(key) is not None for key in ("prompt", "response")):
            return {"field": None, **given}
        return given

    @model_validator(mode="after")
    def _one_kind_of_text(self) -> Corpus:
        if (self.prompt is None) != (self.response is None):
            there, lacking = ("prompt", "response") if self.response is None else ("response", "prompt")
            raise ValueError(f"{there} needs {lacking} beside it: the columns of the question and of its answer")
        if self.prompt is not None and self.field is not None:
            raise ValueError("set either field (plain text) or prompt and response (questions and answers)")
        if self.prompt is None and self.field is None:
            raise ValueError("set field (plain text), or prompt and response (questions and answers)")
        if len({*self.columns.values()}) < len(self.columns):
            raise ValueError(f"{', '.join(self.columns)} must name different columns")
        if format_of(self.path) == ".txt" and (self.prompt or self.preferred):
            key = "prompt" if self.prompt else "preferred"
            raise ValueError(f"a .txt file has no columns, so {key} cannot name one; use .jsonl, .json or .parquet")
        if self.refusals is not None and self.prompt is None:
            raise ValueError("refusals answer questions; name their columns with prompt and response")
        if self.refusals is not None and format_of(self.refusals) != ".txt":
            raise ValueError(f"refusals must be a .txt file with one refusal a line, not {self.refusals}")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The columns that hold text, by the key that names them."""
        keys = ("field", "prompt", "response", "preferred")
        return {key: name for key in keys if (name := getattr(self, key)) is not None}


class Data(Section):
    max_length: int = Field(512, ge=2, description="tokens per sequence")
    packing: Literal["blocks", "documents"] = Field("blocks", description="cut a joined stream, or one document each")
    long_documents: Literal["split", "truncate"] = Field(
        "split",
        description="text beyond max_length, and the rest of a stream that fills no block: in sequences of its own, or "
        "left out (answers and pairs are always truncated)",
    )
    forget: Corpus | None = None
    retain: Corpus | None = None


Forget = Annotated[
    Literal["ga", "wga", "npo", "simnpo", "dpo", "dpo_idk", "idk", "undial", "rmu", "none"],
    BeforeValidator(_none_is_a_name),
]
Retain = Annotated[Literal["nll", "kl", "embed_diff", "none"], BeforeValidator(_none_is_a_name)]


class Objective(Section):
    forget: Forget = Field("npo", description="forget loss (paper, section 2.2)")
    retain: Retain = Field("nll", description="retain loss (paper, section 2.2)")
    beta: float = Field(
        0.1, gt=0, description="sharpness of npo, simnpo, dpo and dpo_idk; power in wga; what undial takes off a logit"
    )
    delta: float = Field(0.0, description="margin of simnpo (the paper's gamma)")
    layer: int = Field(7, ge=0, description="decoder block whose output rmu and embed_diff read, counted from 0")
    steering: float = Field(20.0, description="length of rmu's target, its steering coefficient c")


class Synthesis(Section):
    rule: Literal["sum", "sago", "pcgrad", "blur", "gru"] = Field(
        "sago", description="how the two gradients become one"
    )
    scope: Literal["element", "module", "layer", "global"] | None = Field(
        None, description="where conflict is judged; null: the rule's own scope in the paper"
    )
    alpha: float = Field(1.0, ge=0, description="weight of the retain gradient")
    gamma: float = Field(1.0, ge=0, description="weight of the forget gradient")
    zero_forget: Literal["literal", "retain"] = Field(
        "literal", description="where the forget gradient is exactly 0, sago gives 0 (paper) or the retain gradient"
    )
    spare: Literal["device", "host"] = Field(
        "device", description="where the forget gradient waits: beside the retain gradient, or in pinned host memory"
    )
    geometry: bool = Field(False, description="measure the cosines under `sum` too (costs the spare partition)")
    layer_geometry_every: int = Field(
        10, ge=0, description="steps between measurements of each layer's cosines and conflicts; 0 is off"
    )


class Optimizer(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-5, gt=0)
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="not of norms and biases, as in transformers' Trainer")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps; 0 is off")
    clip: float = Field(1.0, ge=0, description="largest gradient norm, after synthesis; 0 is off")


DEFAULT_STEPS = 100


class Train(Section):
    steps: int | None = Field(None, ge=1, description="optimizer steps; 100 unless epochs are given")
    epochs: float | None = Field(None, gt=0, description="instead of steps: passes over the forget set")
    batch_size: int = Field(32, ge=1, description="sequences per task and step, over all ranks")
    micro_batch_size: int = Field(4, ge=1, description="sequences per forward pass and rank")
    deepspeed: str = Field("ds_configs/zero3.json", description="ZeRO, precision and communication")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints for --resume; 0 is off")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints stay")
    export_every: int = Field(0, ge=0, description="steps between Hugging Face exports on the way; 0 is off")
    max_skipped: int = Field(10, ge=1, description="non-finite steps in a row that end the run")
    timeout: float = Field(30.0, gt=0, description="minutes that a rank waits for another before it ends with an error")


class RunConfig(Section):
    """The resolved configuration of one run; `config.yaml` in the run folder is exactly this."""

    output: FilePath = Field(description="the run folder")
    cache: FilePath = Field(
        "~/.cache/unlearning",
        validate_default=True,
        description="tokenised corpora and reference log-probabilities; safe to delete",
    )
    seed: int = Field(0, ge=0, description="data order, initial adapters, dropout")
    method: str | None = Field(None, description="the preset this run came from (a label)")
    model: Model
    data: Data
    objective: Objective = Objective()  # pyright: ignore[reportCallIssue]
    synthesis: Synthesis = Synthesis()  # pyright: ignore[reportCallIssue]
    optimizer: Optimizer = Optimizer()  # pyright: ignore[reportCallIssue]
    train: Train = Train()  # pyright: ignore[reportCallIssue]

    @property
    def tasks(self) -> list[str]:
        """The tasks of each step in the order they are accumulated; an absent one has objective `none`."""
        return [task for task in ("forget", "retain") if getattr(self.objective, task) != "none"]


# ---------------------------------------------------------------------------------------------------------------------
# From text to RunConfig


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
    if config.objective.forget == "rmu" and "train" not in config.model.model_fields_set and config.model.lora is None:
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
    return config.model_copy(update={"model": config.model.model_copy(update={"train": train})})


LOCAL_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def format_of(path: str | Path) -> str | None:
    """Which of LOCAL_FORMATS a file has by its name, in any case and, but for Parquet, also compressed (`.gz`)."""
    endings = [ending.lower() for ending in Path(path).suffixes]
    compressed = endings[-1:] == [".gz"]
    found = "".join(endings[:-1][-1:] if compressed else endings[-1:])
    return found if found in LOCAL_FORMATS and not (compressed and found == ".parquet") else None


# ---------------------------------------------------------------------------------------------------------------------
# A run and the folder that holds one

# What a resumed run may have otherwise: nothing that its weights depend on.
WHERE = ("output", "cache")  # a run may move
# So may what it reads: digests of the content, and the keys of the DeepSpeed file, decide instead of these paths.
BY_CONTENT = (
    "model.path",
    "train.deepspeed",
    *(f"data.{task}.{key}" for task in ("forget", "retain") for key in ("path", "refusals")),
)
FREE = (
    *("method", "model.allow_pickle", "model.gradient_checkpointing"),
    *("synthesis.spare", "synthesis.layer_geometry_every"),
    *("train.micro_batch_size", "train.checkpoint_every", "train.keep_checkpoints", "train.export_every"),
    *("train.max_skipped", "train.timeout"),
)  # other ranks may need other micro-batches
# Of the DeepSpeed file: what measures, and what only says how much is moved at a time or waits where. A size that
# decides how a checkpoint is laid out (sub_group_size) is none of these.
FREE_OF_DEEPSPEED = (
    *("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger", "wall_clock_breakdown"),
    *("memory_breakdown", "dump_state", "steps_per_print", "train_micro_batch_size_per_gpu", "aio"),
    *(
        f"zero_optimization.{key}"
        for key in (
            *("overlap_comm", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size"),
            *(
                "stage3_prefetch_bucket_size",
                "prefetch_bucket_size",
                "stage3_max_live_parameters",
                "max_live_parameters",
            ),
            *("stage3_max_reuse_distance", "max_reuse_distance", "stage3_param_persistence_threshold"),
            *("param_persistence_threshold", "offload_optimizer.pin_memory", "offload_param.pin_memory"),
            *("offload_optimizer.buffer_count", "offload_param.buffer_count", "offload_optimizer.nvme_path"),
        )
    ),
)


def refuse_foreign_output(config: RunConfig, resume: bool) -> None:
    """A run folder is never overwritten, and resumed only by the run that it holds.

    Raises:
        InputError: `output` is a file, holds a run (without `resume`), or another run than `config` describes. What
            decides by its content (BY_CONTENT) is looked at once it is read, by `checkpoint.load`.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; name a folder")
    if not any((output / name).exists() for name in ("config.yaml", "metrics.jsonl", "final")):
        return
    if not resume:
        raise InputError(f"output: {output} already holds a run; name another folder, remove it, or give --resume")
    before, now = (_flat(run.model_dump()) for run in (resolve(output / "config.yaml", reads_data=False), config))
    for key in before | now:  # a section that is absent in one of them has its keys in the other only
        then, wanted = before.get(key), now.get(key)
        if then != wanted and key not in (*WHERE, *BY_CONTENT, *FREE):
            raise InputError(f"--resume: {key} was {then!r} in {output} and is {wanted!r} now; keep it")


def decisive_keys(config: RunConfig, zero: dict[str, Any]) -> dict[str, Any]:
    """What of the configuration decides the numbers of a run, and how DeepSpeed lays them out, as JSON has it.

    Args:
        zero: as `deepspeed_config` returns it.
    """
    elsewhere = (*WHERE, *BY_CONTENT, *FREE)
    keys = {key: value for key, value in _flat(config.model_dump()).items() if key not in elsewhere}
    return {**keys, **{f"train.deepspeed: {key}": value for key, value in _decisive_of_deepspeed(zero).items()}}


def content_digest(zero: dict[str, Any]) -> str:
    """SHA-256 of what in the dictionary of `deepspeed_config` decides the numbers of a run."""
    return hashlib.sha256(json.dumps(_decisive_of_deepspeed(zero), sort_keys=True).encode()).hexdigest()


def _decisive_of_deepspeed(zero: dict[str, Any]) -> dict[str, Any]:
    stated = {"zero_optimization.stage": 0, **_flat(zero)}
    return {
        key: value
        for key, value in stated.items()
        if not any(f"{key}.".startswith(f"{free}.") for free in FREE_OF_DEEPSPEED)
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a section that is absent is None."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


# ---------------------------------------------------------------------------------------------------------------------
# The command line


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


def world_from_environment() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher told this process: deepspeed, torchrun, Open MPI, MPICH, or alone."""
    for rank, size in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
