"""Every launcher that the README names, on two machines simulated on this one; and how the scripts call a launcher.

The two machines (`two_machines.sh`) are as separate as the kernel can make them, except for the disks: ssh between
them, gradients over a network. With every launcher the model equals that of two ranks on one machine bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.schema import REPOSITORY
from tests.conftest import World
from tests.distributed import run_distributed

TWO_MACHINES = str(REPOSITORY / "tests" / "two_machines.sh")
SLURM = str(REPOSITORY / "tests" / "slurm_on_two_machines.sh")
ADDRESSES = {"0": "10.77.0.1", "1": "10.77.0.2"}
# Every Python that starts with this on its path imports it: it prints where the ranks are.
WITNESS = """
import os, subprocess, sys
names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
rank = next((os.environ[name] for name in names if name in os.environ), None)
if rank is not None and "pipeline.train" in sys.orig_argv:
    print("rank", rank, "at", subprocess.check_output(["hostname", "-I"], text=True), flush=True)
"""


def train(config: str, output: str) -> None:
    from pipeline.train import main

    main(["--config", config, "--output", output])


@pytest.fixture(scope="module")
def config(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO-3, by ds_configs/cpu.json."""
    folder = tmp_path_factory.mktemp("launchers")
    return world.write(folder / "run.yaml", folder / "unused", train={"steps": 3})


