"""Sharded equals dense: THE test. Real DeepSpeed engines under ZeRO-3 against the plain loop of `tests/oracle.py`.

The plain loop is one process and keeps the frozen original as a whole second model: so each objective is compared
across numbers of ranks too, and what the program does instead of a second model must leave no trace in the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.cases import CASES

# The frozen original is swapped in otherwise on each stage: shares of tensors under ZeRO-3, whole tensors below it; and
# gathered tensors may be at hand (persistent), on their way (prefetched), on the CPU (offloaded) or have a second copy
# within the machine (hpZ; on four ranks, as two machines, in test_hpz.py) when that happens.
PREFETCHING = {"stage3_prefetch_bucket_size": 10**6, "overlap_comm": True}
ZERO: dict[str, Any] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2, "overlap_comm": True},
    "persistent": {"stage": 3, "stage3_param_persistence_threshold": 10**6, **PREFETCHING},
    "some-persistent": {"stage": 3, "stage3_param_persistence_threshold": 1500, **PREFETCHING},
    "none-persistent": {"stage": 3, "stage3_param_persistence_threshold": 0, **PREFETCHING},
    "hpz": {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0},
    "offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
ON_EACH = ("npo-kl", "rmu-embed_diff")  # stage
DECAYED = ("retain-only", "decayed-pcgrad", "decayed-sgd")  # likewise: two groups of tensors on each stage
# By default: the original of all weights on each stage, that of a few tensors where it is stored otherwise; AdamW and
# SGD where weights are stored otherwise. Slow: the rest.
FEW_ON_EACH = [
    *((name, "npo-kl") for name in ("stage0", "stage2", "persistent", "none-persistent", "offload")),
    *((name, "rmu-embed_diff") for name in ("stage2", "none-persistent")),
]
MORE_ON_EACH = [(name, case) for name in ZERO for case in ON_EACH if (name, case) not in FEW_ON_EACH]
FEW_DECAYED = [
    *((name, "decayed-pcgrad") for name in ("stage0", "stage2", "none-persistent", "offload")),
    *((name, "decayed-sgd") for name in ("stage1", "none-persistent")),
]
MORE_DECAYED = [(name, case) for name in ZERO for case in DECAYED if (name, case) not in FEW_DECAYED]
# Slow on two ranks: what is also on each stage or on three ranks, and the rules that test_stages.py has on every stage,
# but for those with options of their own way through the program. On three by default: each way a loss is normalised or
# compared with the original (each kind of rule, and a tied tensor, is on three in test_stages.py). Slow: the rest.
ON_THREE = ("npo-sago", "simnpo-pcgrad", "undial-pcgrad", "npo-kl", "dpo_idk-sum")
MORE_ON_TWO = (
    *(*ON_THREE, "rmu-embed_diff", "decayed-pcgrad", "decayed-sgd", "npo-kl-tied", "rmu-embed_diff-first"),
    *("sum-measured", "sago-retain", "pcgrad-element", "blur", "gru"),
)
MORE_ON_THREE = (
    *("sum", "pcgrad-module", "pcgrad-layer", "blur", "gru", "forget-only", "retain-only", "wga-pcgrad", "idk-pcgrad"),
    *("sago", "pcgrad-global", "tied", "rmu-embed_diff"),
)
TOGETHER: list[tuple[int, tuple[str, ...]]] = [  # ranks, cases that one call trains
    (2, tuple(case for case in CASES if case not in MORE_ON_TWO)),
    (2, MORE_ON_TWO),
    (3, ON_THREE),
    (3, MORE_ON_THREE),
]
RUNS = [  # ranks, case
    pytest.param(ranks, case, marks=[pytest.mark.slow] if cases in (MORE_ON_TWO, MORE_ON_THREE) else [])
    for ranks, cases in TOGETHER
    for case in cases
]


def train_cases(configurations: list[dict[str, Any]]) -> None:
    """On every rank: the program's own run, once per configuration, in one process group.

    What it keeps of the frozen original must be, in the end, what the model was in the beginning, bit for bit.
    """
    from deepspeed.utils import groups

    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.losses import task
    from pipeline.modeling import reference
    from pipeline.trainer import run

    class Watched(reference.ReferenceWeights):
        def __init__(self, engine: Any) -> None:
            super().__init__(engine)
            self.first = [copy.clone() for copy in self.copies]
            made.append(self)

    task.ReferenceWeights = Watched  # the name that make_tasks looks up, whoever imported that module before
    for keys in configurations:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's groups are a global: every run makes its own
        made: list[Watched] = []
        config = RunConfig.model_validate(keys)
        run(config, deepspeed_config(config))
        for original in made:
            assert all(map(torch.equal, original.copies, original.first))
            present = [getattr(parameter, "ds_tensor", parameter) for parameter in original.trained]
            assert not all(map(torch.equal, present, original.first)), "the model itself has moved"


def pairs(world: World, case: dict[str, Any]) -> dict[str, Any]:
    """A corpus with something to prefer: a column of whole texts for dpo; questions and refusals for others."""
    file, refusals = world.folder / "pairs.jsonl", world.folder / "refusals.txt"
    texts = world.documents("forget")
    rows = [
        {"text": text, "asked": text.split()[0], "said": " ".join(text.split()[1:]), "better": other}
        for text, other in zip(texts, reversed(texts), strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refusals.write_text("kara vi\nlomi den nesu\nsu\n")
    if case["objective"]["forget"] in ("dpo", "altpo"):
        return {"path": str(file), "preferred": "better"}
    return {"path": str(file), "prompt": "asked", "response": "said", "refusals": str(refusals)}


def configurations(world: World, folder: Path) -> dict[str, dict[str, Any]]:
    """AdamW's eps is 1e-6: at its default of 1e-8 one element of 37,792 whose gradient passes through zero, where the
    step is the ratio of two roundings, makes up to 99 % of the error and doubles it (docs/log.md)."""
    made = {}
    for name, case in CASES.items():
        sections = {**case, "optimizer": {"eps": 1e-6, **case.get("optimizer", {})}}
        if case.get("objective", {}).get("forget") in ("dpo", "dpo_idk", "idk"):
            sections["data"] = {**world.configuration("")["data"], "max_length": 48, "forget": pairs(world, case)}
        if sections.pop("tied", False):
            sections["model"] = {**sections.get("model", {}), "path": str(world.folder / "tied")}
        made[name] = world.configuration(folder / name, **sections)
    return made


class PlainLoops(dict[str, Any]):
    """Case -> weights and metrics of the plain loop, which runs when they are first asked for."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.configurations = configurations(world, Path("unused"))

    def __missing__(self, case: str) -> Any:
        self[case] = oracle.train(self.configurations[case])
        return self[case]


