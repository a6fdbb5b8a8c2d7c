"""How well scores follow listeners: correlations per dataset, their weighted mean, and what a difference is worth.

Arithmetic alone: it needs no model and no audio. Everywhere `mos` are listeners' scores, shape (clips,), and scores
are a model's for the same clips.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MIN_CLIPS = 3
"""Fewer clips of a dataset have no correlation: two points always lie on a line."""

CONFIDENCE = 0.95

_CONSTANT = 1e-6  # MOS; a network that says the same of everything still rounds differently
_CHUNK = 1 << 21  # numbers drawn at once

Row = dict[str, Any]


class Difference(NamedTuple):
    """How much a quantity of one model is above another's, and the bounds of its 95% interval."""

    value: float
    low: float
    high: float


def pcc(mos: np.ndarray, scores: np.ndarray) -> float | None:
    """Pearson's correlation; None for fewer than three clips, or where either side is constant (to 1e-6)."""
    if len(mos) < MIN_CLIPS:
        return None
    correlation = float(_pccs(np.asarray(mos, float)[None], np.asarray(scores, float)[None])[0])
    return None if np.isnan(correlation) else correlation


def by_dataset(datasets: Sequence[str], mos: np.ndarray, models: Mapping[str, np.ndarray]) -> list[Row]:
    """A row per dataset, sorted: dataset, clips, and under each model's name its PCC, or None where it has none."""
    rows = []
    for dataset, members in _members(datasets, mos).items():
        pccs = {name: pcc(mos[members], scores[members]) for name, scores in models.items()}
        rows.append({"dataset": dataset, "clips": len(members), **pccs})
    return rows


def comparable(datasets: Sequence[str], mos: np.ndarray) -> np.ndarray:
    """Which clips count in a mean over datasets, shape (clips,): those of datasets with three clips or more whose
    listeners' scores are not constant. It depends on no model, so that all are judged on the same clips."""
    counts = np.zeros(len(mos), bool)
    for members in _members(datasets, mos).values():
        counts[members] = len(members) >= MIN_CLIPS and np.ptp(mos[members]) >= _CONSTANT
    return counts


def mean_pcc(datasets: Sequence[str], mos: np.ndarray, scores: np.ndarray) -> float | None:
    """The mean of the datasets' PCCs weighted by their clips, over `comparable` ones; None where there is none.

    A model that gives all clips of a dataset the same score has PCC 0 there: it must not gain by that.
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
    """`mean_pcc` of the candidate minus that of the champion, with its interval from a paired bootstrap over clips.

    Each resample draws as many clips of every dataset as it has, with replacement, the same for both models; the bounds
    are percentiles. Where all the clips drawn of a dataset have one score of the listeners, it counts as no difference,
    which keeps both bounds near 0. The same arguments give the same bits. None where no dataset is `comparable`.
    """
    counts = comparable(datasets, mos)
    if not counts.any():
        return None
    value = (mean_pcc(datasets, mos, candidate) or 0.0) - (mean_pcc(datasets, mos, champion) or 0.0)
    drawn = np.zeros(resamples)
    kept = (mos[counts], candidate[counts], champion[counts])
    for number, members in enumerate(_members(np.asarray(datasets, object)[counts], kept[0]).values()):
        rng = np.random.default_rng([seed, number])
        size = max(1, _CHUNK // len(members))
        for start in range(0, resamples, size):
            clips = members[rng.integers(len(members), size=(min(size, resamples - start), len(members)))]
            heard, new, old = (values[clips] for values in kept)
            # A constant model has correlation 0; constant listeners make both so.
            difference = np.nan_to_num(_pccs(heard, new)) - np.nan_to_num(_pccs(heard, old))
            drawn[start : start + size] += difference * len(members) / counts.sum()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Difference(float(value), float(low), float(high))


def _pccs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row: (rows, clips) twice to (rows,), NaN where a row is constant."""
    constant = (np.ptp(x, axis=1) < _CONSTANT) | (np.ptp(y, axis=1) < _CONSTANT)
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.where(constant, np.nan, correlation)


def _members(datasets: Sequence[str] | np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """The clips' numbers of each dataset, in the order of the datasets' names."""
    names = np.asarray(datasets, object).astype(str)
    if names.shape != np.shape(values):
        raise ValueError(f"{len(names)} datasets for values of shape {np.shape(values)}; give one for each clip")
    return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
