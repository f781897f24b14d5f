"""The frontier: arithmetic done by hand, a launcher that only pretends, and one small real sweep."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib import image

from eval import bios, frontier
from eval.files import exit_status
from eval.reporting import sections, sweep_report
from eval.results import comparison, stats
from eval.results.metrics import MEASURES
from eval.results.trajectories import Run
from eval.suites import biographies
from eval.suites import bios as bios_suite
from eval.sweep import axes, launch, search
from eval.sweep import runs as sweep_runs
from pipeline.errors import InputError

BIOS = MEASURES[0]
REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = {
    "synthesis": {"alpha": 1.0, "gamma": 1.0},
    "methods": {"plain": {"synthesis": {"rule": "sum"}}, "sago": {"synthesis": {"rule": "sago"}}},
}


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps


def test_lists_and_ranges() -> None:
    assert axes.parse_axis("optimizer.lr=1e-5,3e-5") == axes.Axis("optimizer.lr", ("1e-5", "3e-5"))
    assert axes.parse_axis("a.b=sum") == axes.Axis("a.b", ("sum",))
    axis = axes.parse_axis("synthesis.alpha=0.1:1")
    assert (axis.key, axis.values, axis.low, axis.high) == ("synthesis.alpha", (), 0.1, 1.0)
    both = axes.parse_sweep(["b=1,2", "a=x,y"])
    assert axes.grid(both) == [{"a": a, "b": b} for a in "xy" for b in "12"]
    assert axes.grid([]) == [{}]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (["gamma"], "KEY=A,B,C"),
        (["=1"], "KEY=A,B,C"),
        (["gamma="], "KEY=A,B,C"),
        (["--gamma=1"], "KEY=A,B,C"),
        (["gamma=1,,2"], "none of them empty"),
        (["gamma=1,1"], "different values"),
        (["gamma=1:x"], "two numbers"),
        (["gamma=1:2:3"], "two numbers"),
        (["gamma=1:0.1"], "0 < LOW < HIGH"),
        (["gamma=0:1"], "0 < LOW < HIGH"),
        (["seed=0,1"], "--seeds"),
        (["gamma=1", "gamma=2"], "gamma twice"),
    ],
)
def test_bad_sweeps(sweep: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        axes.parse_sweep(sweep)
    assert "\n" not in str(caught.value)


def test_a_folder_tells_its_setting(tmp_path: Path) -> None:
    for setting in ({}, {"a.b": "1e-5", "c": "0.1"}, {"train.deepspeed": "my configs/a=b.json"}):
        folder = axes.run_folder(tmp_path, "m", setting, 3)
        assert folder.relative_to(tmp_path).parts[::2] == ("runs", folder.parent.name)
        assert folder.name == "seed-3" and axes.parse_setting(folder.parent.name) == setting


def test_settings_are_in_order_of_numbers() -> None:
    settings = [{"k": "10"}, {"k": "word"}, {"k": "0.3"}, {"k": "1e-5"}, {"k": "1"}]
    assert [s["k"] for s in sorted(settings, key=axes.by_number)] == ["1e-5", "0.3", "1", "10", "word"]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def trained(
    points: Sequence[tuple[int, float, float]],
    cosines: Sequence[float | None] = (),
    name: str = "sago",
    seed: int = 0,
    **told: Any,
) -> comparison.Trained:
    trajectory = [
        {"step": step, "bios.forget.all": forget, "bios.retain.all": retain} for step, forget, retain in points
    ]
    steps: list[dict[str, Any]] = [{"step": n, "cos_combined_retain": c} for n, c in enumerate(cosines, start=1)]
    told = {"forget": "ga", "retain": "nll", "rule": "sago", "alpha": 1.0, "gamma": 1.0, **told}
    section = {"forget": "objective", "retain": "objective"}
    method = tuple((f"{section.get(k, 'synthesis')}.{k}", json.dumps(v)) for k, v in told.items())
    run = Run(Path(), method, seed, "model", steps, trajectory)
    setting = {"synthesis.gamma": f"{told['gamma']:g}"}
    return comparison.Trained(name, setting, seed, run, BIOS)


def group(*members: comparison.Trained) -> comparison.Group:
    return comparison.Group(members[0].method, members[0].setting, list(members))


REACHES = [(10, 0.5, 0.9), (20, 0.0, 0.7)]  # 0.1 is 4/5 of the way: step 18, retain 0.74
EARLY = [(10, 0.3, 0.8), (20, 0.1, 0.6)]  # step 20, retain 0.6
NEVER = [(10, 0.9, 0.99), (20, 0.4, 0.95)]


def test_a_table_is_over_the_seeds_that_reached_the_level() -> None:
    groups = [group(trained(REACHES), trained(EARLY, seed=1), trained(NEVER, seed=2)), group(trained(NEVER, gamma=0.1))]
    header, row, missed = sweep_report.settings_table(groups, ["bios.retain.all"], {"sago": groups[0]})
    assert header == ["method", "setting", "retain", "step", "seeds that reached it"]
    # (0.74 + 0.6) / 2; |0.74 - 0.6| / sqrt(2); (18 + 20) / 2; 2 / sqrt(2)
    assert row == ["sago", "synthesis.gamma=1 *", "0.670 ± 0.099", "19.0 ± 1.4", "2 of 3"]
    assert missed == ["sago", "synthesis.gamma=0.1", "–", "–", "0 of 1"]
    runs = [(f"seed {member.seed}", member.run) for member in groups[0].members if not member.point]
    assert "each): seed 2: 0.400." in sections.never_reached(runs, BIOS)
    assert sections.never_reached([], BIOS) == "Every run reached the level."


def test_the_best_setting_reaches_the_level_first_and_retains_most_second() -> None:
    often = group(trained(REACHES), trained(REACHES, seed=1))
    better = group(trained([(10, 0.0, 0.8)], gamma=2.0))
    seldom = group(trained([(10, 0.0, 1.0)], gamma=3.0), trained(NEVER, seed=1, gamma=3.0))
    never = group(trained(NEVER, gamma=4.0))
    assert comparison.best_groups([never, seldom, often, better]) == {"sago": better}
    assert comparison.best_groups([never, seldom, often]) == {"sago": often}
    closer = group(trained([(10, 0.2, 0.1)], gamma=5.0))
    assert comparison.best_groups([never, closer]) == {"sago": closer}


def test_merit_orders_every_run_that_arrives_above_every_run_that_does_not() -> None:
    assert search.trial_score(trained(REACHES).run, BIOS) == pytest.approx(0.74)
    assert search.trial_score(trained(NEVER).run, BIOS) == pytest.approx(-0.3)


def test_seed_means_are_over_common_steps_without_the_target() -> None:
    one = trained([(0, 1.0, 1.0), (10, 0.4, 0.8), (20, 0.2, 0.6)])
    other = trained([(0, 1.0, 1.0), (10, 0.2, 0.6)], seed=1)
    (mean,) = comparison.seed_means(group(one, other))
    assert mean == pytest.approx({"step": 10, "forget": 0.3, "retain": 0.7})


def test_pareto() -> None:
    points = [
        {"forget": f, "retain": r}
        for f, r in [(0.5, 0.9), (0.1, 0.4), (0.3, 0.4), (0.5, 0.8), (0.2, 0.7), (0.2, 0.7), (0.9, 0.9), (0.1, 0.3)]
    ]
    assert [(p["forget"], p["retain"]) for p in stats.pareto(points)] == [
        (0.1, 0.4),
        (0.2, 0.7),
        (0.2, 0.7),
        (0.5, 0.9),
    ]


def test_the_cosine_stops_at_the_matched_step() -> None:
    run = trained([(2, 0.3, 0.9), (4, 0.1, 0.8), (6, 0.0, 0.1)], [0.1, 0.2, None, 0.6, 9.0, 9.0])
    assert run.point and run.point["step"] == pytest.approx(4) and run.cosine == pytest.approx(0.3)
    run = trained([(2, 0.3, 0.9), (4, 0.0, 0.8)], [0.1, 0.3, 0.8, 9.0])  # 2/3 of the way: step 3.33
    assert run.cosine == pytest.approx(0.4)
    assert trained(NEVER, [0.5]).cosine is None


def test_correlations_by_hand() -> None:
    assert stats.ranks_of([2.0, 1.0, 2.0, 5.0]).tolist() == [2.5, 1.0, 2.5, 4.0]
    pairs = [(0.1, 0.5), (0.2, 0.7), (0.3, 0.6), (0.4, 0.9), (0.5, 0.8)]
    members = [trained([(1, 0.1, retain)], [cosine]) for cosine, retain in pairs]
    members += [trained(NEVER, [0.5]), trained([(1, 0.1, 0.5)], [None])]  # neither counts
    # deviations (-.2 -.1 0 .1 .2) and (-.2 0 -.1 .2 .1); ranks 1 2 3 4 5 and 1 3 2 5 4: 1 - 6 * 4 / (5 * 24)
    expected = {"n": 5, "pearson": 0.08 / math.sqrt(0.1 * 0.1), "spearman": 0.8}
    assert comparison.cosine_and_retention(members) == pytest.approx(expected)
    assert comparison.cosine_and_retention(members[:4]) == {"n": 4, "pearson": None, "spearman": None}
    alike = [trained([(1, 0.1, retain)], [0.2]) for retain in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert comparison.cosine_and_retention(alike) == {"n": 5, "pearson": None, "spearman": None}


def plain(retains: Sequence[float], **told: Any) -> comparison.Group:
    members = [trained([(1, 0.1, r)], name="plain", seed=i, rule="sum", **told) for i, r in enumerate(retains)]
    return group(*members)


def test_the_first_open_question() -> None:
    sago = group(trained([(1, 0.1, 0.8)]), trained([(1, 0.1, 0.9)], seed=1))  # 0.85 ± 0.0707
    settings = [plain([0.2, 0.3], gamma=1.0), plain([0.84, 0.84], gamma=0.1, alpha=0.5)]
    (answer,) = comparison.sum_against_others([*settings, sago])
    assert answer["sum"]["ratio"] == pytest.approx(0.2) and answer["ratios_tried"] == 2
    assert answer["difference"] == pytest.approx(0.01)
    assert "+0.010" in (said := comparison.answer_sum([answer], 0.1)) and "reaches the same frontier" in said
    far = comparison.sum_against_others([settings[0], plain([0.5, 0.5], gamma=0.1), sago])
    assert "does not reach it" in comparison.answer_sum(far, 0.1)
    ahead = comparison.sum_against_others([settings[0], plain([0.99, 0.99], gamma=0.1), sago])
    assert "sum is ahead" in comparison.answer_sum(ahead, 0.1)
    one = comparison.sum_against_others([settings[0], plain([0.5], gamma=0.1), sago])
    assert "no spread" in comparison.answer_sum(one, 0.1)
    # one ratio only; another objective; a rule that never arrives
    assert "Not answered" in comparison.answer_sum(comparison.sum_against_others([settings[0], sago]), 0.1)
    other = group(trained([(1, 0.1, 0.8)], forget="npo"))
    assert comparison.sum_against_others([*settings, other]) == []
    late = comparison.sum_against_others([*settings, group(trained(NEVER))])
    assert late[0]["difference"] is None and "sago reached forget 0.1 in no run" in comparison.answer_sum(late, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# A launcher that pretends


class Pretender:
    """Stands for `sweep_runs.call`: writes what the two commands would; the retain score is best at gamma 0.3."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []
        self.before: Callable[[int, Path, Path], int | None] = lambda number, folder, log: None

    def __call__(self, line: Sequence[str], log: Path) -> int:
        options = dict(pairwise(line))
        training = "pipeline.train" in line
        folder = Path(options["--output"] if training else options["--model"])
        self.lines.append([*line])
        status = self.before(len(self.lines), folder, log)
        if status is not None:
            return status
        if training:
            self.train(folder, options)
            return 0
        told = yaml.safe_load((folder / "config.yaml").read_text())
        retain = 1 - 0.2 * abs(math.log(told["synthesis"]["gamma"] / 0.3)) - 0.01 * told["seed"]
        trajectory = [
            {"step": step, "suites": {"bios": {"metrics": {"forget": {"all": forget}, "retain": {"all": retain}}}}}
            for step, forget in ((1, 0.5), (2, 0.05))
        ]
        Path(options["--output"]).write_text(json.dumps({"trajectory": trajectory, "command": "evaluate it"}))
        return 0

    def train(self, folder: Path, options: dict[str, str]) -> None:
        (folder / "final").mkdir(parents=True)
        gamma = float(options.get("--synthesis.gamma", 1))
        synthesis = {"alpha": 1.0, "gamma": gamma, **RECIPE["methods"][options["--method"]]["synthesis"]}
        told = {"seed": int(options["--seed"]), "model": {}, "objective": {"forget": "ga", "retain": "nll"}}
        (folder / "config.yaml").write_text(yaml.safe_dump({**told, "synthesis": synthesis, "optimizer": {"lr": 0.1}}))
        numbers = ("forget_loss", "retain_loss", "cos_forget_retain", "cos_combined_forget", "cos_combined_retain")
        rows = ({"step": step, **dict.fromkeys(numbers, gamma)} for step in (1, 2))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def told(self) -> list[tuple[str, str]]:
        """(what, run folder behind `runs`) of each call."""
        names = []
        for line in self.lines:
            options = dict(pairwise(line))
            training = "pipeline.train" in line
            folder = options["--output"] if training else options["--model"]
            names.append(("train" if training else "evaluate", folder.split("/runs/")[1]))
        return names


