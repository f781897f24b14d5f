"""What a rank prints when it ends because of another rank, or of the network between them."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.distributed import errors as rank_errors
from pipeline.distributed import process_group
from pipeline.errors import InputError
from tests.distributed import Ranks

NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL version 2.27.5
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
socketProgress: Connection closed by remote peer node7<40236>"""  # noqa: E501


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (dist.DistBackendError(NCCL), "cannot reach another rank"),
        (dist.DistNetworkError("The server socket on node7 was closed: no route to host"), "cannot reach another rank"),
        (dist.DistStoreError("wait timeout after 1800000ms, keys: /default_pg/0"), "train.timeout_minutes"),
        (
            RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: reset by peer"),
            "cannot reach another rank",
        ),
    ],
    ids=["backend", "network", "store", "gloo"],
)
def test_a_network_error_is_printed_and_explained_after_it(
    error: RuntimeError, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank_errors.is_lost(error)
    assert rank_errors.report(error, logged=True) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed.splitlines()[-1] and words in printed.splitlines()[-1]
    assert str(error) in printed
    assert printed.index(str(error)) < printed.index(words)


@pytest.mark.parametrize(
    "error", [RuntimeError("Socket timeout of the model's own"), ValueError("Broken pipe fitting")]
)
def test_an_error_that_only_mentions_the_network_is_not_one_of_it(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not rank_errors.is_lost(error)
    assert rank_errors.report(error) == 1
    printed = capsys.readouterr().err
    assert printed.rstrip().endswith(str(error)) and "another rank" not in printed


def test_ctrl_c_asks_no_other_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It reaches all of them; the one that serves their store may have ended, and torch would print C++ frames."""
    monkeypatch.setattr(rank_errors, "_is_first", lambda: pytest.fail("asked"))
    assert rank_errors.report(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nrank 0: interrupted\n"


def test_two_trainings_at_one_port_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepspeed` gives every training of a machine port 29500 unless it is given another."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(InputError, match=f"port {port} .* --master_port"):
            process_group.start()
    assert not dist.is_initialized()


def strike(how: str, culprit: int, folder: Path) -> None:
    """On each of two ranks: one fails by itself or is killed, while the other waits for it in a collective."""
    import torch
    import torch.distributed as dist

    from pipeline.distributed import errors, process_group
    from pipeline.monitoring import console

    rank = int(os.environ["RANK"])
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    console.setup_logging(rank)
    process_group.start(0.5)
    if how != "early":
        console.open_log(folder, rank)
    dist.barrier()
    try:
        if rank == culprit:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("the culprit's own error")
        dist.all_reduce(torch.ones(1))
    except BaseException as error:
        process_group.leave(errors.report(error, logged=console.log_end(error)))


def struck(how: str, culprit: int, folder: Path) -> list[str]:
    """What each of two ranks, of a pool that ends with them, prints on stderr."""
    ranks = Ranks(2)
    try:
        assert ranks.call(strike, (how, culprit, folder), timeout=120).keys() == {0, 1}, "a rank has ended well"
    finally:
        ranks.end()
    return [(folder / f"stderr-{rank}").read_text() for rank in (0, 1)]


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_other_ranks_print_one_line_and_the_culprit_its_traceback(culprit: int, tmp_path: Path) -> None:
    messages = struck("fails", culprit, tmp_path)
    assert "ZeroDivisionError: the culprit's own error" in messages[culprit] and "Traceback" in messages[culprit]
    other = messages[1 - culprit]
    assert "Traceback" not in other and "frame #" not in other
    assert f"rank {1 - culprit}: ends because another rank ended" in other
    assert "pair.cc" in other  # its own error, in a line
    log = (tmp_path / "log.txt").read_text()
    assert log.count("Traceback (most recent call last)") == 2
    assert re.search(
        rf"rank {1 - culprit} ERROR pipeline: the run ends here\nTraceback(.*\n)+RuntimeError: \[.*pair.cc", log
    )


def test_the_other_rank_prints_its_traceback_when_the_culprit_was_killed(tmp_path: Path) -> None:
    printed = struck("killed", 1, tmp_path)[0]
    assert "Traceback" in printed and printed.index("pair.cc") < printed.index("another rank was killed")
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_without_a_log_the_traceback_is_printed(tmp_path: Path) -> None:
    assert "Traceback" in struck("early", 1, tmp_path)[0]
    assert not (tmp_path / "log.txt").exists()
