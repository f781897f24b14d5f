"""Probes while a model trains: what they measure, on how many ranks, and what they leave as it was."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from eval import report, run
from eval.attacks.training import training_config
from eval.loading import Trust
from eval.reporting.sweep_report import write_report
from eval.results.comparison import collect
from eval.results.metrics import choose
from eval.results.trajectories import read_run
from eval.sweep.axes import run_folder
from eval.sweep.check import check_runs
from eval.sweep.runs import Plan, finished_runs, refuse_without_probes, run_if_missing
from pipeline.config.load import resolve
from pipeline.config.schema import RunConfig
from pipeline.errors import InputError
from tests.conftest import World
from tests.distributed import run_distributed
from tests.eval.runs import make_run
from tests.interrupted import complete


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def probes(run: Path) -> dict[int, dict[str, float]]:
    found = {row["step"]: {k: v for k, v in row.items() if k.startswith("probe/")} for row in rows(run)}
    return {step: numbers for step, numbers in found.items() if numbers}


@pytest.fixture(scope="module")
def sections(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keys of a run with four sets of probes, of every kind."""
    folder = tmp_path_factory.mktemp("probes")
    texts = world.documents("retain")
    questions = [{"q": texts[i][:20], "options": [t[:12] for t in texts[i : i + 3]], "gold": i % 3} for i in range(7)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "answers.jsonl").write_text("".join(json.dumps({"q": t[:9], "a": t[9:]}) + "\n" for t in texts[:5]))
    sets = {
        "choice": {"path": str(folder / "choice.jsonl"), "prompt": "q", "choices": "options", "answer": "gold"},
        "answers": {"path": str(folder / "answers.jsonl"), "prompt": "q", "response": "a"},
        "retain": {"path": str(world.folder / "retain.jsonl"), "limit": 9},
    }
    data = world.configuration("")["data"]
    return {
        "data": {**data, "probes": sets, "max_length": 64},
        "train": {"steps": 4, "probe_every": 2},
        "objective": {"forget": "ga"},
    }


def trained(world: World, folder: Path, name: str, ranks: int = 1, **sections: Any) -> Path:
    config = world.write(folder / f"{name}.yaml", folder / name, **sections)
    complete(config, ranks=ranks)
    return folder / name


