"""What a DeepSpeed file may not set: features that have no test here, and old names of keys."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.errors import InputError
from pipeline.files import Json

# Features of DeepSpeed 0.19.8 that change a gradient or a step: (feature, the values that leave it off). A combination
# of two gradients is correct only if they are read from the right place.
UNTESTED: dict[str, tuple[str, tuple[object, ...]]] = {
    "zero_optimization.zero_quantized_gradients": ("quantised gradients (ZeRO++ qgZ)", (False, None)),
    "zero_optimization.zero_quantized_weights": ("quantised communication of weights (ZeRO++ qwZ)", (False, None)),
    "zero_optimization.zero_quantized_nontrainable_weights": ("quantised frozen weights", (False, None)),
    "zero_optimization.zenflow": ("ZenFlow", (None,)),
    "zero_optimization.offload_optimizer.super_offload": ("SuperOffload", (False, None)),
    "zero_optimization.offload_optimizer.ratio": ("an optimizer offloaded in part", (1, None)),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ("Muon", (False, None)),
    "zero_optimization.compute_grad_norm": ("a step without gradient norm", (True, None)),
    "zero_optimization.parameter_alignment": ("padding between parameters", (False, None)),
    "zero_optimization.legacy_stage1": ("the old ZeRO-1", (False, None)),
    "zero_optimization.elastic_checkpoint": ("elastic checkpoints", (False, None)),
    "zero_optimization.load_from_fp32_weights": ("resuming from rounded weights", (True, None)),
    "bf16.bf16_master_weights_and_grads": ("bf16 master weights", (False, None)),
    "bf16.bf16_optimizer_states": ("bf16 optimizer states", (False, None)),
    "bf16.immediate_grad_update": ("gradients added up during the backward pass", (False, None)),
    "bf16.check_grad_overflow": ("steps with a non-finite gradient", (True, None)),
    "fp16.fp16_master_weights_and_grads": ("fp16 master weights", (False, None)),
    "fp16.auto_cast": ("inputs in fp16", (False, None)),
    "torch_autocast.enabled": ("torch.autocast", (False, None)),
    "data_types.param_dtype": ("weights of another dtype than model.dtype", (None,)),
    "data_types.buffer_dtype": ("buffers of another dtype", (None,)),
    "data_types.keep_in_fp32_modules": ("buffers of another dtype", ("auto", None)),
    "prescale_gradients": ("gradients divided before they are added up", (False, None)),
    "gradient_predivide_factor": ("gradients divided before they are added up", (1, None)),
    "gradient_allreduce_op": ("gradients summed over ranks", ("mean", None)),
    "sequence_parallel_size": ("sequence parallelism", (1, None)),
    "expert_parallel.enabled": ("expert parallelism", (False, None)),
    "compile.deepcompile": ("DeepCompile", (False, None)),
    "data_efficiency.enabled": ("sampling and dropping of tokens", (False, None)),
    "hybrid_engine.enabled": ("the hybrid engine", (False, None)),
    "weight_quantization": ("quantised weights", (None,)),
    "checkpoint.load_universal": ("universal checkpoints", (False, None)),
    "checkpoint.use_node_local_storage": ("checkpoints on the machines' own disks", (False, None)),
    "checkpoint.writer": ("checkpoints written later", (None,)),
    "datastates_ckpt": ("checkpoints written later", (False, None)),
}

TENSOR_PARALLEL = tuple(f"tensor_parallel.{key}" for key in ("autotp_size", "tp.tp_size", "tensor_parallel.tp_size"))

OLD_NAMES = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory in zero_optimization.offload_optimizer",
}

SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # DeepSpeed's, of a dtype


def refuse_untested(config: RunConfig, given: Json, path: Path) -> None:
    """Refuse features without a test by name, under every name by which DeepSpeed reads them.

    Raises:
        InputError: the file sets something of UNTESTED or TENSOR_PARALLEL, or uses one of OLD_NAMES.
    """
    own = SHORT_NAMES[config.model.dtype]
    wire = ("communication in another dtype than fp32 or the model's", ("fp32", own, None))
    for key, (feature, off) in {**UNTESTED, "communication_data_type": wire}.items():
        value = _at(given, key)
        if value not in off and value != "auto":
            raise InputError(
                f"train.deepspeed: {path} sets {key!r} to {value!r}: {feature} would change what a gradient or a step "
                "is, and this program was never tested with that; remove it"
            )
    for key in TENSOR_PARALLEL:
        if (value := _at(given, key)) not in (0, 1, None, "auto"):
            raise InputError(
                f"train.deepspeed: {path} sets {key!r} to {value!r}: no run goes with tensor parallelism, because "
                "token losses, exports and checkpoints read whole weights, and batches go to ranks, not to groups; "
                "remove it (a loop of your own may have it: docs/guides/own-loop.md)"
            )
    for key, new in OLD_NAMES.items():
        if _at(given, key) is not None:
            raise InputError(f"train.deepspeed: {path} sets {key!r}, an old name that is not read here; write {new}")


def _at(tree: object, key: str) -> object:
    """The value below a dotted key, or None."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
