"""Worker processes, forked from one that has imported what takes seconds."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch import multiprocessing as mp


def spawn(worker: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Run `worker(rank, *args)` in so many processes to their end; the first failure of one is raised."""
    multiprocessing.set_forkserver_preload(["speechdistill.training.loop"])
    mp.start_processes(worker, args, nprocs, start_method="forkserver")