def plainly(run: Path, world: World, step: str = "final") -> dict[str, float]:
    """The probes by definition: an ordinary model, a row at a time, with plain loops over its tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = world.folder / "model" if step == "start" else run / step
    model: Any = AutoModelForCausalLM.from_pretrained(where).eval()
    tokenizer = AutoTokenizer.from_pretrained(where)
    config = yaml.safe_load((run / "config.yaml").read_text())
    sets = {"forget": {**config["data"]["forget"], "limit": 64, "choices": None}, **config["data"]["probes"]}

    def tokens(prompt: str | None, text: str) -> tuple[list[float], list[bool]]:
        """(loss, whether it is the greedy token) of each token of the answer."""
        head = tokenizer(f"Question: {prompt}\nAnswer: ").input_ids if prompt is not None else None
        ids = [*tokenizer(f"Question: {prompt}\nAnswer: {text}").input_ids, 0] if head else tokenizer(text).input_ids
        start = next((i for i, (a, b) in enumerate(zip(ids, head, strict=False)) if a != b), len(head)) if head else 1
        ids = ids[: config["data"]["max_length"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        losses = [-F.log_softmax(logits[i - 1], -1)[ids[i]].item() for i in range(start, len(ids))]
        return losses, [int(logits[i - 1].argmax()) == ids[i] for i in range(start, len(ids))]

    found: dict[str, float] = {}
    for name, keys in sets.items():
        lines = [json.loads(line) for line in Path(keys["path"]).read_text().splitlines()][: keys["limit"]]
        if keys["choices"]:
            hits = []
            for row in lines:
                sums = [sum(tokens(row[keys["prompt"]], option)[0]) for option in row[keys["choices"]]]
                hits.append(sums.index(min(sums)) == row[keys["answer"]])
            found[f"probe/{name}/accuracy"] = sum(hits) / len(hits)
            continue
        each = [
            tokens(row[keys["prompt"]] if keys["prompt"] else None, row[keys["response"] or "text"]) for row in lines
        ]
        each = [one for one in each if one[0]]
        strengths = []
        for _, right in each:
            k = next(k for k in range(len(right) + 1) if all(right[k:]))
            strengths.append(1 - k / len(right))
        found[f"probe/{name}/extraction_strength"] = sum(strengths) / len(each)
        found[f"probe/{name}/exact_memorization"] = sum(sum(r) / len(r) for _, r in each) / len(each)
        found[f"probe/{name}/probability"] = sum(math.exp(-sum(x) / len(x)) for x, _ in each) / len(each)
        found[f"probe/{name}/loss"] = sum(sum(x) for x, _ in each) / sum(len(x) for x, _ in each)
    return found


@pytest.fixture(scope="module")
def learnt(world: World, tmp_path_factory: pytest.TempPathFactory, sections: dict[str, Any]) -> Path:
    """A run that learns the retain corpus and ends where a third of its tokens are the greedy ones."""
    folder = tmp_path_factory.mktemp("learnt")
    train = {"steps": 60, "probe_every": 4, "stop_at": {"retain": {"exact_memorization": 0.3}}, "checkpoint_every": 4}
    more = {**sections, "train": train, "objective": {"forget": "none"}, "optimizer": {"lr": 0.02}}
    return trained(world, folder, "run", **more)


def test_a_level_ends_the_run_and_every_probe_equals_a_plain_loop(world: World, learnt: Path) -> None:
    found = probes(learnt)
    *before, last = found
    assert before == list(range(0, last, 4)) and 4 < last < 60
    values = [found[step]["probe/retain/exact_memorization"] for step in found]
    assert all(value < 0.3 for value in values[:-1]) and values[-1] >= 0.3
    assert len(rows(learnt)) == last + 1 and not (learnt / "exports").exists()
    assert f"after {last} of 60 steps" in (learnt / "final" / "README.md").read_text()
    for step, where in ((0, "start"), (last, "final")):
        assert found[step] == pytest.approx(plainly(learnt, world, where), rel=1e-5)
    assert 0.02 < found[last]["probe/retain/extraction_strength"] < 1


@pytest.mark.parametrize("at_end", [False, True])
def test_a_resumed_run_goes_on_with_its_probes(at_end: bool, learnt: Path, tmp_path: Path) -> None:
    """Cut back to its last checkpoint but one, with half a row after it, or to that of its end: the same rows again."""
    folder = tmp_path / "run"
    shutil.copytree(learnt, folder)
    shutil.rmtree(folder / "final")
    if not at_end:
        first, second = sorted((folder / "checkpoints").glob("step-*"))
        shutil.rmtree(second)
        text, half = (learnt / "metrics.jsonl").read_text(), int(first.name.removeprefix("step-")) + 2
        (folder / "metrics.jsonl").write_text(text[: text.index(f'{{"step": {half},') + 30])
    config = yaml.safe_load((learnt / "config.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({**config, "output": str(folder)}))
    complete(tmp_path / "again.yaml", "--resume", ranks=1)
    assert probes(folder) == probes(learnt) and [row["step"] for row in rows(folder)] == list(range(len(rows(learnt))))


def test_ranks_and_probes_change_nothing(world: World, tmp_path: Path, sections: dict[str, Any]) -> None:
    """Two ranks under ZeRO-3 measure what one measures; with dropout, weights are to the bit those of a run without.

    A level of the other action exports once, where it is reached.
    """
    export = {**sections["train"], "stop_at": {"forget": {"loss": 5.69}}}
    export["stop_action"] = "export"
    one = trained(world, tmp_path, "one", 1, **{**sections, "train": export})
    two = trained(world, tmp_path, "two", 2, **sections)
    first, second = probes(one), probes(two)
    assert sorted(first) == sorted(second) == [0, 2, 4]
    assert first[0] == second[0], "the weights are the same, and so is every digit"
    for step in (2, 4):
        assert first[step] == pytest.approx(second[step], rel=1e-4)
    reached = next(step for step in (2, 4) if first[step]["probe/forget/loss"] <= 5.69)
    assert [folder.name for folder in (one / "exports").iterdir()] == [f"step-{reached:06d}"]
    dropped = {**sections, "model": {"dropout": 0.1}}
    weights = []
    for every in (0, 1):
        run = trained(
            world, tmp_path, f"dropout-{every}", 2, **{**dropped, "train": {"steps": 4, "probe_every": every}}
        )
        weights.append(load_file(run / "final" / "model.safetensors"))
        assert len(probes(run)) == 5 * every
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ---------------------------------------------------------------------------------------------------------------------
# The same on exports, and in reports


def evaluate(*arguments: object) -> None:
    """`python -m eval.run` with these arguments, in this process or on each rank of a pool."""
    sys.argv = ["run.py", *map(str, arguments)]
    run.main()


def evaluated(output: Path) -> dict[int | None, dict[str, float]]:
    content = json.loads(output.read_text())
    entries = content.get("trajectory") or [content]
    return {
        entry.get("step"): {
            f"probe/{name}/{measure}": value
            for name, found in entry["suites"]["probes"]["metrics"].items()
            for measure, value in found.items()
        }
        for entry in entries
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_suite_gives_the_digits_of_the_probes(ranks: int, learnt: Path, world: World, tmp_path: Path) -> None:
    """Of the export and of the model before training; the exports of adapters are below."""
    for model, step in ((learnt / "final", max(probes(learnt))), (world.folder / "model", 0)):
        output = tmp_path / f"{step}.json"
        arguments = ("--model", model, "--suite", "probes", "--config", learnt / "config.yaml", "--output", output)
        run_distributed(evaluate, ranks, *arguments)
        assert evaluated(output) == {None: probes(learnt)[step]}


def test_adapters_are_measured_and_evaluated_alike(
    world: World, tmp_path: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder names its configuration itself; every export has the digits of its step."""
    train = {"steps": 2, "probe_every": 1, "export_every": 1}
    more = {"model": {"lora": {"r": 2, "dropout": 0.5}}, "optimizer": {"lr": 0.05}}
    folder = trained(world, tmp_path, "lora", 1, **{**sections, "train": train, **more})
    monkeypatch.setattr(sys, "argv", [])
    evaluate("--model", folder, "--suite", "probes", "--output", folder / "evaluation.json")
    found = probes(folder)
    assert evaluated(folder / "evaluation.json") == {1: found[1], 2: found[2]} and found[2] != found[0]
    digests = json.loads((folder / "digests.json").read_text())
    sources = json.loads((folder / "evaluation.json").read_text())["trajectory"][0]["suites"]["probes"]["sources"]
    assert sources == {name: digests[f"data.probes.{name}.path"] for name in ("forget", *sections["data"]["probes"])}
    for name, keys in sections["data"]["probes"].items():
        content, number = Path(keys["path"]).read_bytes(), {"choice": 7, "answers": 5, "retain": 9}[name]
        assert sources[name].startswith(hashlib.sha256(content).hexdigest()) and sources[name].endswith(f"-{number}")


