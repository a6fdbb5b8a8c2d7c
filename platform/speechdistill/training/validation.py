"""Validation that recipes share: the results of all workers, and their figures."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from torch import distributed as dist

from speechdistill.metrics import correlation

T = TypeVar("T")
Result = tuple[str, float, float]
"""A clip's dataset, the score of its listeners (or of the teacher), and the predicted score."""


def gathered(mine: list[T], world: int) -> list[T]:
    """The results of all workers, in the order of their ranks."""
    everyone: list[list[T]] = [mine]
    if world > 1:
        everyone = [[] for _ in range(world)]
        dist.all_gather_object(everyone, mine)
    return [result for of_worker in everyone for result in of_worker]


def figures(results: Sequence[Result]) -> dict[str, float]:
    """`mse` weighted by clips, and `pcc`. With several datasets also those of each, such as `pcc/DATASET`."""
    datasets = sorted({dataset for dataset, _, _ in results})
    found = _figures([result[1:] for result in results], "")
    for dataset in datasets if len(datasets) > 1 else []:
        found |= _figures([result[1:] for result in results if result[0] == dataset], f"/{dataset}")
    return found


def _figures(pairs: list[tuple[float, float]], suffix: str) -> dict[str, float]:
    targets, scores = np.array(pairs, np.float64).T
    mse = {f"mse{suffix}": float(np.mean((scores - targets) ** 2))}
    pcc = correlation.pcc(targets, scores)
    return mse if pcc is None else {**mse, f"pcc{suffix}": pcc}
