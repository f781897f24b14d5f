"""Every command that the documents show is run: by the test named here, or in the session at the end of this file.

    python -m tests.test_documents      # the list: each command, where it stands, what runs it

`docs/log.md` is left out: it records what was run once.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pipeline.config.schema import REPOSITORY

PROGRAMS = "python|deepspeed|torchrun|tensorboard|bash|sbatch|pre-commit"


# Inside a sentence: with arguments, or it only names the program; with something to run, or it only names an option.
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) (?=.*(?:-m |--module|\.sh|\.py|\.sbatch|install|-c )).+")


SESSION = "test_a_session_of_the_readme"
BY: dict[str, list[str]] = {
    SESSION: [
        "bash launch/quickstart.sh",
        ". .venv/bin/activate",  # in front of each of the others, in this order
        "bash launch/train.sh --config my.yaml",
        "python -m eval.run --model HuggingFaceH4/zephyr-7b-beta --suite corpus --data runs/mine "
        "--output runs/before.json",
        "python -m eval.run --model runs/mine --suite corpus --output runs/mine/evaluation.json",
        "python -m eval.report runs/mine --target runs/before.json --output runs/mine/report",
        "deepspeed --module pipeline.train --config my.yaml",
        "python -m pipeline.train --help",
        "python -m pipeline.plan --config my.yaml --gpus 8 --gpu-memory 80 [--nodes 4 --bandwidth 400]",
        "python -m pipeline.plan --config my.yaml --gpus 8 --gpu-memory 80",
        "python -m pipeline.plan --config FILE --gpus N --gpu-memory 80",
        "python -m eval.run --model runs/mine --suite bios mmlu --data data --output runs/mine/evaluation.json",
        "torchrun --nproc_per_node 8 -m eval.run --model runs/mine/final --suite wmdp_bio mmlu --output scores.json",
        "deepspeed --module eval.run --model runs/mine/final --suite mmlu --ds-config ds_configs/zero3.json "
        "--output scores.json",
        "python -m eval.report runs/a runs/b --target target.json --output runs/report",
        "python -m eval.robustness --run runs/mine --suite bios --data data",
        "python -m eval.frontier --config launch/recipes/bios.yaml --methods ga_sum ga_pcgrad ga_sago --seeds 0 1 2 "
        "--sweep synthesis.gamma=0.1,0.3,1 --data runs/quickstart --target runs/quickstart/target.json "
        "--output runs/frontier -- --train.steps 240",
        "python -m pipeline.planning.objective_memory --width 16",
        "OMP_NUM_THREADS=1 python -m pipeline.planning.combine_cost --tensors 1 100 1000 2000 10000",
        "deepspeed --num_gpus 2 --module pipeline.planning.step_cost",
        "DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 2 --module pipeline.planning.step_cost --pairs 9 "
        "--rules sago pcgrad blur gru",
        "DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 2 --module pipeline.planning.step_cost --pairs 7 "
        "--rules sago",
        "python -c 'from mpi4py import MPI; print(MPI.Get_library_version())'",
    ],
    "tests/test_launchers.py::test_two_machines_make_the_model_of_one": [
        "deepspeed --hostfile hosts --module pipeline.train --config my.yaml",
        "bash launch/mpirun.sh hosts --config my.yaml",
        "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 -m pipeline.train "
        "--config my.yaml",
        "sbatch --nodes 4 launch/slurm.sbatch --config my.yaml",
    ],
    "tests/pipeline/monitoring/test_tensorboard.py::test_a_browser_draws_charts_pictures_and_a_table_of_three_runs": [
        "tensorboard --logdir runs --host localhost",
    ],
    "tests/pipeline/planning/test_device_check.py::test_the_script_finds_every_step_exact_and_writes_its_rows": [
        "bash launch/gpu_check.sh",
    ],
    "tests/eval/test_chat.py::test_a_run_answers_beside_the_model_that_it_began_with": [
        "python -m eval.chat --model runs/mine",
    ],
    "tests/test_pages.py::test_the_site_builds_without_a_warning": ["bash docs/build.sh"],
    "tests/test_probes.py::test_adapters_are_measured_and_evaluated_alike": [
        "python -m eval.run --model runs/mine --suite probes",
    ],
    "tests/eval/attacks/test_probes.py::test_sets_of_the_run_are_relearned_and_measured": [
        "python -m eval.robustness --run runs/mine --suite probes --attacks relearn int4 nf4",
    ],
    "tests/eval/attacks/test_answers.py::test_divergence_by_its_definition": [
        "python -m eval.robustness --run runs/mine --suite probes --attacks relearn_curve unrelated few_shot leak "
        "kl --texts wiki.txt",
    ],
    "tests/eval/suites/test_tofu.py::test_retain_only_model": [
        "python -m eval.run --model RETAIN_ONLY --suite tofu --data data --output data/tofu/retain_model.json",
        "python -m eval.run --model TARGET --suite tofu --data data --output data/tofu/target_model.json",
    ],
    "by hand, docs/log.md: MPICH's mpirun and Open MPI's exclude each other": [
        "deepspeed --hostfile hosts --launcher mpich pipeline/train.py --config my.yaml",
    ],
    "tests/eval/suites/test_harness_tasks.py::test_scores_are_those_of_the_harness": [
        "python -m eval.run --model runs/mine --suite bios lm_eval --tasks arc_easy wikidata "
        "--tasks-dir docs/examples/tasks --data data --output runs/mine/evaluation.json",
    ],
    "tests/test_reproduce.py::test_a_row_is_trained_evaluated_and_put_above_the_papers": [
        "bash launch/reproduce.sh table1 --gpus 8",
    ],
    "tests/eval/test_leaderboard.py::test_a_run_added_again_changes_nothing": ["python -m eval.leaderboard runs/mine"],
    "tests/test_smollm2.py::test_the_model_is_the_published_one": ["bash launch/smollm2.sh OUTPUT"],
    "by hand: the picture is what it gave": [
        "SEEDS=0 python docs/terminal.py docs/images/quickstart-terminal.svg bash launch/quickstart.sh",
    ],
    "by hand: it is this suite": ["bash tests/run.sh", "bash tests/run.sh -m slow", "bash tests/run.sh FILE -k NAME"],
    "by hand: it changes the git hooks of the clone": ["pre-commit install"],
}
PAGES = sorted(
    {*REPOSITORY.glob("*.md"), *REPOSITORY.glob("ds_configs/*.md"), *REPOSITORY.glob("docs/**/*.md")}
    - {REPOSITORY / "CHANGELOG.md", REPOSITORY / "docs" / "log.md"}
)


def commands_of(page: Path) -> list[str]:
    """The shell commands of a page: lines of its bash blocks, and whole commands inside sentences."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    found = [re.sub(r"(^|\s)#.*", "", line) for line in lines] + [code for code in inline if is_command(code)]
    commands = [" ".join(command.split()) for command in found]
    return [command for command in commands if command and not command.startswith("export ")]