@pytest.fixture
def pretender(monkeypatch: pytest.MonkeyPatch) -> Pretender:
    stub = Pretender()
    monkeypatch.setattr(sweep_runs, "call", stub)
    return stub


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., int]:
    """The command in this process, on a recipe with `plain` and `sago`, into tmp_path/out.

    Its figure is drawn in the one test that looks at it.
    """
    if request.function is not test_a_grid_runs_everything_once:
        monkeypatch.setattr(sweep_report, "png", lambda figure: b"")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr(frontier, "end_on_terminate", lambda: None)  # the test runner keeps its own

    def run(*arguments: object) -> int:
        fixed = ["frontier.py", "--config", tmp_path / "recipe.yaml", "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [*map(str, [*fixed, *arguments])])
        return exit_status(frontier.main)

    return run


GRID = ("--methods", "plain", "sago", "--seeds", 0, 1, "--sweep", "synthesis.gamma=0.3,1")


def test_a_grid_runs_everything_once(pretender: Pretender, command: Callable[..., int], tmp_path: Path) -> None:
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
        {"mean": 0.995, "sd": 0.01 / math.sqrt(2)}
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


def test_a_kill_loses_nothing(pretender: Pretender, command: Callable[..., int], tmp_path: Path) -> None:
    def kill_in_third_training(number: int, folder: Path, log: Path) -> None:
        if number == 5:
            (folder / "exports").mkdir(parents=True)
            raise KeyboardInterrupt

    pretender.before = kill_in_third_training
    with pytest.raises(KeyboardInterrupt):
        command(*GRID)
    assert len(json.loads((tmp_path / "out" / "frontier.json").read_text())["runs"]) == 2
    left_over = tmp_path / "out" / "runs" / "plain" / "synthesis.gamma=1" / "seed-0"
    assert left_over.is_dir()

    pretender.lines.clear()
    pretender.before = lambda number, folder, log: None
    assert command(*GRID) == 0
    assert len(pretender.lines) == 2 * 6 and pretender.told()[0] == ("train", "plain/synthesis.gamma=1/seed-0")
    assert not (left_over / "exports").exists() and "--resume" not in pretender.lines[0]
    assert len(json.loads((tmp_path / "out" / "frontier.json").read_text())["runs"]) == 8


def test_checkpoints_are_resumed_and_finished_training_is_only_evaluated(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path
) -> None:
    runs = tmp_path / "out" / "runs" / "sago" / "recipe"
    checkpoint = runs / "seed-0" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").touch()
    pretender.train(runs / "seed-1", {"--method": "sago", "--seed": "1"})
    assert command("--methods", "sago", "--seeds", 0, 1) == 0
    expected = (("train", 0), ("evaluate", 0), ("evaluate", 1))
    assert pretender.told() == [(what, f"sago/recipe/seed-{seed}") for what, seed in expected]
    assert pretender.lines[0][-1] == "--resume" and checkpoint.is_dir()


RANGE = ("--methods", "sago", "--seeds", 0, "--sweep", "synthesis.gamma=0.01:10", "optimizer.lr=1,2", "--trials", 14)


def test_an_interrupted_study_proposes_what_it_would_have(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontier, "write_report", lambda plan: [])  # it takes most of the time
    assert command(*RANGE) == 0
    whole = [folder for what, folder in pretender.told() if what == "train"]
    gammas = [float(axes.parse_setting(folder.split("/")[1])["synthesis.gamma"]) for folder in whole]
    assert len(whole) == 14 and all(0.01 <= gamma <= 10 for gamma in gammas)
    assert {axes.parse_setting(folder.split("/")[1])["optimizer.lr"] for folder in whole} == {"1", "2"}
    # What the estimator proposes after its ten random settings lies nearer to 0.3, the best, than those do.
    distances = [abs(math.log(gamma / 0.3)) for gamma in gammas]
    assert sum(distances[10:]) / 4 < sum(distances[:10]) / 10
    pretender.lines.clear()
    assert command(*RANGE) == 0 and pretender.lines == []

    shutil.rmtree(tmp_path / "out")

    def kill(number: int, folder: Path, log: Path) -> None:
        if number == 25:  # the thirteenth training
            raise KeyboardInterrupt

    pretender.before = kill
    with pytest.raises(KeyboardInterrupt):
        command(*RANGE)
    pretender.lines.pop()
    pretender.before = lambda number, folder, log: None
    assert command(*RANGE) == 0
    assert [folder for what, folder in pretender.told() if what == "train"] == whole


def test_a_failed_run_is_told_and_the_others_go_on(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(number: int, folder: Path, log: Path) -> int | None:
        training = log.name.endswith(".training")
        if "plain" not in str(folder) or training != (folder.name == "seed-0"):
            return None  # of plain, seed 0 fails in training and seed 1 in evaluation
        log.parent.mkdir(parents=True, exist_ok=True)
        told = "error: no key 'gama'; did you mean 'gamma'?" if training else "RuntimeError: 10 steps"
        Path(f"{log}.err").write_text(f"0%|  |\rTraceback\n{told}\n\n")
        return 1 + training

    pretender.before = fail
    assert command("--methods", "plain", "sago", "--seeds", 0, 1) == 1
    said = capsys.readouterr()
    assert "2 of 4 runs failed" in said.err and said.err.count("\n") == 3
    answer = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [(run["method"], run["seed"]) for run in answer["runs"]] == [("sago", 0), ("sago", 1)]
    first, second = answer["failures"]
    assert (first["method"], first["seed"], first["what"], first["status"]) == ("plain", 0, "training", 2)
    assert first["lines"] == ["0%|  |", "Traceback", "error: no key 'gama'; did you mean 'gamma'?"]
    assert (second["seed"], second["what"], second["status"]) == (1, "evaluating", 1)
    text = (tmp_path / "out" / "frontier.md").read_text()
    assert "| no key 'gama'; did you mean 'gamma'? |" in text and "| RuntimeError: 10 steps |" in text
    assert str(tmp_path / "out" / "runs" / "plain" / "recipe" / "seed-0.training.err") in text

    pretender.before = lambda number, folder, log: None
    pretender.lines.clear()
    assert command("--methods", "plain", "sago", "--seeds", 0, 1) == 0  # the same command tries them again
    expected = (("train", 0), ("evaluate", 0), ("evaluate", 1))
    assert pretender.told() == [(what, f"plain/recipe/seed-{seed}") for what, seed in expected]
    assert json.loads((tmp_path / "out" / "frontier.json").read_text())["failures"] == []


def test_where_every_run_fails_the_slip_can_be_repaired(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path
) -> None:
    def fail(number: int, folder: Path, log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{log}.err").touch()
        return 2

    pretender.before = fail
    assert command("--methods", "sago", "--seeds", 0) == 1
    text = (tmp_path / "out" / "frontier.md").read_text()
    assert "No run has finished" in text and "nothing on stderr" in text
    assert json.loads((tmp_path / "out" / "frontier.json").read_text())["runs"] == []
    pretender.before = lambda number, folder, log: None
    assert command("--methods", "sago", "--seeds", 0, "--", "--b", 1) == 0


def test_a_setting_that_fails_counts_as_tried(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path
) -> None:
    def fail(number: int, folder: Path, log: Path) -> int | None:
        log.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{log}.err").write_text("RuntimeError: 10 steps in a row had a non-finite gradient\n")
        return 1 if number in (1, 6) else None

    pretender.before = fail
    line = ("--methods", "sago", "--seeds", 0, "--sweep", "synthesis.gamma=0.01:10", "--trials", 4)
    assert command(*line) == 1
    settings = [folder for what, folder in pretender.told() if what == "train"]
    assert len(set(settings)) == len(settings) == 4
    pretender.lines.clear()
    assert command(*line) == 0 and pretender.lines == []
    answer = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert len(answer["runs"]) == 2 and len(answer["failures"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "sagoo"], "nearest is 'sago'"),
        (["--methods", "sago", "--sweep", "gamma=1:2:3"], "gamma=1:2:3"),
        (["--methods", "sago", "--sweep", "gamma=1,2", "--trials", 3], "--trials 3"),
        (["--methods", "sago", "--ranks", 0], "--ranks 0"),
        (["--methods", "sago", "--seeds", -1], "--seeds -1"),
        (["--methods", "sago", "--level", 7], "--level 7"),
        (["--methods", "sago", "--suite", "bois"], "'bios'"),
        (["--methods", "sago", "--suite", "wmdp_bio"], "WMDP is compared by mmlu"),
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
    said: str,
) -> None:
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
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


def test_a_folder_has_one_user(
    pretender: Pretender, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even a `kill -9` of the command does not free the folder while what it started lives."""
    with launch.exclusive_lock(tmp_path / "out", "eval.frontier"):
        assert command("--methods", "sago") == 2
        assert "in use" in capsys.readouterr().err and pretender.lines == []
        child = subprocess.Popen(["sleep", "60"], close_fds=False)  # as `launch.call` starts its commands
    assert command("--methods", "sago") == 2
    child.kill()
    child.wait()
    assert command("--methods", "sago") == 0


def test_what_ends_the_command_ends_what_it_called(tmp_path: Path) -> None:
    """A process that a killed child leaves behind would go on writing into a run folder that is begun again."""
    script = (
        "import pathlib; from eval.sweep import launch\n"
        "launch.end_on_terminate()\n"
        f"launch.call(['sh', '-c', 'sleep 60 & echo $!; wait'], pathlib.Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    out = tmp_path / "log.out"
    for _ in range(400):
        if out.is_file() and out.read_text().strip():
            break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    process.terminate()
    assert process.wait(30) == 143
    status = Path(f"/proc/{int(out.read_text())}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


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
