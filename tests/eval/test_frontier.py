"""The frontier: a launcher that only pretends, and one small real sweep."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib import image

from eval import bios
from eval.reporting import sweep_report
from eval.reporting.sweep_report import png
from eval.suites import biographies
from eval.suites import bios as bios_suite
from eval.sweep import runs as sweep_runs
from pipeline.config.schema import REPOSITORY
from tests.eval.pretender import GRID, RECIPE, Pretender


def test_a_grid_runs_everything_once(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_report, "png", png)
    assert command(*GRID, "--ranks", 3, "--", "--train.steps", 2) == 0
    folders = [f"{m}/synthesis.gamma={g}/seed-{s}" for m in ("plain", "sago") for g in ("0.3", "1") for s in (0, 1)]
    assert pretender.told() == [(what, folder) for folder in folders for what in ("train", "evaluate")]
    line = " ".join(pretender.lines[0])
    assert "--num_gpus 3 --module pipeline.train" in line and "--method plain --seed 0" in line
    assert line.endswith("--train.steps 2 --synthesis.gamma 0.3")

    answer = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [(s["method"], s["setting"]["synthesis.gamma"], s["best"]) for s in answer["settings"]] == [
        ("plain", "0.3", True),
        ("plain", "1", False),
        ("sago", "0.3", True),
        ("sago", "1", False),
    ]
    assert answer["settings"][0]["scores"]["bios.retain.all"] == pytest.approx(
        {"n": 2, "mean": 0.995, "sd": 0.01 / math.sqrt(2)}
    )
    assert answer["settings"][0]["steps"]["mean"] == pytest.approx(1 + 0.4 / 0.45)
    assert answer["correlation"]["all"]["n"] == 8 and answer["correlation"]["methods"]["sago"]["n"] == 4
    assert answer["correlation"]["all"]["pearson"] < -0.9  # the better setting has the smaller "cosine"
    assert answer["sum_against_others"][0]["difference"] == pytest.approx(0)
    text = (tmp_path / "out" / "frontier.md").read_text()
    assert all(" ".join(run["command"].split()) in text for run in answer["runs"])
    assert "| sago | synthesis.gamma=0.3 * | 0.995 ± 0.007 |" in text and "reaches the same frontier" in text
    pixels = image.imread(tmp_path / "out" / "frontier.png")
    assert pixels[..., :3].std() > 0.05

    pretender.lines.clear()
    assert command(*GRID, "--level", "0.2", "--", "--train.steps", 2) == 0  # another level asks for no new run
    assert pretender.lines == []
    assert json.loads((tmp_path / "out" / "frontier.json").read_text())["level"] == 0.2


def test_runs_that_begin_below_the_level_are_named_and_not_compared(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exports a run; both of method `plain` are below the level, the first of `sago` is above it."""

    def call(line: Sequence[str], log: Path) -> int:
        status = pretender(line, log)
        file = Path(line[-1])
        if "eval.run" in line and file.parents[2].name == "plain":
            evaluation = json.loads(file.read_text())
            for entry in evaluation["trajectory"]:
                entry["suites"]["bios"]["metrics"]["forget"]["all"] = 0.01
            file.write_text(json.dumps(evaluation))
        return status

    monkeypatch.setattr(sweep_runs, "call", call)
    sweep = ("--sweep", "synthesis.gamma=0.1,0.2,0.3,0.5,1")
    assert command("--methods", "plain", "sago", "--seeds", 0, *sweep) == 0
    report = (tmp_path / "out" / "frontier.md").read_text()
    folder = tmp_path / "out" / "runs" / "plain" / "synthesis.gamma=0.1" / "seed-0"
    assert f"in no mean at the level: {folder}" in report
    assert "plain had forgotten more than the level at the first evaluation" in report
    assert "reaches the same frontier" not in report
    answer = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [run["starts_below"] for run in answer["runs"]] == [True] * 5 + [False] * 5
    assert answer["correlation"]["all"]["n"] == 5 and answer["correlation"]["methods"]["plain"]["n"] == 0
    assert [one["difference"] for one in answer["sum_against_others"]] == [None]


