"""One typed, validated run configuration: YAML + method preset + dotted overrides.

Imports no torch: an error in the text of the configuration is refused before the heavy imports, in one line that
names the key and the nearest valid one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.adapters import Lora, regex
from pipeline.config.confine import Confine
from pipeline.config.objectives import choices
from pipeline.config.sources import Corpus, FilePath, Probe, Section, SetName, Source, TextMeasure

REPOSITORY = Path(__file__).resolve().parents[2]  # a clone; or the folder into which the package is installed


def _none_is_a_name(value: object) -> object:
    """`forget: null` and `forget: none` mean the same."""
    return "none" if value is None else value


class Model(Section):
    path: FilePath = Field(description="hub id, or a folder written by save_pretrained")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of forward and backward; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    trainable: list[Annotated[str, AfterValidator(regex)]] = Field(
        [".*"], min_length=1, description="regular expressions; a tensor trains if one of them is found in its name"
    )
    lora: Lora | None = Field(None, description="train low-rank adapters instead, by peft")
    load_in_4bit: bool = Field(
        False,
        description="with model.lora: all linear layers but the output layer in 4 bits (QLoRA: NF4, double "
        "quantisation), by bitsandbytes; ZeRO stages 0 to 2",
    )
    dropout: float | None = Field(
        0.0,
        ge=0,
        lt=1,
        description="rate of every dropout of the model while it trains (model.lora.dropout apart); "
        "null: the rates of its config.json; npo, dpo, altpo, kl, jsd, undial and embed_diff then compare a model "
        "with dropout to a reference model without dropout",
    )
    attn_implementation: str | None = Field(
        None,
        min_length=1,
        description="transformers' name of an attention: sdpa, eager, flash_attention_2, ...; null: its default",
    )
    torch_compile: bool = Field(False, description="compile each decoder block")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    allow_pickle: bool = Field(
        False, description="load weights that are not safetensors if a model has no others: pickles can run code"
    )

    @model_validator(mode="after")
    def _only_adapters_train(self) -> Model:
        if self.lora is not None and self.trainable != [".*"]:
            raise ValueError(
                "model.trainable chooses among the model's own tensors, but with model.lora only adapters "
                "train; remove model.trainable, and choose layers by model.lora.targets"
            )
        return self

    @model_validator(mode="after")
    def _four_bits_are_frozen(self) -> Model:
        if not self.load_in_4bit:
            return self
        if self.lora is None:
            raise ValueError("model.load_in_4bit: weights in 4 bits cannot train; set model.lora, whose adapters do")
        if self.lora.merge:
            raise ValueError("model.lora.merge: weights in 4 bits take no adapter; export it, and merge it by peft")
        if self.torch_compile:
            raise ValueError("model.torch_compile: was not tested with model.load_in_4bit; remove one of them")
        return self


class Data(Section):
    max_length: int = Field(512, ge=2, description="tokens per sequence")
    packing: Literal["auto", "blocks", "documents"] = Field(
        "auto",
        description="cut joined documents into blocks, or give each document its own sequences; auto: blocks if the "
        "documents of each corpus fill half of max_length on average",
    )
    long_documents: Literal["split", "truncate"] = Field(
        "split",
        description="text beyond max_length, and the rest that fills no block: in sequences of its own, or left out "
        "(answers and pairs are always truncated)",
    )
    forget: Corpus | None = None
    retain: Corpus | None = None
    probes: dict[SetName, Probe] = Field(
        {},
        description="sets of rows that probes measure while the model trains, by name; `forget` and `retain`, the "
        "first rows of the corpora, are measured too unless they are named here",
    )

    @model_validator(mode="after")
    def _all_is_forgotten(self) -> Data:
        if self.forget is not None and self.forget.heldout:
            raise ValueError("data.forget.heldout: documents that training does not see are not forgotten; remove it")
        return self


if TYPE_CHECKING:  # the names are in a table, so a type checker cannot list them
    Forget = Retain = str
else:
    Forget = Annotated[Literal[choices("forget")], BeforeValidator(_none_is_a_name)]
    Retain = Annotated[Literal[choices("retain")], BeforeValidator(_none_is_a_name)]


class Objective(Section):
    forget: Forget = Field("npo", description="forget loss (paper, section 2.2)")
    retain: Retain = Field("nll", description="retain loss (paper, section 2.2)")
    beta: float = Field(
        0.1,
        gt=0,
        description="sharpness of npo, simnpo, dpo, dpo_idk and altpo; exponent in wga; penalty on the logit in undial",
    )
    beta1: float = Field(5.0, ge=0, description="exponent of p in satimp's weight of a token")
    beta2: float = Field(1.0, ge=0, description="exponent of 1 - p in satimp's weight of a token")
    delta: float = Field(0.0, description="margin of simnpo (the paper's gamma)")
    layer: int = Field(7, ge=0, description="decoder block whose output rmu and embed_diff read, counted from 0")
    divergence: Literal["tv", "kl", "pearson"] = Field(
        "tv", description="of flat, between answers and refusals: total variation, Kullback-Leibler or Pearson"
    )
    target: str = Field(
        "No idea", min_length=1, description="text whose tokens, repeated, jensun teaches in place of those to forget"
    )
    retain_loss_eps: float | None = Field(
        None,
        ge=0,
        description="retain loss that pdu allows: above it the weight of the retain loss rises, below it falls",
    )
    dual_step_size: float = Field(1.0, gt=0, description="of pdu: how far that weight, 1 at first, moves a step")
    dual_warmup_steps: int = Field(0, ge=0, description="steps of pdu before that weight moves")
    steering_coeff: float = Field(20.0, description="length of rmu's target, its steering coefficient c")


class Synthesis(Section):
    rule: Literal[
        "sum",
        "sago",
        "pcgrad",
        "blur",
        "mgda",
        "cagrad",
        "imtl_g",
        "conflict_free",
        "nash_mtl",
        "auxinash",
        "aligned_mtl",
        "sdmgrad",
        "upgrad",
        "dualproj",
        "barrier",
        "agem",
        "mask",
        "graddrop",
        "gradvac",
        "bloop",
        "gru",
    ] = Field("sago", description="how the two gradients are combined")
    scope: Literal["element", "module", "layer", "global"] | None = Field(
        None, description="the unit for which conflict is decided; null: the rule's scope in the paper"
    )
    alpha: float = Field(1.0, ge=0, description="weight of the retain gradient")
    gamma: float = Field(1.0, ge=0, description="weight of the forget gradient")
    metric: Literal["euclidean", "adam"] = Field(
        "euclidean",
        description="of the inner products that a rule sees: plain sums, or sums weighted by 1/(√v̂ + eps) as Adam "
        "weights a gradient; the same for sgd, before the first step and on single elements",
    )
    zero_forget: Literal["literal", "retain"] = Field(
        "literal", description="sago's result where the forget gradient is exactly 0: 0 (paper) or the retain gradient"
    )
    preference: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of retention, the rest is of forgetting, in conflict_free, auxinash, aligned_mtl, sdmgrad, "
        "upgrad and dualproj; null: 0.5",
    )
    c: float | None = Field(
        None, ge=0, lt=1, description="how far cagrad goes from its centre, in lengths of the centre; null: 0.5"
    )
    centre: Literal["sum", "retain"] | None = Field(
        None, description="of cagrad: half the sum of the two gradients (its paper), or the retain gradient; null: sum"
    )
    regularization: float | None = Field(
        None, ge=0, description="lambda of sdmgrad: how much it is drawn to the preferred combination; null: 0.3"
    )
    new_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the present step in the moving average; null: 0.8 in gru, 0.1 in bloop, 0.5 in gradvac",
    )
    confine: Confine | None = Field(None, description="limit each update to a share of the weights; null: all move")
    stash_device: Literal["device", "host"] = Field(
        "device", description="memory of the forget buffer: the GPU, or pinned host memory"
    )
    geometry: bool = Field(False, description="measure the cosines under `sum` too (costs the forget buffer)")
    update_geometry: bool = Field(
        True, description="measure at each step what the update does along the retain gradient (time, no memory)"
    )
    layer_geometry_every: int = Field(
        10,
        ge=0,
        description="steps between measurements of each layer's cosines and conflicts, beside one at the last step; "
        "0 is off",
    )


class Optimizer(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = Field(
        None,
        gt=0,
        description="null: by the number of parameters, 1e-5 (8e9 / parameters)^0.4 rounded to one digit: 1e-5 at 8 "
        "billion, 5e-5 at 135 million; with model.lora ten times that",
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="not applied to norms and biases, as in transformers' Trainer")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="fraction of the steps; 0 is off")
    max_grad_norm: float = Field(1.0, ge=0, description="largest gradient norm, after synthesis; 0 is off")


DEFAULT_STEPS = 100


class Train(Section):
    steps: int | None = Field(None, ge=1, description="optimizer steps; 100 unless epochs are given")
    epochs: float | None = Field(None, gt=0, description="instead of steps: passes over the forget set")
    batch_size: int = Field(32, ge=1, description="sequences per task and step, over all ranks")
    micro_batch_size: int = Field(4, ge=1, description="sequences per forward pass and rank")
    schedule: Literal["sequential", "joint"] = Field(
        "sequential",
        description="forward and backward of the two tasks: one after the other, or both in one pass, which gathers "
        "each weight once for both and stores the activations of both",
    )
    deepspeed: str = Field(
        "auto",
        description="DeepSpeed file, or the name of a shipped one (zero3): ZeRO, precision and communication; auto: "
        "ds_configs/zero3.json on GPUs, ds_configs/cpu.json on a CPU",
    )
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints for --resume; 0 is off")
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints that are not deleted")
    export_every: int = Field(0, ge=0, description="steps between exports of the model during training; 0 is off")
    probe_every: int = Field(
        0,
        ge=0,
        description="steps between probes (data.probes), beside one before training and one after it; 0 is off",
    )
    stop_at: dict[SetName, dict[Literal[TextMeasure, "accuracy"], float]] = Field(
        {},
        description="levels of probes, {set: {measure: level}}; a level is passed at the first probe on it, or on the "
        "other side of it than the first probe of the run",
    )
    stop_action: Literal["end", "export"] = Field(
        "end",
        description="where the first level of stop_at is passed: end the run with that model, or export the model once "
        "and go on",
    )
    max_skipped: int = Field(10, ge=1, description="non-finite steps in a row that end the run")
    timeout_minutes: float = Field(
        30.0, gt=0, description="minutes that a rank waits for another before it ends with an error"
    )


class RunConfig(Section):
    """The resolved configuration of one run; `config.yaml` in the run folder is exactly this."""

    output: FilePath = Field(description="the run folder")
    cache: FilePath = Field(
        "~/.cache/unlearning",
        validate_default=True,
        description="tokenised corpora and reference log-probabilities; safe to delete",
    )
    seed: int = Field(0, ge=0, description="data order, initial adapters, dropout")
    method: str | None = Field(None, description="the preset of this run (a label)")
    model: Model
    data: Data
    objective: Objective = Objective()  # pyright: ignore[reportCallIssue]
    synthesis: Synthesis = Synthesis()  # pyright: ignore[reportCallIssue]
    optimizer: Optimizer = Optimizer()  # pyright: ignore[reportCallIssue]
    train: Train = Train()  # pyright: ignore[reportCallIssue]

    @property
    def tasks(self) -> list[str]:
        """The tasks of each step, in the order of their backward passes; a task with objective `none` is absent."""
        return [task for task in ("forget", "retain") if getattr(self.objective, task) != "none"]

    @property
    def probes(self) -> dict[str, Probe]:
        """The sets that probes measure: the corpora, unless `data.probes` names others so, then those of it."""
        data, shared = self.data, {*Source.model_fields}
        corpora = {task: corpus for task in ("forget", "retain") if (corpus := getattr(data, task)) is not None}
        own = {task: Probe(**corpus.model_dump(include=shared)) for task, corpus in corpora.items()}
        return {**own, **data.probes}
