"""The figures of merit of a model per dataset, with intervals, and the reason if a figure is undefined.

Errors are in MOS. Mappings are those of ITU-T P.1401: listeners use the scale differently in each test, so errors are
taken after the polynomial of the scores that fits the listeners best (`mapping`). Each coefficient costs one degree of
freedom (P.1401, equation 7-29).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

from speechdistill.metrics import correlation
from speechdistill.metrics.correlation import CONSTANT, MIN_CLIPS, Statistic

METRICS = {
    "pcc": "PCC",
    "srcc": "SRCC",
    "ktau": "KTAU",
    "mse": "MSE",
    "rmse": "RMSE",
    "rmse_first": "RMSE, first order",
    "rmse_third": "RMSE, third order",
}
"""Pearson's, Spearman's and Kendall's (tau-b) correlation, and errors without and after a mapping."""

_RAYS = np.linspace(0, 1, 101)


class Value(NamedTuple):
    """A figure, or the reason `why` it is undefined; `low` and `high` are the bounds of its 95% interval, if any."""

    value: float | None
    why: str = ""
    low: float | None = None
    high: float | None = None


class Mean(NamedTuple):
    """Means over the `datasets` datasets with a defined figure: weighted by their clips, and plain."""

    weighted: Value
    plain: Value
    datasets: int


class Figures(NamedTuple):
    """Counted clips (or systems) by dataset; values by model, dataset and metric; means by model and metric."""

    clips: dict[str, int]
    values: dict[str, dict[str, dict[str, Value]]]
    means: dict[str, dict[str, Mean]]


def measured(mos: np.ndarray, scores: np.ndarray) -> dict[str, Value]:
    """Compute all of `METRICS` for one dataset, shapes (clips,)."""
    from scipy import stats

    if why := _unusable(mos, scores):
        return dict.fromkeys(METRICS, Value(None, why))
    errors = scores - mos
    mse = float(np.mean(errors * errors))
    found = {"mse": Value(mse), "rmse": Value(mse**0.5)}
    if why := _constant(mos, scores):
        return {name: found.get(name, Value(None, why)) for name in METRICS}
    found["pcc"] = Value(correlation.pcc(mos, scores))
    found["srcc"] = Value(float(stats.spearmanr(mos, scores).statistic))
    found["ktau"] = Value(float(stats.kendalltau(mos, scores).statistic))
    for name, order in (("rmse_first", 1), ("rmse_third", 3)):
        found[name] = _mapped_rmse(mos, scores, order)
    return {name: found[name] for name in METRICS}


def mapping(mos: np.ndarray, scores: np.ndarray, order: int) -> Polynomial:
    """Fit the polynomial of `order` 1 or 3 that rises over the whole range of the scores to the listeners' scores.

    Least squares over all such polynomials, not a fit that is tested afterwards: a derivative that is nowhere negative
    on [0, 1] is a sum, with non-negative weights, of t (1 - t) and of squares (t - r)² with r in [0, 1] (Lukács), so
    non-negative least squares finds the weights. r is taken in steps of 0.01. A model that ranks clips in reverse order
    gets a constant.
    """
    from scipy.optimize import nnls

    low, high = float(scores.min()), float(scores.max())
    powers = np.vander((scores - low) / (high - low), order + 1, increasing=True)
    parts = _rising(order)
    basis, triangle = np.linalg.qr(powers)
    columns = triangle @ parts
    sizes = np.linalg.norm(columns, axis=0)
    weights, _ = nnls(columns / sizes, basis.T @ mos)
    rising: Polynomial = Polynomial(parts @ (weights / sizes), domain=[low, high], window=[0, 1])
    return rising


def compute(
    datasets: np.ndarray, mos: np.ndarray, models: Mapping[str, np.ndarray], resamples: int = 1_000, seed: int = 0
) -> Figures:
    """Compute all metrics of all models; arrays have shape (clips,), of `counted` clips.

    PCC, SRCC, MSE and RMSE have intervals, from a bootstrap over the clips of each dataset.
    """
    names = sorted(set(datasets.tolist()))
    members = {name: np.flatnonzero(datasets == name) for name in names}
    clips = {name: len(of_it) for name, of_it in members.items()}
    values = {
        model: {name: _of_model(mos[of_it], scores[of_it]) for name, of_it in members.items()}
        for model, scores in models.items()
    }
    drawn = {
        metric: correlation.resampled(datasets, mos, models, resamples, seed, statistic)
        for metric, statistic in _STATISTICS.items()
    }
    for metric, of_models in drawn.items():
        for model, rows in of_models.items():
            for name, row in zip(names, rows, strict=True):
                values[model][name][metric] = _with_interval(values[model][name][metric], row)
    averages = {
        model: {metric: _mean(clips, of_model, metric, drawn.get(metric, {}).get(model)) for metric in METRICS}
        for model, of_model in values.items()
    }
    return Figures(clips, values, averages)