def is_command(code: str) -> bool:
    code = " ".join(code.split())
    return bool(COMMAND.fullmatch(code)) and "…" not in code and not re.fullmatch(r"python -m [\w.]+", code)


DOCUMENTED = {command: page for page in reversed(PAGES) for command in commands_of(page)}
RUNNERS = {command: runner for runner, commands in BY.items() for command in commands}


def run_by(command: str) -> str:
    """What runs `command`: a test, this suite, or a person.

    Raises:
        KeyError: nothing.
    """
    if command in RUNNERS:
        return RUNNERS[command]
    if DOCUMENTED[command].name == "extending.md":  # of what is not there before the page is followed
        return "tests/test_extending.py::test_the_examples_do_what_they_say"
    if command.startswith("bash tests/run.sh "):
        return "this suite"
    if DOCUMENTED[command].name == "plan.md":
        return "tests/pipeline/planning/test_plan.py::test_the_documentation_is_what_the_command_prints"
    if DOCUMENTED[command].parent.name == "results":
        return "by hand: the page is what it gave, in hours"
    raise KeyError(f"nothing runs {command!r}, of {DOCUMENTED[command].name}: see BY")


@cache
def names_of(file: str) -> frozenset[str]:
    tree = ast.parse((REPOSITORY / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_documented_command_is_run_by_something_that_exists() -> None:
    assert not set(RUNNERS) - set(DOCUMENTED), "no longer documented"
    for command in DOCUMENTED:
        file, found, name = run_by(command).partition("::")
        if found:
            assert name in names_of(file), (command, file, name)


@pytest.mark.parametrize("command", sorted(c for c in DOCUMENTED if run_by(c) == "this suite"))
def test_every_documented_part_of_this_suite_is_there(command: str) -> None:
    words = shlex.split(command)[2:]
    files = [word for word in words if word.endswith(".py")]
    assert files
    for file in files:
        names = {name for name in names_of(file) if name.startswith("test_")}
        if "-k" in words:
            names = {name for name in names if words[words.index("-k") + 1] in name}
        assert names, command
        assert "slow" not in words or "pytest.mark.slow" in (REPOSITORY / file).read_text(), command


# ---------------------------------------------------------------------------------------------------------------------
# The session: what a newcomer types, in a copy of the repository, on two ranks of a CPU, without a network


MODEL = "HuggingFaceH4/zephyr-7b-beta"
SMALLER = {  # in a command or a file
    MODEL: "runs/quickstart/target/final",
    "data:\n": "data:\n  max_length: 64\n",
    "steps: 100": "steps: 20",
    "--nproc_per_node 8": "--nproc_per_node 2",
    "--seeds 0 1 2": "--seeds 0",
    "gamma=0.1,0.3,1": "gamma=0.3,1",
    "--train.steps 240": "--train.steps 20",
    "--config FILE --gpus N": "--config my.yaml --gpus 2",
    "[--nodes 4 --bandwidth 400]": "--nodes 4 --bandwidth 400",
    "planning.step_cost": "planning.step_cost --hidden 32 --layers 2 --vocabulary 256 --warm-up 1",
    "--pairs 9": "--pairs 2",
    "--pairs 7": "--pairs 2",
    "target.json --output runs/report": "runs/quickstart/target.json --output runs/report",
    "--output scores.json": "--data data --batch-size 8 --output scores.json",
    "--module pipeline.train --config": "--module pipeline.train --output runs/a --config",
}


def copy_of_the_repository(folder: Path) -> None:
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True).split("\0")
    for name in filter(None, tracked):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)  # else the scripts install everything once more


