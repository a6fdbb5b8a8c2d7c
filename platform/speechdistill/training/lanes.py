"""Shared parts of batches of audio (`batches.py`) and of cached features (`feature_batches.py`).

A batch has as many lanes as samples. Each worker reads its share of the lanes, so the number of workers decides only
which worker reads a sample.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from speechdistill.io.errors import UserError

_THREADS, _AHEAD = 2, 4  # batches read at once, and begun before they are asked for


class Batch(NamedTuple):
    """Inputs (samples, ...): waves (samples, crop) float32 at 16 kHz, zero-padded at the end, or
    features; targets (samples,) MOS; ids for messages; per sample the number of its dataset, -1 for a teacher's label.
    """

    step: int
    inputs: np.ndarray
    targets: np.ndarray
    ids: list[str]
    datasets: np.ndarray


def share(batch_size: int, rank: int, world: int) -> list[int]:
    """The lanes of a worker. Raises `UserError` if there are more workers than lanes."""
    if world > batch_size:
        raise UserError(
            f"{world} workers cannot share batches of {batch_size} samples", f"use at most {batch_size} workers"
        )
    lanes: list[int] = np.array_split(np.arange(batch_size), world)[rank].tolist()
    return lanes


def read_ahead(read: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """Yield `read(step)` for each step in order. Later steps are read ahead on other threads."""
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for t in steps:
                waiting.append(pool.submit(read, t))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def rng(seed: int, *key: int) -> np.random.Generator:
    """A random generator for each key derived from a run's seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