def counted(datasets: np.ndarray, mos: np.ndarray, models: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which clips count, shape (clips,): those that all models could score (a missing score is NaN).

    A model that could score no clip of a dataset removes none there, and has no figures for that dataset.
    """
    counts = np.asarray(np.isfinite(mos))
    for name in set(datasets.tolist()):
        of_it = datasets == name
        able = [scores for scores in models.values() if np.isfinite(scores[of_it]).any()]
        counts &= np.all([np.isfinite(scores) for scores in able], axis=0) | ~of_it if able else ~of_it
    return counts


def by_system(
    datasets: np.ndarray, systems: Sequence[str | None], mos: np.ndarray, models: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return the dataset, the listeners' and the models' mean score of each system, shape (systems,).

    Systems are those of each dataset; clips without a system are left out.
    """
    pairs = [pair if pair[1] else None for pair in zip(datasets.tolist(), systems, strict=True)]
    names = sorted(filter(None, set(pairs)))
    of_pair = {pair: number for number, pair in enumerate(names)}
    numbers = np.array([of_pair.get(pair, -1) if pair else -1 for pair in pairs], int)
    named = numbers >= 0
    sizes = np.bincount(numbers[named], minlength=len(names))

    def averaged(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.bincount(numbers[named], values[named], minlength=len(names)) / sizes)

    of_models = {name: averaged(scores) for name, scores in models.items()}
    return np.array([dataset for dataset, _ in names], object), averaged(mos), of_models


def means(clips: Sequence[int], values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return the mean weighted by clips and the plain mean; datasets without a figure count in neither."""
    there = [(number, value) for number, value in zip(clips, values, strict=True) if value is not None]
    if not there:
        return None, None
    numbers, found = np.array(there, float).T
    return float(numbers @ found / numbers.sum()), float(found.mean())


def _of_model(mos: np.ndarray, scores: np.ndarray) -> dict[str, Value]:
    if len(scores) and np.isnan(scores).all():
        return dict.fromkeys(METRICS, Value(None, "the model could score none of its clips"))
    return measured(mos, scores)


def _mean(
    clips: Mapping[str, int], of_model: Mapping[str, Mapping[str, Value]], metric: str, drawn: np.ndarray | None
) -> Mean:
    column = [of_model[name][metric].value for name in clips]
    is_there = np.array([value is not None for value in column], bool)
    if not is_there.any():
        none = Value(None, "no dataset has this figure")
        return Mean(none, none, 0)
    numbers = np.array(list(clips.values()), float)[is_there]
    weighted, plain = (Value(mean) for mean in means(list(clips.values()), column))
    if drawn is not None:
        kept = drawn[is_there]  # (datasets, resamples)
        weighted = _with_interval(weighted, numbers @ kept / numbers.sum())
        plain = _with_interval(plain, kept.mean(axis=0))
    return Mean(weighted, plain, int(is_there.sum()))


def _unusable(mos: np.ndarray, scores: np.ndarray) -> str:
    if len(mos) < MIN_CLIPS:
        return f"{len(mos)} of the {MIN_CLIPS} clips that are needed"
    if not (np.isfinite(mos).all() and np.isfinite(scores).all()):
        return "NaN or infinite scores"
    return ""


def _constant(mos: np.ndarray, scores: np.ndarray) -> str:
    if np.ptp(mos) < CONSTANT:
        return "the listeners' scores are all the same"
    return "the model's scores are all the same" if np.ptp(scores) < CONSTANT else ""


def _mapped_rmse(mos: np.ndarray, scores: np.ndarray, order: int) -> Value:
    freedom = len(mos) - (order + 1)
    if freedom < 1:
        return Value(None, f"{len(mos)} clips are too few for a mapping of {order + 1} coefficients")
    errors = mapping(mos, scores, order)(scores) - mos
    return Value(float(np.sqrt(errors @ errors / freedom)))


def _rising(order: int) -> np.ndarray:
    """Return the polynomials whose weighted sums are all rising ones, as columns (order + 1, polynomials)."""
    free = np.zeros((order + 1, 2))
    free[0] = 1, -1  # the constant may have either sign
    if order == 1:
        return np.column_stack([free, [0, 1]])
    squares = np.stack([0 * _RAYS, _RAYS**2, -_RAYS, np.full_like(_RAYS, 1 / 3)])  # integrals of (t - r)²
    return np.column_stack([free, squares, [0, 0, 1 / 2, -1 / 3]])


def _with_interval(value: Value, drawn: np.ndarray) -> Value:
    low, high = correlation.interval(drawn)
    return value if value.value is None or np.isnan(low) else value._replace(low=low, high=high)


def _srccs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    from scipy import stats

    return correlation.pccs(*(np.asarray(stats.rankdata(values, axis=1)) for values in (x, y)))


def _mses(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.mean((x - y) ** 2, axis=1))


def _rmses(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(_mses(x, y)))


_STATISTICS: dict[str, Statistic] = {"pcc": correlation.pccs, "srcc": _srccs, "mse": _mses, "rmse": _rmses}
