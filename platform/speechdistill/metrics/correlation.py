# metrics/: figures of merit. Arithmetic only: no audio files, no model, nothing of other wings.
"""Agreement of scores with listeners: correlations per dataset, their weighted mean, and intervals of differences.

In all functions `mos` are the listeners' scores, shape (clips,), and `scores` a model's for the same clips.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

MIN_CLIPS = 3
"""Least clips of a dataset for a correlation: two points always lie on a line."""

CONFIDENCE = 0.95

CONSTANT = 1e-6  # MOS; a network that scores everything the same still rounds differently
_CHUNK = 1 << 21  # numbers drawn at once

Row = dict[str, Any]
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A figure of listeners' and a model's scores, row by row: (rows, clips) twice to (rows,)."""


class Difference(NamedTuple):
    """The difference of a quantity between two models, and the bounds of its 95% interval."""

    value: float
    low: float
    high: float


def pcc(mos: np.ndarray, scores: np.ndarray) -> float | None:
    """Return Pearson's correlation; None for fewer than three clips, or if either side is constant (to 1e-6)."""
    if len(mos) < MIN_CLIPS:
        return None
    correlation = float(pccs(np.asarray(mos, float)[None], np.asarray(scores, float)[None])[0])
    return None if np.isnan(correlation) else correlation


def by_dataset(datasets: Sequence[str], mos: np.ndarray, models: Mapping[str, np.ndarray]) -> list[Row]:
    """Return a row per dataset, sorted: dataset, clips, and each model's PCC by its name, None if undefined."""
    rows = []
    for dataset, members in _members(datasets, mos).items():
        pccs = {name: pcc(mos[members], scores[members]) for name, scores in models.items()}
        rows.append({"dataset": dataset, "clips": len(members), **pccs})
    return rows


def comparable(datasets: Sequence[str], mos: np.ndarray) -> np.ndarray:
    """Return which clips count in a mean over datasets, shape (clips,).

    Those are the clips of datasets with three clips or more whose listeners' scores are not constant. No model affects
    the choice, so that all are compared on the same clips.
    """
    counts = np.zeros(len(mos), bool)
    for members in _members(datasets, mos).values():
        counts[members] = len(members) >= MIN_CLIPS and np.ptp(mos[members]) >= CONSTANT
    return counts


def mean_pcc(datasets: Sequence[str], mos: np.ndarray, scores: np.ndarray) -> float | None:
    """Return the mean PCC of the `comparable` datasets, weighted by their clips; None if there are none.

    A model that gives all clips of a dataset the same score has PCC 0 there, so that it does not gain.
    """
    counts = comparable(datasets, mos)
    if not counts.any():
        return None
    total = 0.0
    for members in _members(np.asarray(datasets, object)[counts], mos[counts]).values():
        total += len(members) * (pcc(mos[counts][members], scores[counts][members]) or 0.0)
    return float(total / counts.sum())


def compare(
    datasets: Sequence[str],
    mos: np.ndarray,
    candidate: np.ndarray,
    champion: np.ndarray,
    resamples: int = 2_000,
    seed: int = 0,
) -> Difference | None:
    """Return the candidate's `mean_pcc` minus the champion's, with an interval from a paired bootstrap over clips.

    Each resample is the same for both models (`resampled`); the bounds are percentiles. A dataset whose drawn clips all
    have one listeners' score counts as no difference, which keeps both bounds near 0. The same arguments give the same
    bits. The result is None if no dataset is `comparable`.
    """
    models = {"candidate": candidate, "champion": champion}
    return compare_all(datasets, mos, models, resamples, seed).get(("candidate", "champion"))


def compare_all(
    datasets: Sequence[str], mos: np.ndarray, models: Mapping[str, np.ndarray], resamples: int = 2_000, seed: int = 0
) -> dict[tuple[str, str], Difference]:
    """`compare` every two models, the earlier one first, on the same resamples; empty if no dataset is `comparable`."""
    counts = comparable(datasets, mos)
    if not counts.any():
        return {}
    names, listeners = np.asarray(datasets, object)[counts], mos[counts]
    kept = {name: scores[counts] for name, scores in models.items()}
    shares = np.array([len(members) for members in _members(names, listeners).values()]) / counts.sum()
    # A constant model has correlation 0; with constant listeners both models have.
    drawn = {n: shares @ np.nan_to_num(r) for n, r in resampled(names, listeners, kept, resamples, seed).items()}
    means = {name: mean_pcc(names, listeners, scores) or 0.0 for name, scores in kept.items()}
    return {
        (one, other): Difference(means[one] - means[other], *interval(drawn[one] - drawn[other]))
        for one, other in combinations(models, 2)
    }


def resampled(
    datasets: Sequence[str] | np.ndarray,
    mos: np.ndarray,
    models: Mapping[str, np.ndarray],
    resamples: int = 2_000,
    seed: int = 0,
    statistic: Statistic | None = None,
) -> dict[str, np.ndarray]:
    """Return a statistic (default: PCC) of each model in each resample, (datasets, resamples), datasets by name.

    Each resample draws as many clips of every dataset as the dataset has, with replacement, the same for all models.
    """
    statistic = statistic or pccs
    parts = _members(datasets, mos)
    drawn = {name: np.full((len(parts), resamples), np.nan) for name in models}
    for number, members in enumerate(parts.values()):
        rng = np.random.default_rng([seed, number])
        size = max(1, _CHUNK // len(members))
        for start in range(0, resamples, size):
            clips = members[rng.integers(len(members), size=(min(size, resamples - start), len(members)))]
            for name, scores in models.items():
                drawn[name][number, start : start + size] = statistic(mos[clips], scores[clips])
    return drawn


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the 95% interval of a resampled quantity, shape (resamples,); NaN are left out."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return float(low), float(high)


def pccs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's correlations row by row: (rows, clips) twice to (rows,), NaN for a constant row."""
    constant = (np.ptp(x, axis=1) < CONSTANT) | (np.ptp(y, axis=1) < CONSTANT)
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.where(constant, np.nan, correlation)


def _members(datasets: Sequence[str] | np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the indices of each dataset's clips, datasets by name."""
    names = np.asarray(datasets, object).astype(str)
    if names.shape != np.shape(values):
        raise ValueError(f"{len(names)} datasets for values of shape {np.shape(values)}; give one for each clip")
    return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