@pytest.fixture(scope="module")
def expected(world: World) -> PlainLoops:
    return PlainLoops(world)


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """Number of ranks, case -> the folder of that run. It is made with all others of as many ranks, once."""

    @cache
    def made(ranks: int, cases: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        run_distributed(train_cases, ranks, [configurations(world, folder)[name] for name in cases])
        return folder

    def run(ranks: int, case: str) -> Path:
        (cases,) = (cases for of, cases in TOGETHER if of == ranks and case in cases)
        return made(ranks, cases) / case

    return run


@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_weight_change_equals_the_plain_loop(
    ranks: int, case: str, runs: Callable[[int, str], Path], expected: dict[str, Any], world: World
) -> None:
    final = load_file(runs(ranks, case) / "final" / "model.safetensors")
    initial = load_file(world.folder / ("tied" if "tied" in case else "model") / "model.safetensors")
    weights, _ = expected[case]
    assert set(weights) <= set(final)
    error = oracle.weight_change_error(final, weights, initial)
    print(f"{case}: relative error of the weight change {error:.1e}")
    assert error < (2e-4 if "sago" in case else 2e-5)


def agree_with_the_plain_loop(
    case: str, run: Path, expected: dict[str, Any], rel: float = 1e-3, abs_: float = 1e-4
) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _, records = expected[case]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    rounding = ("cos_forget_retain", "cos_combined_retain", "conflict_fraction")  # of a retain gradient of zero
    for line, record in zip(lines, records, strict=True):
        for name, value in record.items():
            if line[name] is None:  # the rule `sum` keeps no second gradient to measure
                assert case == "sum" and name.startswith(("cos", "conflict", "forget_norm", "retain_norm", "combined"))
            elif not (name in rounding and record["retain_norm"] < 1e-4):
                tolerance = 2e-3 if name == "conflict_fraction" else abs_
                assert line[name] == pytest.approx(value, rel=rel, abs=tolerance), (line["step"], name)


@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_metrics_equal_the_plain_loop(
    ranks: int, case: str, runs: Callable[[int, str], Path], expected: dict[str, Any]
) -> None:
    agree_with_the_plain_loop(case, runs(ranks, case), expected)
    lines = [json.loads(line) for line in (runs(ranks, case) / "metrics.jsonl").read_text().splitlines()]
    by_layer = [step for step, line in enumerate(lines) if any("/" in name for name in line)]
    last = [3] if lines[-1]["cos_forget_retain"] is not None else []  # whatever the interval, where there is geometry
    assert by_layer == ([1, 3] if case in ("pcgrad-layer", "sago-host") else last)


@pytest.mark.parametrize("case", ["npo-kl", "rmu-embed_diff", "rmu-embed_diff-first", "rmu-kl"])
def test_the_retain_gradient_of_the_plain_loop_is_zero_first_and_then_not(case: str, expected: dict[str, Any]) -> None:
    """Else the cases above would compare nothing, or gate on noise without need."""
    first, *rest = (record["retain_norm"] / record["forget_norm"] for record in expected[case][1])
    assert first < 1e-5
    assert min(rest) > 1e-4


def on_stages(world: World, folder: Path, wanted: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Configurations of (a key of ZERO, a case), with the DeepSpeed files that they name."""
    for name, zero in ZERO.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    made = []
    for name, case in wanted:
        keys = configurations(world, folder / name)[case]
        made.append({**keys, "train": {**keys["train"], "deepspeed": str(folder / f"{name}.json")}})
    return made


@pytest.fixture(scope="module")
def staged(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    settings = on_stages(world, folder, [*FEW_ON_EACH, *FEW_DECAYED])
    keys = configurations(world, folder / "bf16")["npo-kl"]
    settings.append({**keys, "model": {**keys["model"], "dtype": "bfloat16"}})
    run_distributed(train_cases, 2, settings)
    return folder


def assert_weights_agree(name: str, case: str, staged: Path, expected: dict[str, Any], world: World) -> None:
    final = load_file(staged / name / case / "final" / "model.safetensors")
    initial = load_file(world.folder / "model" / "model.safetensors")
    error = oracle.weight_change_error(final, expected[case][0], initial)
    print(f"{case} {name}: relative error of the weight change {error:.1e}")
    assert error < 2e-5


@pytest.mark.parametrize(("name", "case"), FEW_ON_EACH)
def test_the_frozen_original_on_every_stage(
    name: str, case: str, staged: Path, expected: dict[str, Any], world: World
) -> None:
    assert_weights_agree(name, case, staged, expected, world)
    agree_with_the_plain_loop(case, staged / name / case, expected)


@pytest.mark.parametrize(("name", "case"), FEW_DECAYED)
def test_weight_decay_on_every_stage(
    name: str, case: str, staged: Path, expected: dict[str, Any], world: World
) -> None:
    assert_weights_agree(name, case, staged, expected, world)


@pytest.mark.slow
def test_the_other_cases_on_every_stage(expected: dict[str, Any], world: World, tmp_path: Path) -> None:
    run_distributed(train_cases, 2, on_stages(world, tmp_path, [*MORE_ON_EACH, *MORE_DECAYED]))
    for name, case in (*MORE_ON_EACH, *MORE_DECAYED):
        assert_weights_agree(name, case, tmp_path, expected, world)
        if case in ON_EACH:
            agree_with_the_plain_loop(case, tmp_path / name / case, expected)


def test_the_frozen_original_in_bf16(staged: Path, expected: dict[str, Any]) -> None:
    """In bf16 the model cannot equal an fp32 one; but the original is the original, and no step is lost."""
    lines = [json.loads(line) for line in (staged / "bf16" / "npo-kl" / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["retain_loss"]) < 1e-4
    for line, record in zip(lines, expected["npo-kl"][1], strict=True):
        assert line["skipped"] == 0
        assert line["forget_loss"] == pytest.approx(record["forget_loss"], rel=0.05)
        assert line["retain_loss"] == pytest.approx(record["retain_loss"], rel=0.5, abs=1e-3)
