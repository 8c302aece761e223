"""Two processes on this machine, as `torchrun` starts them, but from one that has imported everything for both."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
RANKS = 2


def run_program(program: str, *arguments: object, timeout: float) -> "subprocess.CompletedProcess[str]":
    """Run a program that calls :func:`become_two_ranks`; returns when both have ended."""
    paths = os.pathsep.join([str(ROOT), str(SUPPORT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def become_two_ranks(work: Callable[..., None], *arguments: str) -> None:
    """Call ``work`` in two forks of this process, which must not have computed yet.

    An error in one of them ends the other and is raised here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (work, port, arguments)
    torch.multiprocessing.start_processes(_rank, settings, nprocs=RANKS, start_method="fork")  # type: ignore[no-untyped-call]


def _rank(rank: int, work: Callable[..., None], port: int, arguments: tuple[str, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",  # by which lightning knows torchrun's processes
    }  # fmt: skip
    work(*arguments)
