"""Shared parts of batches of audio (`batches.py`) and of cached features (`feature_batches.py`).

A batch has as many lanes as samples. Each worker reads its share of the lanes, so the number of workers decides only
which worker reads a sample.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from speechdistill.io.errors import UserError

_THREADS, _AHEAD = 2, 4  # batches read at once, and begun before they are asked for


class Part(NamedTuple):
    """The samples of one forward and backward pass: one task, arrays of one length.

    `number` is the part's in its update, the same on all workers. A part may be shared by samples. Parts of a network
    that draws random numbers (dropout, masks) or has statistics of its own are dealt to workers whole (`deal`).
    `arrays` have a row for each sample; integers stay integers. `totals` are the divisors of each loss term: what its
    sum is divided by, over all parts and workers of this update. `ids` name samples in messages.
    """

    number: int
    task: str
    ids: list[str]
    arrays: Mapping[str, np.ndarray]
    totals: Mapping[str, float]


class Batch(NamedTuple):
    """One update of the optimiser: all parts of a worker, of which there is at least one."""

    step: int
    parts: tuple[Part, ...]


def deal(parts: Sequence[Part], rank: int, world: int) -> tuple[Part, ...]:
    """The parts of a worker, whole. Raises `UserError` if there are more workers than parts."""
    if world > len(parts):
        raise UserError(
            f"{world} workers cannot share the {len(parts)} parts of an update", f"use at most {len(parts)} workers"
        )
    return tuple(parts[rank::world])


def scored(inputs: np.ndarray, targets: np.ndarray, datasets: np.ndarray, ids: list[str], batch_size: int) -> Part:
    """A part of scored samples, for the loss term `mse`.

    `inputs` are waves (samples, crop) float32 at 16 kHz, zero-padded at the end, or features; `targets` (samples,) MOS;
    `datasets` the number of each sample's dataset, -1 for a teacher's label.
    """
    arrays = {"inputs": inputs, "targets": targets, "datasets": datasets}
    return Part(0, "score", ids, arrays, {"mse": batch_size})


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
