"""Processes that hold leases, or claim them at once."""

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier

from speechdistill.io import lease
from speechdistill.io.lease import LeaseError, held

_HOLDS = """
import sys
from speechdistill.io.lease import held
with held(sys.argv[1], "ingest"):
    print("held", flush=True)
    sys.stdin.read()
"""


def dead() -> bytes:
    """A lease that a killed process of this machine has left."""
    about = {"command": "ingest", "host": "a", "pid": 2**22 + 1, "since": "2026"}  # above the largest there is
    return json.dumps({**about, "machine": lease.machine()}).encode()


def of_another_machine() -> bytes:
    return json.dumps({**json.loads(dead()), "pid": 1, "machine": "another"}).encode()


@contextmanager
def holder(folder: object) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `folder` until it is left."""
    command = [sys.executable, "-c", _HOLDS, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.communicate()


def claimed_by(claimants: int, folders: list[str]) -> list[int]:
    """How many of so many processes held each folder, which they claim at the same moment and do not release before all
    have tried.
    """
    context = multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(claimants), context.Array("i", len(folders))
    processes = [context.Process(target=_claim, args=(folders, barrier, counts)) for _ in range(claimants)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return list(counts)


def _claim(folders: list[str], barrier: Barrier, counts: "multiprocessing.Array[int]") -> None:  # type: ignore[valid-type]
    for i, folder in enumerate(folders):
        barrier.wait(60)
        try:
            with held(folder, "ingest"):
                with counts.get_lock():
                    counts[i] += 1
                barrier.wait(60)
        except LeaseError:
            barrier.wait(60)