def probed_run(folder: Path, numbers: list[tuple[int, float, float]], seed: int = 0) -> Path:
    """A run folder with probes (step, extraction strength of forget, probability of retain) and no evaluation."""
    make_run(folder, [], seed=seed, conflict_fraction=[0.5] * 20)
    (folder / "evaluation.json").unlink()
    lines = {row["step"]: row for row in rows(folder)}
    for step, forget, retain in numbers:
        lines.setdefault(step, {"step": step})
        lines[step] |= {"probe/forget/extraction_strength": forget, "probe/retain/probability": retain}
        lines[step] |= {"probe/arc/accuracy": retain / 2, "probe/forget/loss": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(lines[step]) + "\n" for step in sorted(lines)))
    return folder


@pytest.mark.parametrize("has_target", [False, True])
def test_a_report_reads_probes_where_nothing_was_evaluated(
    has_target: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """.5 at step 10 and 0 at step 20: .1 is 4/5 of the way, step 18, where retain is .8 - .8 * .2.

    has_target: the target model was evaluated on another suite alone; its probes are those before the first step.
    """
    folder = probed_run(tmp_path / "run", [(0, 1.0, 0.9), (10, 0.5, 0.8), (20, 0.0, 0.6)])
    found = read_run(folder)
    assert found.suites == ["probes"] and [step["step"] for step in found.steps] == list(range(1, 21))
    (tmp_path / "target.json").write_text(json.dumps({"suites": {"lm_eval": {"metrics": {"piqa": {"acc": 0.7}}}}}))
    target = ["--target", str(tmp_path / "target.json")] if has_target else []
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder), "--output", str(tmp_path / "report"), *target])
    report.main()
    parts = (tmp_path / "report" / "report.md").read_text().split("## ")
    table = next(part for part in parts if part.startswith("Results at forget extraction strength 0.1"))
    target, line = [row.split(" | ") for row in table.splitlines() if row.startswith(("| target", "| npo"))]
    assert target[1:3] == ["0.900", "0.450"]
    assert line[1].startswith("0.640") and line[2].startswith("0.320") and line[-2].startswith("18.0")