def smaller(text: str) -> str:
    for big, small in SMALLER.items():
        text = text.replace(big, small)
    return text


@pytest.mark.slow
def test_a_session_of_the_readme(tmp_path: Path) -> None:
    """Ten minutes. Names of the hub become the quickstart's model and corpora; numbers become smaller."""
    copy_of_the_repository(tmp_path)
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "SEEDS": "0",
    }

    def type_in(command: str) -> None:
        print(f"$ {smaller(command)}", flush=True)
        done = subprocess.run(
            ["bash", "-c", smaller(command)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert "Traceback" not in done.stderr

    quickstart, activate, *others = BY[SESSION]
    type_in(quickstart)
    lay_out_data(tmp_path)
    for command in others:
        if command.startswith("python -m eval.report runs/a runs/b"):  # which the README takes for granted
            type_in(f"{activate} && bash launch/train.sh --config my.yaml --synthesis.rule sum --output runs/b")
            for run in ("runs/a", "runs/b"):
                evaluate = f"python -m eval.run --model {run} --suite bios --data data"
                type_in(f"{activate} && {evaluate} --output {run}/evaluation.json")
        type_in(f"{activate} && {command}")
    own = (tmp_path / "runs" / "mine" / "report" / "report.md").read_text()
    assert "corpus.retain.probability" in own and (tmp_path / "runs" / "mine" / "report" / "index.html").is_file()
    report = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert "sago" in report and "sum" in report
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["suites"]["mmlu"]["counts"]["questions"]["all"] == 7


def lay_out_data(folder: Path) -> None:
    """`my.yaml` as the README has it, its two corpora, and `data/` with the suites that the README asks for."""
    (block,) = re.findall(r"^```yaml\n# my.yaml\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.S | re.M)
    assert MODEL in block
    (folder / "my.yaml").write_text(smaller(block) + "cache: runs/cache\n")
    for task in ("forget", "retain"):
        rows = (folder / "runs" / "quickstart" / "bios" / f"{task}.jsonl").read_text().splitlines()
        texts = [json.loads(row)["text"] for row in rows]
        (folder / f"{task}.txt").write_text("".join(f"{text}\n" for text in texts if "\n" not in text))
    shutil.copytree(folder / "runs" / "quickstart" / "bios", folder / "data" / "bios")
    rows = [
        {"question": f"What is {n} and one?", "choices": [str(n + 1), "none", "many", str(n)], "answer": 0}
        for n in range(7)
    ]
    for name in ("mmlu/dev/anatomy", "mmlu/test/anatomy", "wmdp/wmdp_bio"):
        file = folder / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    for documented, place in DOCUMENTED.items():
        sys.stdout.write(f"| `{documented}` | {place.relative_to(REPOSITORY)} | {run_by(documented)} |\n")
