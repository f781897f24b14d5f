"""The results of `launch/gpu_check.sh` in one file, and as a section of docs/results/benchmarks.md.

python -m pipeline.planning.device_rows FOLDER
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from pipeline.files import Json, write_whole
from pipeline.planning import combine_cost, step_cost
from pipeline.planning.memory import GIB, RESERVED

PACKAGES = ("torch", "deepspeed", "transformers")


def hardware() -> str:
    """The GPUs of this machine; its processor, where it has none."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, no GPU"


def planned_peak(shape: Json, gpus: int) -> float:
    """Bytes of one GPU that `pipeline.plan` computes for SAGO on this model under ZeRO-3, without what it reserves.

    Args:
        shape: the options of `step_cost`.
    """
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**step_cost.llama(shape)).save_pretrained(folder)
        run = {
            "output": "unused",
            "model": {"path": folder, "dtype": shape["dtype"]},
            "data": {"max_length": shape["tokens"], "forget": {"path": "unused"}, "retain": {"path": "unused"}},
            "objective": {"forget": "ga", "retain": "nll"},
            "synthesis": {"rule": "sago"},
            "optimizer": {"lr": 1e-5},
            "train": {
                "batch_size": shape["micro_batch"] * gpus,
                "micro_batch_size": shape["micro_batch"],
                "deepspeed": "zero3",
            },
        }
        file = Path(folder) / "run.yaml"
        file.write_text(json.dumps(run))  # JSON is YAML
        line = ["-m", "pipeline.plan", "--config", str(file), "--gpus", str(gpus), "--gpu-memory", "100000", "--json"]
        made = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=True)
    row = next(row for row in json.loads(made.stdout)["configurations"] if Path(row["deepspeed"]).stem == "zero3")
    return row["total"] - RESERVED


def beside(steps: Json, planned: float | None) -> list[str]:
    """Sentences on the peak of SAGO beside what was planned, and on the combination beside a copy, where measured."""
    if planned is None:
        return []
    sago = next(cost for cost in steps["costs"] if (cost["rule"], cost["schedule"]) == ("sago", "sequential"))
    peak, copied = planned / max(sago["peaks"]), steps["combination"] / steps["copy"]
    return [
        "",
        f"`pipeline.plan` computes {planned / GIB:.2f} GiB for SAGO, {peak:.0%} of its peak. The combination moves "
        f"{steps['combination'] / 1e9:.0f} GB/s, {copied:.0%} of a copy on the device.",
    ]


def rows(results: Json) -> str:
    """A section of docs/results/benchmarks.md."""
    exact, steps, shape = results["exact"], results["steps"], results["steps"]["shape"]
    passed = sum(not one["failed"] for one in exact)
    worst = max((error, rule, one["way"]) for one in exact for rule, error in one["rules"].items())
    combination = results["combination"]
    lines = [
        f"## On a device: {results['hardware']} · {results['date']}",
        "`bash launch/gpu_check.sh`",
        "",
        f"{', '.join(f'{name} {number}' for name, number in results['versions'].items())}.",
        "",
        f"Exact on {passed} of {len(exact)} ways of keeping a gradient; the largest error of a rule is {worst[0]:.1e} "
        f"({worst[1]}, {worst[2]}).",
        "",
        f"A step of a Llama of width {shape['hidden']}, {shape['layers']} layers, vocabulary {shape['vocabulary']}, "
        f"{shape['dtype']}, {shape['micro_batch']} sequences of {shape['tokens']} tokens a task and GPU, ZeRO-3:",
        "",
        step_cost.table([step_cost.Cost(**cost) for cost in steps["costs"]], steps["partition"]),
        *beside(steps, results["planned_peak"]),
        "",
        combine_cost.HEADER,
        *(combine_cost.row(int(tensors), combine_cost.Cost(**cost)) for tensors, cost in combination.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    folder = Path(sys.argv[1])
    parts = ("exact", "steps", "combination")
    results: Json = {name: json.loads((folder / f"{name}.json").read_text()) for name in parts}
    steps = results["steps"]
    results |= {
        "hardware": hardware(),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "planned_peak": planned_peak(steps["shape"], steps["ranks"]) if "copy" in steps else None,  # on GPUs
    }
    write_whole(folder / "gpu_check.json", json.dumps(results, indent=1) + "\n")
    write_whole(folder / "benchmarks.md", rows(results))
    print(f"\n{rows(results)}\nwritten to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