def test_an_attack_by_training_makes_no_probes_and_ends_at_no_level(world: World, tmp_path: Path) -> None:
    made = resolve(
        world.write(tmp_path / "run.yaml", "unused", train={"probe_every": 1, "stop_at": {"forget": {"loss": 9}}})
    )
    plan: Any = SimpleNamespace(config=made.model_dump(), final=Path("final"), trust=Trust(), seed=0, lr=1.0, steps=2)
    changed = RunConfig(**training_config(plan, plan.config["data"]["retain"], tmp_path))
    assert changed.train.probe_every == 0 and not changed.train.stop_at


def test_a_sweep_over_probes_evaluates_nothing(tmp_path: Path) -> None:
    recipe = {"methods": {"a": {"train": {"probe_every": 2}}, "b": {"method": "b"}}}
    plan = Plan(
        config=tmp_path / "recipe.yaml",
        overrides=(),
        suites=("probes",),
        data=None,
        measure=choose(["probes"]),
        target=None,
        output=tmp_path,
        methods=("a",),
        seeds=(0,),
        axes=(),
        ranks=1,
        trials=1,
    )
    keys = World(tmp_path).configuration("unused")
    for task in ("forget", "retain"):
        (tmp_path / f"{task}.jsonl").write_text('{"text": "a"}\n')
    plan.config.write_text(yaml.safe_dump({**keys, **recipe}))
    folder = run_folder(tmp_path, "a", {}, 0)
    probed_run(folder, [(0, 1.0, 0.9), (20, 0.0, 0.6)])
    assert finished_runs(plan, "a") == {}
    (folder / "final").mkdir()
    assert finished_runs(plan, "a") == {"recipe": [0]} and not run_if_missing(plan, "a", {}, 0)
    scores = {"step": 0.0, "lm_eval.piqa.acc": 0.7}  # of a target that was evaluated on another suite alone
    for one in (plan, replace(plan, target=scores)):
        write_report(one)
        assert json.loads((tmp_path / "frontier.json").read_text())["runs"][0]["matched"]["step"] == pytest.approx(18.0)
    [group] = collect(plan)
    assert group.retained == pytest.approx([0.9 - 0.9 * 0.3])
    check_runs(plan)
    with pytest.raises(InputError, match=r"--tasks-dir .*holds no file"):  # the options of the suite are checked too
        check_runs(replace(plan, suites=("lm_eval",), tasks={"tasks": ["mine"], "tasks_dir": folder / "final"}))
    refuse_without_probes(plan)
    with pytest.raises(InputError, match=r"b has train.probe_every 0"):
        refuse_without_probes(replace(plan, methods=("a", "b")))