@pytest.fixture(scope="module")
def expected(config: Path) -> dict[str, torch.Tensor]:
    """The model of two ranks on one machine."""
    run_distributed(train, 2, str(config), str(config.parent / "local"))
    return load_file(config.parent / "local" / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def two_machines() -> None:
    probe = subprocess.run(["bash", TWO_MACHINES, "true"], capture_output=True, text=True, timeout=60, check=False)
    if probe.returncode == 77:
        pytest.skip(probe.stderr.strip())
    assert probe.returncode == 0, probe.stderr


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            pytest.skip(f"this machine lacks {program}")


@pytest.mark.slow  # two machines need root and sshd
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpirun.sh", "torchrun", "slurm.sbatch"])
def test_two_machines_make_the_model_of_one(
    launcher: str, config: Path, expected: dict[str, torch.Tensor], two_machines: None, tmp_path: Path
) -> None:
    hosts, exports, witness, output = (str(tmp_path / name) for name in ("hosts", "environment", "witness", "run"))
    Path(hosts).write_text("m1 slots=1\nm2 slots=1\n")
    Path(witness).mkdir()
    (Path(witness) / "sitecustomize.py").write_text(WITNESS)
    variables = [
        f"{name}={os.environ[name]}" for name in os.environ if re.match("DS_ACC|OMP_NUM|HF_|TOKENIZERS_", name)
    ]
    Path(exports).write_text("".join(f"{variable}\n" for variable in variables))
    environment = {**os.environ, "DS_ENV_FILE": exports, "PYTHONPATH": f"{witness}:{REPOSITORY}"}
    program = ["--config", str(config), "--output", output]
    module = ["pipeline.train", *program]
    if launcher == "pdsh":
        needs("pdsh", "pkill")
        command = ["deepspeed", "--hostfile", hosts, "--module", *module]
    elif launcher == "openmpi":
        options = ["--launcher", "openmpi", "--launcher_args=--allow-run-as-root"]
        command = ["deepspeed", "--hostfile", hosts, *options, "--module", *module]
    elif launcher == "mpirun.sh":
        command = ["bash", "launch/mpirun.sh", hosts, *program]
    elif launcher == "torchrun":
        options = "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint m1:29400"
        one = f"torchrun {options} -m {' '.join(module)}"
        there = " ".join([*variables, f"PYTHONPATH={witness}:{REPOSITORY}", f"PATH={os.environ['PATH']}"])
        command = ["bash", "-c", f"ssh m2 'cd {REPOSITORY} && env {there} {one}' & {one} && wait $!"]
    else:
        needs("slurmctld", "slurmd", "munged")
        options = ["--wait", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60"]
        log = str(tmp_path / "slurm.log")
        job = ["sbatch", *options, f"--output={log}", "launch/slurm.sbatch", *program]
        command = [
            "bash",
            SLURM,
            "bash",
            "-c",
            'log="$1"; shift; "$@"; status=$?; cat "$log"; exit $status',
            "-",
            log,
            *job,
        ]
    done = subprocess.run(
        ["bash", TWO_MACHINES, *command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert dict(re.findall(r"rank (\d) at (\S+)", done.stdout)) == ADDRESSES
    if launcher == "pdsh":
        assert re.findall(r"(m\d): rank 1 at 10.77.0.2", done.stdout) == ["m2"]
    model = load_file(Path(output) / "final" / "model.safetensors")
    assert all(torch.equal(model[name], tensor) for name, tensor in expected.items()) and len(model) == len(expected)


@pytest.mark.slow
def test_nothing_of_the_two_machines_is_seen_outside_or_left(two_machines: None) -> None:
    def outside() -> list[str]:
        commands = (
            ["ip", "-brief", "link"],
            ["ip", "netns"],
            ["hostname"],
            ["cat", "/etc/hosts", "/etc/ssh/ssh_config"],
        )
        return [subprocess.run(command, capture_output=True, text=True, check=False).stdout for command in commands]

    before = outside()
    marker = "86413.25"  # seconds: it identifies the process
    with subprocess.Popen(
        ["bash", TWO_MACHINES, "ssh", "m2", f"hostname; exec sleep {marker}"], stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None and running.stdout.readline() == b"m2\n"
        assert outside() == before
        running.kill()  # a killed script cannot clean up
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", f"sleep {marker}"], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert outside() == before
    assert subprocess.run(["bash", TWO_MACHINES, "sh", "-c", "exit 5"], check=False, timeout=60).returncode == 5


def test_mpirun_of_another_mpi_than_mpi4py_is_refused(config: Path, tmp_path: Path) -> None:
    """Each rank would train alone, into the same folder as the others."""
    program = ["-m", "pipeline.train", "--config", str(config), "--output", str(tmp_path / "run")]
    alone = subprocess.run(
        [sys.executable, *program],
        cwd=REPOSITORY,
        env={**os.environ, "PMI_RANK": "0", "PMI_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert alone.returncode == 2 and "it started 2 ranks, of which mpi4py sees 1" in alone.stderr, alone.stderr[-3000:]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# How the scripts call a launcher: stand-ins write down their arguments


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH whose deepspeed, mpirun, srun and scontrol append their arguments to `calls`, and where
    they were called to `where`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "mpirun", "srun", "scontrol"):
        script = (
            '#!/bin/bash\n[ "$1" != --version ] || { echo "$FLAVOUR"; exit; }\n'
            f'printf "%s|" {name} "$@" >>"{tmp_path}/calls"; echo >>"{tmp_path}/calls"\n'
            f'echo "$PWD $PYTHONPATH" >"{tmp_path}/where"\n'
            f"[ {name} != scontrol ] || [ \"$1\" != show ] || printf 'a3\\na7\\n'\n"
            f'[ {name} != srun ] || {{ echo "$MASTER_ADDR $MASTER_PORT"; exit "$STATUS"; }}\n'
        )
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "calls"


def script(*command: str, folder: Path | str = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "status, restarts, requeued", [(0, 0, False), (75, 0, True), (75, 2, True), (1, 1, False), (143, 0, False)]
)
def test_slurm_job_is_requeued_when_it_was_saved_and_then_resumes(
    status: int, restarts: int, requeued: bool, stand_ins: Path
) -> None:
    job = {"SLURM_JOB_NODELIST": "a[3,7]", "SLURM_JOB_ID": "12345", "SLURM_RESTART_COUNT": str(restarts)}
    done = script("launch/slurm.sbatch", "--config", "a b.yaml", **job, STATUS=str(status))
    assert (done.returncode, done.stdout, done.stderr) == (status, "a3 22345\n", "")
    calls = stand_ins.read_text()
    assert ("scontrol|requeue|12345|\n" in calls) == requeued
    assert calls.count("|rank|--config|a b.yaml|" + ("--resume|\n" if restarts else "\n")) == 1


def slurm_job(tmp_path: Path, submitted_from: Path, command: str) -> subprocess.CompletedProcess[str]:
    """The script as Slurm runs it: a copy in its spool, in another folder than the job was submitted from."""
    spool, tools = tmp_path / "spool" / "job12345", tmp_path / "bin"
    spool.mkdir(parents=True)
    shutil.copy(REPOSITORY / "launch" / "slurm.sbatch", spool / "slurm_script")
    for name, text in (
        ("scontrol", f'[ "$2" = job ] && printf "JobId=$3 JobName=unlearn\n   Command={command}\n" || echo a3'),
        ("srun", 'echo "$PWD|$PYTHONPATH"'),
        ("deepspeed", ":"),
        ("python", "exit 1"),  # has no `pipeline` of its own
    ):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "a3", "SLURM_JOB_ID": "12345", "SLURM_SUBMIT_DIR": str(submitted_from)}
    arguments = ["--config", "my.yaml"]
    return script(str(spool / "slurm_script"), *arguments, folder=spool, **job, PYTHONPATH="/other")


@pytest.mark.parametrize("arguments", ["", " --config my.yaml --output /a/launch/slurm.sbatch"])
def test_slurm_job_may_be_submitted_from_any_folder(arguments: str, stand_ins: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    done = slurm_job(tmp_path, tmp_path / "mine", f"{REPOSITORY}/launch/slurm.sbatch{arguments}")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'mine'}|{REPOSITORY}:/other\n"), done.stderr


def test_slurm_job_of_a_copied_script_finds_the_repository_it_was_submitted_from(
    stand_ins: Path, tmp_path: Path
) -> None:
    done = slurm_job(tmp_path, REPOSITORY, "/elsewhere/my.sbatch --config my.yaml")
    assert (done.returncode, done.stdout) == (0, f"{REPOSITORY}|{REPOSITORY}:/other\n"), done.stderr


def test_slurm_job_without_a_repository_says_where_to_submit(stand_ins: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    done = slurm_job(tmp_path, tmp_path / "mine", "/elsewhere/launch/slurm.sbatch --config my.yaml")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: launch/slurm.sbatch: no repository at /elsewhere or in ")
    assert "submit it from the root of the repository, or run pip install ." in done.stderr


def test_train_starts_two_ranks_where_there_is_no_gpu(stand_ins: Path) -> None:
    assert script("launch/train.sh", "--config", "a b.yaml", DS_ACCELERATOR="cpu").returncode == 0
    assert re.fullmatch(
        r"deepspeed\|--master_port\|\d+\|-q\|--num_gpus\|2\|--module\|pipeline.train\|--config\|a b.yaml\|\n",
        stand_ins.read_text(),
    )


@pytest.mark.parametrize("name", ["train.sh", "mpirun.sh"])
def test_a_script_runs_in_the_callers_folder(name: str, stand_ins: Path, tmp_path: Path) -> None:
    """So that the paths in a YAML mean the same with and without the script."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "hosts").write_text("node1 slots=8\n")
    arguments = ["hosts"] if name == "mpirun.sh" else []
    command = [str(REPOSITORY / "launch" / name), *arguments, "--config", "my.yaml"]
    more = {"FLAVOUR": "mpirun (Open MPI) 5.0.11", "DS_ACCELERATOR": "cpu", "PYTHONPATH": "/other"}
    done = script(*command, folder=tmp_path / "mine", **more)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "where").read_text() == f"{tmp_path / 'mine'} {REPOSITORY}:/other\n"


@pytest.mark.parametrize("flavour", ["mpirun (Open MPI) 5.0.11", "HYDRA build details:"])
def test_mpirun_gets_the_options_of_its_implementation(flavour: str, stand_ins: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text((REPOSITORY / "launch" / "hostfile.example").read_text().replace("node2 slots=8", "node2 slots=4"))
    more = {"FLAVOUR": flavour, "MPIRUN_OPTIONS": "--a b", "NCCL_SOCKET_IFNAME": "eth1"}
    assert script("launch/mpirun.sh", str(hosts), "--seed", "3", **more).returncode == 0
    called = stand_ins.read_text().strip("|\n").split("|")
    assert called[-7:] == ["--a", "b", shutil.which("python") or sys.executable, "-m", "pipeline.train", "--seed", "3"]
    if "Open MPI" in flavour:
        assert called[1:5] == ["--hostfile", str(hosts), "-np", "12"]
        assert {"PATH", "NCCL_SOCKET_IFNAME"} <= {called[i + 1] for i, word in enumerate(called) if word == "-x"}
    else:
        assert called[1:5] == ["-hosts", "node1:8,node2:4", "-n", "12"]


def test_mpirun_counts_the_ranks_of_every_machine(stand_ins: Path, tmp_path: Path) -> None:
    """One that it cannot count would be left out in silence."""
    hosts = tmp_path / "hosts"
    hosts.write_text("# mine\n\t\nm1 slots=2\n m3\tslots=4 # the new one\nm4 max_slots=8 slots=3\n")
    assert script("launch/mpirun.sh", str(hosts), FLAVOUR="HYDRA").returncode == 0
    assert stand_ins.read_text().startswith("mpirun|-hosts|m1:2,m3:4,m4:3|-n|9|")
    stand_ins.unlink()
    for line in ("m2", "m2 max_slots=8", "m2 slots=two", "m2 slots=0", "m2 # slots=2", ""):
        hosts.write_text(f"m1 slots=2\n{line}\nm3 slots=4\n" if line else "# none\n")
        done, message = (
            script("launch/mpirun.sh", str(hosts), FLAVOUR="mpirun (Open MPI)"),
            line and "m2 has no slots=N",
        )
        assert done.returncode == 2 and done.stderr.startswith(f"error: {hosts}: {message or 'it names no machine'}"), (
            line
        )
        assert done.stderr.count("\n") == 1 and not stand_ins.exists()