def test_runs_on_other_data_are_no_seeds(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The retain corpus is made anew between two commands: its runs must not be averaged with those before."""
    digest, train = "before", pretender.train

    def train_and_tell(folder: Path, options: dict[str, str]) -> None:
        train(folder, options)
        (folder / "digests.json").write_text(json.dumps({"model.path": "same", "data.retain.path": digest}))

    pretender.train = train_and_tell  # pyright: ignore[reportAttributeAccessIssue]
    assert command("--methods", "plain", "--seeds", 0, 1) == 0
    digest = "after"
    assert command("--methods", "plain", "--seeds", 0, 1, 2, 3) == 2
    error = capsys.readouterr().err
    assert "seed-0 and" in error and "seed-2 are not seeds of one method: they differ in data.retain.path" in error
    assert pretender.told()[-1][1].endswith("seed-2"), "the first that differs ends the sweep"
    trained = len(pretender.lines)
    assert command("--methods", "plain", "--seeds", 0, 1, 2, 3) == 2 and len(pretender.lines) == trained
    report = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1]


def test_suites_and_scores_are_the_users(pretender: Pretender, command: Callable[..., int], tmp_path: Path) -> None:
    scores = ("--forget", "bios.forget.all", "--retain", "bios.forget.all", "--level", 0.2)
    assert command("--methods", "sago", "--seeds", 0, "--suite", "tofu", "bios", *scores) == 0
    assert "--suite tofu bios --output" in " ".join(pretender.lines[1])
    answer = json.loads((tmp_path / "out" / "frontier.json").read_text())
    told = (answer["suites"], answer["forget"], answer["retain"], answer["level"])
    assert told == (["tofu", "bios"], "bios.forget.all", "bios.forget.all", 0.2)
    assert answer["runs"][0]["matched"]["bios.forget.all"] == pytest.approx(0.2)


def test_a_target_that_never_knew_is_said_before_the_first_run(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before: list[str] = []

    def note(number: int, folder: Path, log: Path) -> None:
        before.append(capsys.readouterr().err)

    pretender.before = note
    for score, warned in ((0.06, True), (0.9, False)):
        metrics = {"forget": {"all": score}, "retain": {"all": 0.9}}
        (tmp_path / "target.json").write_text(json.dumps({"suites": {"bios": {"metrics": metrics}}}))
        options = ("--methods", "sago", "--seeds", 0, "--suite", "bios", "--target", tmp_path / "target.json")
        command(*options, "--output", tmp_path / f"out-{score}")
        assert ("warning: Nothing to forget: the target model has forget ROUGE-L 0.060" in before[0]) == warned
        report = (tmp_path / f"out-{score}" / "frontier.md").read_text()
        assert ("> **Note.** Nothing to forget" in report) == warned
        before.clear()


def test_tasks_of_the_harness_are_evaluated_beside(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the user gives them; runs that were evaluated on others are no runs of the same sweep."""
    tasks = ("--methods", "sago", "--seeds", 0, "--suite", "bios", "lm_eval", "--tasks-dir", tmp_path, "--tasks")
    assert command(*tasks, "piqa", "mmlu", "--limit", 9) == 0
    given = f"--suite bios lm_eval --tasks piqa mmlu --tasks-dir {tmp_path} --limit 9 --output"
    assert given in " ".join(pretender.lines[1])
    assert command(*tasks, "piqa", "--limit", 9) == 2
    assert "choice of tasks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sagoo"], "nearest is 'sago'"),
        (["--methods", "sago", "--sweep", "gamma=1:2:3"], "gamma=1:2:3"),
        (["--methods", "sago", "--sweep", "gamma=1,2", "--trials", 3], "--trials 3"),
        (["--methods", "sago", "--ranks", 0], "--ranks 0"),
        (["--methods", "sago", "--seeds", -1], "--seeds -1"),
        (["--methods", "sago", "--level", 7], "--level 7"),
        (["--methods", "sago", "--suite", "bois"], "'bios'"),
        (["--methods", "sago", "--suite", "wmdp_bio"], "WMDP is compared by mmlu"),
        (["--methods", "sago", "--suite", "bios", "lm_eval"], "--tasks names; give at least one"),
        (["--methods", "sago", "--forget", "tofu.forget.rouge"], "--forget tofu.forget.rouge"),
        (["--methods", "sago", "--", "--seed", 3], "override --seed"),
        (["--methods", "sago", "--sweep", "a.b=1,2", "--", "--a.b=3"], "override --a.b=3"),
        (["--methods", "sago", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--methods", "sago", "--target", "nowhere.json"], "nowhere.json"),
    ],
)
def test_unusable_input(
    pretender: Pretender,
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert pretender.lines == [] and not (tmp_path / "out").exists()


def test_a_folder_grows_only_by_runs_that_mean_the_same(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--methods", "sago", "--seeds", 0) == 0
    assert command("--methods", "sago", "--seeds", 0, "--", "--train.steps", 9) == 2
    assert "overrides" in capsys.readouterr().err
    assert command("--methods", "plain", "sago", "--seeds", 0, "--sweep", "synthesis.gamma=0.3") == 0
    answer = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [(s["method"], s["setting"]) for s in answer["settings"]] == [
        ("plain", {"synthesis.gamma": "0.3"}),
        ("sago", {}),
        ("sago", {"synthesis.gamma": "0.3"}),
    ]
    changed = {**RECIPE, "methods": {**RECIPE["methods"], "sago": {"synthesis": {"rule": "sago", "alpha": 2.0}}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed))
    capsys.readouterr()
    assert command("--methods", "sago", "--seeds", 0) == 2
    assert "choice of sago" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The real thing


@pytest.mark.slow
def test_a_real_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rules, one seed on one rank, on a target that knows four people by heart; starting takes most of the time."""
    import torch

    for name, number in (("NUM_FORGET", 2), ("NUM_RETAIN", 2), ("NUM_NEIGHBOURS", 1)):
        monkeypatch.setattr(biographies, name, number)
    world, target = tmp_path / "bios", tmp_path / "target"
    bios.write(world, seed=0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(world / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(world / "base")
    probes = [probe for probe in bios_suite.load_probes(world) if probe["split"] in ("forget", "retain")]
    batch = tokenizer([f"{p['prompt']} {p['answer']}\n" for p in probes], padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    recipe = yaml.safe_load((REPOSITORY / "launch" / "recipes" / "bios.yaml").read_text())
    recipe |= {"model": {"path": str(target), "dtype": "float32"}, "cache": str(tmp_path / "cache")}
    for task in ("forget", "retain"):
        recipe["data"][task]["path"] = str(tmp_path / f"{task}.jsonl")
        texts = [f"{p['prompt']} {p['answer']}\n" for p in probes if p["split"] == task]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe["train"] |= {"steps": 16, "export_every": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output = tmp_path / "out"
    line = [sys.executable, "-m", "eval.frontier", "--config", tmp_path / "recipe.yaml", "--output", output]
    line += ["--methods", "ga_sum", "ga_sago", "--seeds", "0", "--sweep", "synthesis.gamma=0.5", "--level", "0.3"]
    line += ["--ranks", "1", "--data", world, "--", "--optimizer.lr", "3e-3"]
    result = subprocess.run([*map(str, line)], cwd=REPOSITORY, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr

    answer = json.loads((output / "frontier.json").read_text())
    assert [(run["method"], run["setting"], run["seed"]) for run in answer["runs"]] == [
        (method, {"synthesis.gamma": "0.5"}, 0) for method in ("ga_sum", "ga_sago")
    ]
    for run in answer["runs"]:
        told = yaml.safe_load((Path(run["folder"]) / "config.yaml").read_text())
        assert told["synthesis"]["gamma"] == float(run["setting"]["synthesis.gamma"])
        assert told["optimizer"]["lr"] == 3e-3 and told["synthesis"]["rule"] == run["method"].removeprefix("ga_")
        assert [scores["step"] for scores in run["trajectory"]] == [4, 8, 12, 16]
        assert run["trajectory"][-1]["bios.forget.all"] < run["trajectory"][0]["bios.forget.all"] and run["matched"]
        steps = [json.loads(row) for row in (Path(run["folder"]) / "metrics.jsonl").read_text().splitlines()]
        cosines = [step["cos_combined_retain"] for step in steps if step["step"] <= run["matched"]["step"]]
        assert run["cos_combined_retain"] == pytest.approx(sum(cosines) / len(cosines))
    assert answer["correlation"]["all"]["n"] == 2 and answer["failures"] == []
    assert {"frontier.md", "frontier.png"} <= {path.name for path in output.iterdir()}
